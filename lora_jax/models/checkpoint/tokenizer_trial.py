"""A program that loads a tokenizer and puts hard texts to it, run as a process of its own by `tokenizer.py`.

A `tokenizer.json` comes with a model from anywhere. Its regular expressions may run for ever, and its tables may make
`tokenizers` break off or ask for all memory, which no caller in the same process can stop or catch. Here it can be.

Reads the settings, one line of JSON, and then the file; writes one line, `{}` or `{"error": …}`.
"""

from __future__ import annotations

import contextlib
import json
import sys

import tokenizers

_LENGTH = 2_000  # of what is repeated
_ALPHABET = "a0 .-_\n\t'é中\u0301\U0001f600"
_TEXTS = (
    "The film wasn't bad: 1,234.5 % of it — naïve, 日本語, العربية, हिन्दी 👩‍👩‍👧 — is there…\r\n\r\n\tcode(x) = {y};  ",
    "",
    " ",
    "\u200b\ufeff\ufffd",
)


def limit(memory: int) -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):  # not every system has them
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def hard_texts(expressions: list[str]) -> list[str]:
    """Repetitions, and pairs repeated, that end in what nothing matches: where an expression backtracks, it does here.

    Of the characters that the expressions name, beside some of each class. They follow once more at the end, since a
    text without what an expression ends in isn't searched.
    """
    named = "".join(character for expression in expressions for character in expression if character.isalnum())
    letters = list(dict.fromkeys(named[:40] + _ALPHABET))
    end = "\0!" + "".join(letters)
    texts = [letter * _LENGTH + rest for letter in letters for rest in ("", end)]
    texts += [(one + other) * (_LENGTH // 2) + end for one in letters[:8] for other in letters[:8] if one != other]
    return [*_TEXTS, *texts]


def main() -> None:
    settings = json.loads(sys.stdin.buffer.readline())
    data = sys.stdin.buffer.read()
    limit(settings["memory"])
    try:
        tokenizer = tokenizers.Tokenizer.from_str(data.decode())
        tokenizer.no_padding()
        tokenizer.no_truncation()
        texts = hard_texts(settings["expressions"])
        for text in texts:
            ids = tokenizer.encode(text).ids
            if len(ids) > 100 * (len(text) + 10):
                raise ValueError(f"makes {len(ids):,} tokens of {len(text):,} characters")
            tokenizer.decode(ids[:100], skip_special_tokens=True)
        tokenizer.encode(texts[0], texts[0])
        answer = {}
    except BaseException as error:  # what Rust's own failures are raised as is no `Exception`
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
