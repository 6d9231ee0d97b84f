"""Renders conversations with a base's chat template, in a process with limits, and finds the assistant's answers."""

from __future__ import annotations

import contextlib
import itertools
import json
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from ..errors import DataError

# For a base without a template: roles as headings, an end-of-text after each answer.
DEFAULT_TEMPLATE = """\
{{ bos_token }}
{%- for message in messages %}
{{- message.role }}:
{{ message.content }}
{%- if message.role == 'assistant' %}{{ eos_token }}{% endif %}
{{ '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- 'assistant:\\n' }}
{%- endif %}"""

_PROGRAM = Path(__file__).with_name("chat_renderer.py")
_MEMORY = 2**30  # bytes; the limit of the rendering process
_SECONDS = 5.0  # time limit of one conversation
_START = 30.0  # seconds to wait for the process to start
_GRACE = 2.0  # a process that doesn't stop itself is killed after so many times the limit
_MOST_TEXT = 2**31  # bytes of all renderings

Message = dict[str, Any]  # JSON: a role, a content, and what else a template may read


class Part(NamedTuple):
    """A piece of a text, and whether the model learns to write it."""

    text: str
    is_target: bool


def render_conversations(
    conversations: Sequence[Sequence[Message]],
    *,
    template: str | None,
    tokens: Mapping[str, str],
    name: str,
    numbers: Sequence[int] | None = None,
    seconds: float = _SECONDS,
) -> list[tuple[Part, ...]]:
    """Renders conversations and marks the assistant's answers in each.

    The messages before an answer are rendered with `add_generation_prompt`, and again with the answer: what the second
    rendering adds, end-of-turn included, is what the model must write. This is exact if the second rendering begins
    with the first. Templates that violate this are rejected.

    The template runs in Jinja's `ImmutableSandboxedEnvironment`, in a process with a time limit and, if the system
    supports it, a memory limit. It sees `messages`, `add_generation_prompt` and the special tokens, and may call
    `raise_exception` and `strftime_now`.

    Args:
        conversations: Lists of messages, each with a `role` and a `content`.
        template: Jinja template; `None` for `DEFAULT_TEMPLATE`.
        tokens: Texts of special tokens, such as `eos_token`.
        name: Name of the data, for messages.
        numbers: Row numbers of the conversations; `None` for 1, 2, 3, …
        seconds: Time limit of one conversation.

    Returns:
        The parts of each conversation; joined, they are its rendering.

    Raises:
        DataError: The template is not valid Jinja, does what the sandbox forbids, exceeds a limit, or renders earlier
            messages differently when more follow. The row is named.

    Example:
        >>> talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        >>> (parts,) = render_conversations([talk], template=None, tokens={"eos_token": "</s>"}, name="talks.jsonl")
        >>> parts[:2]
        (Part(text='user:\\nHi\\nassistant:\\n', is_target=False), Part(text='Hello</s>\\n', is_target=True))

    **Deviations.** transformers' `return_assistant_tokens_mask` uses `{% generation %}` tags, which few templates have;
    here the tags are ignored.
    """
    return _render(conversations, template, tokens, name, seconds, prompt=False, numbers=numbers)


def render_prompts(
    conversations: Sequence[Sequence[Message]],
    *,
    template: str | None,
    tokens: Mapping[str, str],
    name: str,
    seconds: float = _SECONDS,
) -> list[str]:
    """Renders conversations up to where the assistant answers; see `render_conversations`."""
    return [parts[0].text for parts in _render(conversations, template, tokens, name, seconds, prompt=True)]


def _render(
    conversations: Sequence[Sequence[Message]],
    template: str | None,
    tokens: Mapping[str, str],
    name: str,
    seconds: float,
    *,
    prompt: bool,
    numbers: Sequence[int] | None = None,
) -> list[tuple[Part, ...]]:
    import jinja2  # noqa: F401, raises here if it is missing, not in the other process

    settings = {
        "template": DEFAULT_TEMPLATE if template is None else template,
        "tokens": {"bos_token": "", **tokens},
        "seconds": seconds,
        "memory": _MEMORY,
        "prompt": prompt,
    }
    lines = [json.dumps(entry) for entry in (settings, *(list(map(dict, talk)) for talk in conversations))]
    # -P: a file beside the program can't shadow a library.
    command = [sys.executable, "-P", str(_PROGRAM)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    over = threading.Event()
    try:
        numbers = numbers if numbers is not None else range(1, len(conversations) + 1)
        return _answers(process, "\n".join(lines).encode() + b"\n", numbers, name, seconds, over)
    finally:
        over.set()
        process.kill()
        process.wait()


def _answers(
    process: subprocess.Popen[bytes],
    request: bytes,
    numbers: Sequence[int],
    name: str,
    seconds: float,
    over: threading.Event,
) -> list[tuple[Part, ...]]:
    """The renderings. Each is awaited with a time limit, since the process can interrupt Python code but not C code."""
    assert process.stdin is not None
    assert process.stdout is not None
    lines: queue.Queue[bytes] = queue.Queue(maxsize=64)  # bounded, so that unread output doesn't fill the memory
    threading.Thread(target=_write, args=(process.stdin, request), daemon=True).start()
    threading.Thread(target=_read, args=(process.stdout, lines, over), daemon=True).start()
    with contextlib.suppress(queue.Empty):
        lines.get(timeout=_START)  # the process has started
    renderings: list[tuple[Part, ...]] = []
    size = 0
    for row in numbers:
        where = f"{name}, row {row}"
        try:
            line = lines.get(timeout=_GRACE * seconds)
        except queue.Empty:
            raise DataError(
                f"{where}: the base's chat template did not finish within {seconds:g} s. {_WAY_OUT}"
            ) from None
        if not line.endswith(b"}\n"):
            raise DataError(f"{where}: the base's chat template uses too much memory or ends the process. {_WAY_OUT}")
        size += len(line)
        if size > _MOST_TEXT:
            raise DataError(f"{where}: the base's chat template has written {size:,} bytes so far. {_WAY_OUT}")
        answer = json.loads(line)
        _check(answer, where)
        renderings.append(tuple(Part(text, is_target) for text, is_target in answer["parts"]))
    return renderings


def _write(stream: IO[bytes], data: bytes) -> None:
    with contextlib.suppress(OSError), stream:  # the process may have ended
        stream.write(data)


def _read(stream: IO[bytes], lines: queue.Queue[bytes], over: threading.Event) -> None:
    with stream:
        for line in itertools.chain(stream, [b""]):
            while not over.is_set():
                with contextlib.suppress(queue.Full):
                    lines.put(line, timeout=0.1)
                    break


_WAY_OUT = (
    "Fix `chat_template.jinja` (or `chat_template` in tokenizer_config.json) in the base's folder, or use a base that "
    "you trust."
)


def _check(answer: dict[str, Any], where: str) -> None:
    if "error" in answer:
        raise DataError(f"{where}: the base's chat template {answer['error'].rstrip('.'):.400}. {_WAY_OUT}")
    if "unstable" in answer:
        raise DataError(
            f"{where}: the base's chat template renders the messages before message {answer['unstable']} "
            "differently when that message or later ones follow, so the assistant's answers can't be found. Give one "
            "answer per row, as the last message, or simplify the template."
        )
