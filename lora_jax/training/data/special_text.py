"""Special tokens that a text spells out: finds them, and on request has them tokenized as plain text.

A tokenizer turns `<|im_end|>` into a control token whoever wrote it, so that a user's message can end its own turn and
begin the assistant's. `escape` puts marks around each; `encode_texts` takes what is between two marks as plain text.
The marks are Unicode noncharacters, which don't occur in exchanged text.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_jax.models.checkpoint.tokenizer import refused_if_it_breaks_off
from lora_jax.models.checkpoint.tokenizer import special_texts as special_texts

from ..errors import DataError
from .encoding import Beginning, encode_beginnings, end_of

if TYPE_CHECKING:
    import tokenizers

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_MARKED = re.compile(f"{_OPEN}(.*?){_CLOSE}", re.DOTALL)


def special_text_note(texts: Iterable[str], special: Sequence[str]) -> list[str]:
    """A note that some texts spell out special tokens, with advice; empty if none do.

    Example:
        >>> special_text_note(["Hi", "Bye</s>now"], ["<s>", "</s>"])[0].partition(":")[0]
        '1 of 2 texts spell out special tokens'
    """
    texts = list(texts)
    if not special:
        return []
    spelled = _any_of(special)
    found = [set(spelled.findall(text)) for text in texts]
    if not (count := sum(map(bool, found))):
        return []
    names = sorted(set().union(*found))
    return [
        f"{count:,} of {len(texts):,} texts spell out special tokens: {', '.join(map(repr, names[:4]))}"
        f"{', …' if len(names) > 4 else ''}. They act as control tokens there; `escape_special_tokens=True` takes them "
        "as plain text"
    ]


def escape(value: Any, special: Sequence[str]) -> Any:
    """Marks the special tokens in a text as plain text; in a list or dictionary, those of all texts in it."""
    if isinstance(value, dict):
        return {key: escape(item, special) for key, item in value.items()}
    if isinstance(value, list):
        return [escape(item, special) for item in value]
    if not isinstance(value, str) or not special:
        return value
    if _OPEN in value or _CLOSE in value:  # a mark of other origin would pair up with one beyond the text
        value = _own_marks_only(value)
    return _marked_or(special).sub(lambda found: found[0] if found[2] is None else f"{_OPEN}{found[2]}{_CLOSE}", value)


def _own_marks_only(text: str) -> str:
    """The text without its unpaired marks."""
    pieces = _MARKED.split(text)  # every other piece is a marked one
    return "".join(f"{_OPEN}{piece}{_CLOSE}" if n % 2 else unescape(piece) for n, piece in enumerate(pieces))


def unescape(text: str) -> str:
    """The text without marks.

    Example:
        >>> unescape(escape("a</s>b", ["</s>"]))
        'a</s>b'
    """
    return text.replace(_OPEN, "").replace(_CLOSE, "")


def without_control_tokens(text: str, special: Sequence[str]) -> str:
    """The text without control tokens and marks; marked tokens stay as plain text.

    Example:
        >>> without_control_tokens("<s>" + escape("a</s>b", ["</s>"]) + "</s>", ["<s>", "</s>"])
        'a</s>b'
    """
    return unescape(_marked_or(special).sub(lambda found: found[0] if found[2] is None else "", text))


def check_marks(texts: Iterable[str], name: str, numbers: Iterable[int] | None = None) -> None:
    """Raises if a mark in a rendering is spelled out as `\\ufdd0`, or is unpaired.

    Args:
        texts: Rendered conversations.
        name: Name of the data, for the message.
        numbers: Row numbers of the conversations; `None` for 1, 2, 3, …

    Raises:
        DataError: The template breaks the marks; the row is named.
    """
    for row, text in zip(itertools.count(1) if numbers is None else numbers, texts, strict=False):
        rest = _MARKED.sub("", text)
        if "\\ufdd" in text or _OPEN in rest or _CLOSE in rest:
            raise DataError(
                f"{name}, row {row}: the base's chat template writes messages as JSON, which "
                "`escape_special_tokens` doesn't support. Remove the special tokens from the messages."
            )


class Start(NamedTuple):
    """The tokens that a text begins with.

    Attributes:
        ids: Token ids.
        rest: The part that was cut off and may hold control tokens; `None` if nothing was.
    """

    ids: list[int]
    rest: str | None


@refused_if_it_breaks_off("the base")
def encode_texts(tokenizer: tokenizers.Tokenizer, texts: Sequence[str], max_length: int | None = None) -> list[Start]:
    """The tokens of each text, without those that the tokenizer adds. What `escape` has marked is plain text.

    Args:
        tokenizer: The base's tokenizer.
        texts: Texts, escaped or not.
        max_length: Most tokens of a text that are needed, see `encode_beginnings`; `None` for all.
    """
    special = special_texts(tokenizer)
    pieces = [_pieces(text, special) for text in texts]
    encoded = {}
    for plain in (False, True):
        some = [piece for parts in pieces for piece, is_plain in parts if is_plain is plain]
        tokenizer.encode_special_tokens = plain
        encoded[plain] = iter(_encode(tokenizer, some, max_length))
    tokenizer.encode_special_tokens = False
    return [_joined([(piece, plain, next(encoded[plain])) for piece, plain in parts]) for parts in pieces]


def _encode(tokenizer: tokenizers.Tokenizer, texts: list[str], max_length: int | None) -> list[Beginning]:
    if not texts:
        return []
    if max_length is not None:
        return encode_beginnings(texts, tokenizer, max_length, add_special_tokens=False)
    return [Beginning(encoding, False) for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]


def _joined(pieces: list[tuple[str, bool, Beginning]]) -> Start:
    ids: list[int] = []
    for place, (text, is_plain, (encoding, is_cut)) in enumerate(pieces):
        ids += encoding.ids
        if is_cut:
            rest = "" if is_plain else text[end_of(encoding) :]
            return Start(ids, rest + "".join(later for later, later_plain, _ in pieces[place + 1 :] if not later_plain))
    return Start(ids, None)


def _pieces(text: str, special: Sequence[str]) -> list[tuple[str, bool]]:
    """The text in pieces, each with whether all of it is plain text.

    A piece ends at a control token, where a tokenizer splits the text anyway. Splitting at a mark could add a space.
    """
    if _OPEN not in text or not special:
        return [(text, False)]
    pieces, controls, start = [], "", 0
    bounds = [(found.start(), found.end()) for found in _marked_or(special).finditer(text) if found[2] is not None]
    for begin, end in [*bounds, (len(text), len(text))]:
        section, control, start = text[start:begin], text[begin:end], end
        if _OPEN in section:
            pieces += [(controls, False)] * bool(controls) + [(unescape(section), True)]
            controls = control
        else:
            controls += section + control
    return pieces + [(controls, False)] * bool(controls)


def _marked_or(special: Sequence[str]) -> re.Pattern[str]:
    """Matches marked text as group 1 and unmarked special tokens as group 2."""
    return _compiled_marked_or(tuple(special))


@functools.lru_cache(maxsize=16)
def _compiled_marked_or(special: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(f"{_MARKED.pattern}|({_any_of(special).pattern})", re.DOTALL)


def _any_of(special: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))))
