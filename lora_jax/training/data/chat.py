"""Conversations as text: the chat template of a base, in a sandbox and with limits, and who says what."""

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

# For a base that brings none: roles as headings, an end-of-text after each answer.
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
_MEMORY = 2**30  # bytes of the process that renders
_SECONDS = 5.0  # of a conversation
_START = 30.0  # seconds, for the process to begin
_GRACE = 2.0  # times a conversation's seconds, before a process that doesn't stop itself is killed
_MOST_TEXT = 2**31  # bytes of all renderings


class Part(NamedTuple):
    """A piece of a text, and whether a model is to learn to write it."""

    text: str
    is_target: bool


def render_conversations(
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    *,
    template: str | None,
    tokens: Mapping[str, str],
    name: str,
    numbers: Sequence[int] | None = None,
    seconds: float = _SECONDS,
) -> list[tuple[Part, ...]]:
    """Renders conversations, and tells what the assistant says in each.

    An answer is what the template adds to the messages before it, rendered with `add_generation_prompt`, when that
    answer is given too: it is what a model that is asked for the answer has to write, its end-of-turn included. This is
    exact if a rendering begins as the shorter one does; a template for which that isn't so is refused.

    The template runs in Jinja's `ImmutableSandboxedEnvironment`, in a process of its own with a limit of time and
    (where the system has it) of memory. It sees `messages`, `add_generation_prompt` and the special tokens, and may
    call `raise_exception` and `strftime_now`.

    Args:
        conversations: of messages with a `role` and a `content`.
        template: in Jinja; `None` for `DEFAULT_TEMPLATE`.
        tokens: the texts of special tokens, such as `eos_token`.
        name: of the data, for messages.
        numbers: of the conversations' rows in it; `None` for 1, 2, 3, …
        seconds: that one conversation may take.

    Returns:
        The parts of each; joined they are the rendering.

    Raises:
        DataError: a template that is no Jinja, does what the sandbox forbids, doesn't end, takes too much memory, or
            renders earlier messages in another way when more follow. The row is named.

    Example:
        >>> talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        >>> (parts,) = render_conversations([talk], template=None, tokens={"eos_token": "</s>"}, name="talks.jsonl")
        >>> parts[:2]
        (Part(text='user:\\nHi\\nassistant:\\n', is_target=False), Part(text='Hello</s>\\n', is_target=True))

    **Deviations.** transformers' `return_assistant_tokens_mask` takes what is between `{% generation %}` tags, which
    few templates have; here the tags are read over.
    """
    return _render(conversations, template, tokens, name, seconds, prompt=False, numbers=numbers)


def render_prompts(
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    *,
    template: str | None,
    tokens: Mapping[str, str],
    name: str,
    seconds: float = _SECONDS,
) -> list[str]:
    """Renders conversations up to where the assistant answers; arguments and errors as `render_conversations`."""
    return [parts[0].text for parts in _render(conversations, template, tokens, name, seconds, prompt=True)]


def _render(
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    template: str | None,
    tokens: Mapping[str, str],
    name: str,
    seconds: float,
    *,
    prompt: bool,
    numbers: Sequence[int] | None = None,
) -> list[tuple[Part, ...]]:
    import jinja2  # noqa: F401, that it is missing is told here, and not by a process that ends

    settings = {
        "template": DEFAULT_TEMPLATE if template is None else template,
        "tokens": {"bos_token": "", **tokens},
        "seconds": seconds,
        "memory": _MEMORY,
        "prompt": prompt,
    }
    lines = [json.dumps(entry) for entry in (settings, *(list(map(dict, talk)) for talk in conversations))]
    # -P: what lies beside the program can't stand in for a library.
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
    """The renderings, each waited for no longer than it may take: the process stops Python by itself, and not C."""
    assert process.stdin is not None
    assert process.stdout is not None
    lines: queue.Queue[bytes] = queue.Queue(maxsize=64)  # no more than is read goes into memory
    threading.Thread(target=_write, args=(process.stdin, request), daemon=True).start()
    threading.Thread(target=_read, args=(process.stdout, lines, over), daemon=True).start()
    with contextlib.suppress(queue.Empty):
        lines.get(timeout=_START)  # that it has begun
    renderings: list[tuple[Part, ...]] = []
    size = 0
    for row in numbers:
        where = f"{name}, row {row}"
        try:
            line = lines.get(timeout=_GRACE * seconds)
        except queue.Empty:
            raise DataError(f"{where}: the base's chat template didn't end within {seconds:g} s. {_WAY_OUT}") from None
        if not line.endswith(b"}\n"):
            raise DataError(f"{where}: the base's chat template takes too much memory or ends the process. {_WAY_OUT}")
        size += len(line)
        if size > _MOST_TEXT:
            raise DataError(f"{where}: the base's chat template makes {size:,} bytes of the rows so far. {_WAY_OUT}")
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
    "Mend `chat_template.jinja` (or `chat_template` in tokenizer_config.json) in the base's folder, or use a base that "
    "you trust."
)


def _check(answer: dict[str, Any], where: str) -> None:
    if "error" in answer:
        raise DataError(f"{where}: the base's chat template {answer['error'].rstrip('.'):.400}. {_WAY_OUT}")
    if "unstable" in answer:
        raise DataError(
            f"{where}: the base's chat template renders the messages before message {answer['unstable']} in another "
            "way once it, or what follows, is there, so what the assistant says can't be told apart. Write "
            "conversations of one answer a row, the answer last, or simplify the template."
        )
