"""Special tokens that a text spells out: found, and on request taken as the text that they are.

A tokenizer makes one control token of `<|im_end|>`, whoever wrote it: a user's message can end its own turn and begin
the assistant's. A text that is escaped has two marks around each; `encode_texts` takes what is between them as plain
text. The marks are noncharacters of Unicode, which no text is exchanged with.
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
    """That some texts spell out special tokens, and what to do; empty if none does.

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
        f"{', …' if len(names) > 4 else ''}. They act as control tokens there; `--escape-special-tokens` takes them as "
        "plain text"
    ]


def escape(value: Any, special: Sequence[str]) -> Any:
    """A text whose special tokens are marked as plain text; of lists and mappings all their texts."""
    if isinstance(value, dict):
        return {key: escape(item, special) for key, item in value.items()}
    if isinstance(value, list):
        return [escape(item, special) for item in value]
    if not isinstance(value, str) or not special:
        return value
    if _OPEN in value or _CLOSE in value:  # what isn't of an earlier call would pair up with marks beyond the text
        value = _own_marks_only(value)
    return _marked_or(special).sub(lambda found: found[0] if found[2] is None else f"{_OPEN}{found[2]}{_CLOSE}", value)


def _own_marks_only(text: str) -> str:
    """The text without marks that have no partner in it."""
    pieces = _MARKED.split(text)  # what is marked is every other piece
    return "".join(f"{_OPEN}{piece}{_CLOSE}" if n % 2 else unescape(piece) for n, piece in enumerate(pieces))


def unescape(text: str) -> str:
    """The text without marks.

    Example:
        >>> unescape(escape("a</s>b", ["</s>"]))
        'a</s>b'
    """
    return text.replace(_OPEN, "").replace(_CLOSE, "")


def without_control_tokens(text: str, special: Sequence[str]) -> str:
    """The text without its control tokens and marks; what is marked stays as plain text.

    Example:
        >>> without_control_tokens("<s>" + escape("a</s>b", ["</s>"]) + "</s>", ["<s>", "</s>"])
        'a</s>b'
    """
    return unescape(_marked_or(special).sub(lambda found: found[0] if found[2] is None else "", text))


def check_marks(texts: Iterable[str], name: str, numbers: Iterable[int] | None = None) -> None:
    """Refuses a rendering in which a mark is spelled out as `\\ufdd0`, or has lost its partner.

    Args:
        texts: Rendered conversations.
        name: Of the data, for the message.
        numbers: Of their rows; `None` for 1, 2, 3, …

    Raises:
        DataError: The row is named.
    """
    for row, text in zip(itertools.count(1) if numbers is None else numbers, texts, strict=False):
        rest = _MARKED.sub("", text)
        if "\\ufdd" in text or _OPEN in rest or _CLOSE in rest:
            raise DataError(
                f"{name}, row {row}: the base's chat template writes messages as JSON, where `escape_special_tokens` "
                "can't tell what is plain text. Take the special tokens out of the messages."
            )


class Start(NamedTuple):
    """The tokens that a text begins with.

    Attributes:
        ids: Their ids.
        rest: What was cut off and may hold control tokens; `None` where nothing was cut off.
    """

    ids: list[int]
    rest: str | None


@refused_if_it_breaks_off("the base")
def encode_texts(tokenizer: tokenizers.Tokenizer, texts: Sequence[str], max_length: int | None = None) -> list[Start]:
    """The tokens of each text, without those that a tokenizer adds; what `escape` has marked is plain text.

    Args:
        tokenizer: Of the base.
        texts: Texts, escaped or not.
        max_length: How many tokens are enough of a text, see `encode_beginnings`; `None` for all.
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

    One ends at a control token, where a tokenizer divides the text anyhow, and not at a mark: there it may begin a
    piece with a space.
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
    """Finds what is marked, as group 1, and special tokens that aren't, as group 2."""
    return _compiled_marked_or(tuple(special))


@functools.lru_cache(maxsize=16)
def _compiled_marked_or(special: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(f"{_MARKED.pattern}|({_any_of(special).pattern})", re.DOTALL)


def _any_of(special: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))))
