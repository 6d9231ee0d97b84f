"""A program that renders conversations with a chat template; `chat.py` runs it in a separate process.

A template comes with a model from anywhere. Jinja's sandbox keeps it away from Python's attributes, but not from
running forever or filling the memory, so the process has limits and reports failures row by row. It imports nothing
of lora_jax, so that it starts in a tenth of a second.

It reads one line of settings, then one line of messages per conversation. It writes `{}` when it has started, then one
line per conversation: `{"parts": …}` or `{"error": …}`.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import signal
import sys
from typing import Any, TypedDict

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

LONGEST = 4_000_000  # characters of a rendered conversation

Message = dict[str, Any]


class GenerationTag(jinja2.ext.Extension):
    """Ignores `{% generation %}` tags, which mark the assistant's answers, and renders what is between them."""

    tags = {"generation"}  # noqa: RUF012, Jinja declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox with the extensions, filters and globals that transformers gives to chat templates."""

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationTag])
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)


class Answer(TypedDict, total=False):
    """What is written for a conversation: its parts, or why it has none."""

    parts: list[tuple[str, bool]]
    error: str
    unstable: int


class TooLongError(Exception):
    pass


def _to_json(value: object, ensure_ascii: bool = False, indent: int | None = None) -> str:
    # Jinja's own filter escapes HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def render_prompt(template: jinja2.Template, messages: list[Message], tokens: dict[str, str]) -> Answer:
    """The conversation as one part, ready for the assistant's answer."""
    return {"parts": [(_rendered(template, messages, tokens, prompted=True), False)]}


def _rendered(template: jinja2.Template, messages: list[Message], tokens: dict[str, str], *, prompted: bool) -> str:
    pieces: list[str] = []
    length = 0
    for piece in template.generate(messages=messages, add_generation_prompt=prompted, **tokens):
        length += len(piece)
        if length > LONGEST:
            raise TooLongError(f"gave more than {LONGEST:,} characters")
        pieces.append(piece)
    return "".join(pieces)


def render(template: jinja2.Template, messages: list[Message], tokens: dict[str, str]) -> Answer:
    """The conversation in parts, each with whether the assistant says it.

    The answer in turn `i` is what rendering messages `0..i` adds to rendering `0..i-1` with the generation prompt. This
    is exact if each rendering begins with the one before it.
    """

    def text(count: int, *, prompted: bool = False) -> str:
        return _rendered(template, messages[:count], tokens, prompted=prompted)

    whole = text(len(messages))
    parts: list[tuple[str, bool]] = []
    done = 0
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = text(place, prompted=True)
        after = text(place + 1) if place + 1 < len(messages) else whole
        if not (after.startswith(before) and whole.startswith(after) and done <= len(before)):
            return {"unstable": place + 1}
        if not after[len(before) :].strip():
            return {"error": f"renders nothing of message {place + 1}"}
        parts += [(whole[done : len(before)], False), (whole[len(before) : len(after)], True)]
        done = len(after)
    parts.append((whole[done:], False))
    return {"parts": [part for part in parts if part[0]]}


def _limit(seconds: float, size: int) -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):  # not available on every system
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def stop(number: int, frame: object) -> None:
        raise TooLongError(f"did not finish within {seconds:g} s")

    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, stop)


def _timer(seconds: float) -> None:
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


def main() -> None:
    settings = json.loads(sys.stdin.buffer.readline())
    _limit(settings["seconds"], settings["memory"])

    def answer(content: Answer) -> None:
        sys.stdout.write(json.dumps(content) + "\n")
        sys.stdout.flush()

    answer({})  # started: the clock of the first conversation runs
    write = render_prompt if settings["prompt"] else render
    template = None
    for line in sys.stdin.buffer:
        try:
            _timer(settings["seconds"])
            if template is None:
                template = Environment().from_string(settings["template"])
            answer(write(template, json.loads(line), settings["tokens"]))
        except jinja2.exceptions.SecurityError as error:
            answer({"error": f"does what the sandbox forbids: {error}"})
        except jinja2.TemplateSyntaxError as error:
            answer({"error": f"is not valid Jinja: {error.message} (line {error.lineno})"})
        except jinja2.TemplateError as error:
            answer({"error": f"says: {error}"})
        except TooLongError as error:
            answer({"error": str(error)})
        except (MemoryError, OverflowError) as error:
            answer({"error": f"uses too much memory ({type(error).__name__})"})
        except Exception as error:  # a template's code may raise anything
            answer({"error": f"fails: {type(error).__name__}: {error}"})
        finally:
            _timer(0)


if __name__ == "__main__":
    main()
