"""A program that renders conversations with a chat template, run as a process of its own by `chat.py`.

A template comes with a model from anywhere. Jinja's sandbox keeps it from Python's attributes; it doesn't keep it from
running for ever or filling the memory, and Python can't stop either from within. So the process has limits, and what
goes wrong is told by the row. It imports nothing of lora_jax, so it starts in a tenth of a second.

Reads a line of settings, then a line of messages for each conversation; writes `{}` when it has begun, then a line for
each: `{"parts": …}` or `{"error": …}`.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import signal
import sys
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

LONGEST = 4_000_000  # characters of a rendered conversation


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks what an assistant says; here its body is rendered as it stands."""

    tags = {"generation"}  # noqa: RUF012, as Jinja has it

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox, with what templates of models use: as transformers sets it up."""

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationTag])
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)


class TooLongError(Exception):
    pass


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    # Jinja's own escapes HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def render_prompt(template: jinja2.Template, messages: list[dict[str, Any]], tokens: dict[str, str]) -> dict[str, Any]:
    """The conversation as one part, ready for the assistant's answer."""
    return {"parts": [[_rendered(template, messages, tokens, prompted=True), False]]}


def _rendered(
    template: jinja2.Template, messages: list[dict[str, Any]], tokens: dict[str, str], *, prompted: bool
) -> str:
    pieces: list[str] = []
    length = 0
    for piece in template.generate(messages=messages, add_generation_prompt=prompted, **tokens):
        length += len(piece)
        if length > LONGEST:
            raise TooLongError(f"gave more than {LONGEST:,} characters")
        pieces.append(piece)
    return "".join(pieces)


def render(template: jinja2.Template, messages: list[dict[str, Any]], tokens: dict[str, str]) -> dict[str, Any]:
    """The conversation in parts, each with whether an assistant says it.

    What an assistant says in turn `i` is what rendering messages `0..i` has beyond rendering `0..i-1` with the prompt
    for a generation: exact, if each rendering begins as the one before it.
    """

    def text(count: int, *, prompted: bool = False) -> str:
        return _rendered(template, messages[:count], tokens, prompted=prompted)

    whole = text(len(messages))
    parts: list[list[Any]] = []
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
        parts += [[whole[done : len(before)], False], [whole[len(before) : len(after)], True]]
        done = len(after)
    parts.append([whole[done:], False])
    return {"parts": [part for part in parts if part[0]]}


def _limit(seconds: float, size: int) -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):  # not every system has them
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def stop(number: int, frame: Any) -> None:
        raise TooLongError(f"didn't end within {seconds:g} s")

    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, stop)


def _timer(seconds: float) -> None:
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


def main() -> None:
    settings = json.loads(sys.stdin.buffer.readline())
    _limit(settings["seconds"], settings["memory"])

    def answer(content: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(content) + "\n")
        sys.stdout.flush()

    answer({})  # the time of the first conversation begins
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
            answer({"error": f"is no valid Jinja: {error.message} (line {error.lineno})"})
        except jinja2.TemplateError as error:
            answer({"error": f"says: {error}"})
        except TooLongError as error:
            answer({"error": str(error)})
        except (MemoryError, OverflowError) as error:
            answer({"error": f"takes too much memory ({type(error).__name__})"})
        except Exception as error:  # whatever a template's own code raises
            answer({"error": f"fails: {type(error).__name__}: {error}"})
        finally:
            _timer(0)


if __name__ == "__main__":
    main()
