"""Reads the texts that a language model learns from: plain texts, prompts with completions, or conversations."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

import lora_jax as lj
from lora_jax import files

from ..errors import DataError
from ..examples import Columns
from .chat import Message, Part, render_conversations
from .json_lines import check_writable
from .sources import check_texts, read_table
from .special_text import check_marks, escape, special_text_note
from .table import Table, short_repr

Format = Literal["text", "completion", "chat"]
ROLES = ("system", "user", "assistant", "tool")
WEIGHT = "weight"  # key of a message, as in OpenAI's fine-tuning: 0 for an answer that is context only


class Documents(NamedTuple):
    """Texts in parts, of which some are learned.

    Attributes:
        name: The file or data set, for messages.
        format: The format they were read from.
        texts: The parts of each text.
        notes: Notes for the user.
        left_out: Which rows were skipped, in words; `None` if none were.
        skipped: Number of skipped rows.
    """

    name: str
    format: Format
    texts: list[tuple[Part, ...]]
    notes: tuple[str, ...] = ()
    left_out: str | None = None
    skipped: int = 0

    @property
    def is_framed(self) -> bool:
        """Whether special tokens are added around each text; a chat template writes its own."""
        return self.format != "chat"


class Pair(NamedTuple):
    """A prompt and the text that is expected to follow."""

    prompt: str
    completion: str


def format_of(columns: Columns) -> Format:
    if columns.messages is not None:
        return "chat"
    return "text" if columns.prompt is None else "completion"


def read_documents(
    source: str,
    columns: Columns,
    *,
    special: lj.models.SpecialTokens,
    split: str = "train",
    skip_bad_rows: bool = False,
    escape_special_tokens: bool = False,
) -> Documents:
    """Reads texts for a language model.

    Args:
        source: A file or a hub data set, see `read_examples`; or a file that ends in `.txt`, which is one text.
        columns: `messages`; or `prompt` and `completion`; or `text`, which is learned as a whole.
        special: Special tokens of the base, with the chat template that renders `messages`.
        split: Split of a hub data set, if `source` names none.
        skip_bad_rows: Whether rows that can't be used are skipped and counted.
        escape_special_tokens: Whether special tokens spelled out in a text are plain text, see `escape`. Otherwise they
            act as control tokens, and a note says so.

    Raises:
        DataError: See `read_examples`; or messages are malformed, or the chat template can't be used.
    """
    form = format_of(columns)
    if Path(source).suffix.lower() == ".txt":
        if form != "text":
            raise DataError(f"{source} is plain text and has no columns: leave out `prompt` and `messages`.")
        return _framed(source, form, [(Part(_read_text(Path(source)), True),)], special, escape_special_tokens)
    wanted = {name: getattr(columns, name) for name in _COLUMNS[form]}
    table = read_table(source, wanted, split=split, skip_bad_rows=skip_bad_rows)
    if form == "chat":
        assert columns.messages is not None
        documents, table = _conversations(table, columns.messages, special, escape_special_tokens)
    else:
        for column in wanted.values():
            check_texts(table, column)
        table = table.good()
        texts = [table.columns[column] for column in wanted.values()]
        if form == "completion":
            separator = columns.separator
            rows = [(Part(prompt + separator, False), Part(text, True)) for prompt, text in zip(*texts, strict=True)]
        else:
            rows = [(Part(text, True),) for text in texts[0]]
        documents = _framed(source, form, rows, special, escape_special_tokens)
    return documents._replace(left_out=table.left_out, skipped=len(table.bad))


_COLUMNS: dict[Format, tuple[str, ...]] = {
    "text": ("text",),
    "completion": ("prompt", "completion"),
    "chat": ("messages",),
}


def _framed(
    source: str, form: Format, rows: list[tuple[Part, ...]], special: lj.models.SpecialTokens, escaped: bool
) -> Documents:
    """Texts around which special tokens are added. Tokens that already stand there are taken as intended."""
    if escaped:
        return Documents(source, form, [tuple(Part(escape(t, special.added), is_t) for t, is_t in row) for row in rows])
    begin, end = special.texts.get("bos_token", ""), special.texts.get("eos_token", "")
    texts = ("".join(part.text for part in row).strip().removeprefix(begin).removesuffix(end) for row in rows)
    return Documents(source, form, rows, notes=tuple(special_text_note(texts, special.added)))


def _conversations(
    table: Table, column: str, special: lj.models.SpecialTokens, escaped: bool
) -> tuple[Documents, Table]:
    """The rendered conversations of a column, and the good rows of the table."""

    def check(value: object, where: str) -> list[Message]:
        talk = check_messages(value, f"{where}: column '{column}'")
        answers = [message for message in talk if message["role"] == "assistant"]
        if not answers:
            raise DataError(f"{where} has no message with the role 'assistant': there is nothing to learn")
        if not any(message.get(WEIGHT, 1) for message in answers):
            raise DataError(
                f"{where} has `{WEIGHT}` 0 on every message with the role 'assistant': there is nothing to learn"
            )
        return talk

    table.convert(column, check)
    table = table.good()
    talks: list[list[Message]] = table.columns[column]
    texts = ("\n".join(message["content"] for message in talk) for talk in talks)
    notes = [] if escaped else special_text_note(texts, special.added)
    weighted = [message["role"] for talk in talks for message in talk if message.get(WEIGHT)]
    if others := sum(role != "assistant" for role in weighted):
        notes.append(f"{others:,} messages of other roles than 'assistant' have `{WEIGHT}` 1, which is ignored")
    plain = [[{key: value for key, value in message.items() if key != WEIGHT} for message in talk] for talk in talks]
    rendered = render_conversations(
        [escape(talk, special.added) for talk in plain] if escaped else plain,
        template=special.chat_template,
        tokens=special.texts,
        name=table.name,
        numbers=table.rows,
    )
    if escaped:
        check_marks(("".join(part.text for part in parts) for parts in rendered), table.name, table.rows)
    rows = [_weighted(parts, talk) for parts, talk in zip(rendered, talks, strict=True)]
    return Documents(table.name, "chat", rows, notes=tuple(notes)), table


def _weighted(parts: tuple[Part, ...], talk: list[Message]) -> tuple[Part, ...]:
    """The parts, with only those answers as targets whose weight isn't 0."""
    learned = iter([bool(message.get(WEIGHT, 1)) for message in talk if message["role"] == "assistant"])
    return tuple(Part(part.text, next(learned)) if part.is_target else part for part in parts)


def pairs_of(documents: Documents) -> list[Pair]:
    """The prompt and the completion of each text; of a conversation, its last answer and all before it.

    Raises:
        DataError: The documents are plain texts.
    """
    if documents.format == "text":
        raise DataError(f"{documents.name} holds plain texts: generation needs prompts and completions.")
    pairs: list[Pair] = []
    for parts in documents.texts:
        last = max(index for index, part in enumerate(parts) if part.is_target)
        pairs.append(Pair("".join(part.text for part in parts[:last]), parts[last].text))
    return pairs


def check_messages(value: object, where: str) -> list[Message]:
    """The messages of a conversation, each with a role and a content.

    Raises:
        DataError: The value is not a conversation.
    """
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise DataError(
            f'{where} must be a list of messages such as [{{"role": "user", "content": ...}}, {{"role": "assistant", '
            f'"content": ...}}], got {short_repr(value)}.'
        )
    # `datasets` sets keys that only some messages have to `None` in the others.
    messages = [{key: entry for key, entry in message.items() if entry is not None} for message in value]
    for number, message in enumerate(messages, start=1):
        if message.get("role") not in ROLES:
            raise DataError(
                f"{where}, message {number}: `role` must be one of {', '.join(ROLES)}, got "
                f"{short_repr(message.get('role'))}."
            )
        if not isinstance(message.get("content"), str):
            raise DataError(
                f"{where}, message {number}: `content` must be a text, got {short_repr(message.get('content'))}."
            )
        if message.get(WEIGHT, 1) not in (0, 1):
            raise DataError(
                f"{where}, message {number}: `{WEIGHT}` must be 0 (not learned) or 1, got "
                f"{short_repr(message[WEIGHT])}."
            )
    check_writable(messages, where, allow_nan=True)  # they are sent to another process
    return messages


def _read_text(path: Path) -> str:
    try:
        with files.open_regular(path) as file:
            text = file.read().decode("utf-8-sig")
    except files.FileError as error:
        raise DataError(str(error)) from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte {error.start + 1} is 0x{error.object[error.start]:02x}. Save the file as UTF-8."
        ) from None
    if not text.strip():
        raise DataError(f"{path} is empty.")
    return text
