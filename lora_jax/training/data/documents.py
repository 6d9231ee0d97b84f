"""What a language model learns from: plain texts, prompts with completions, or conversations."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import lora_jax as lj
from lora_jax import files

from ..errors import DataError
from ..examples import Columns
from .chat import Part, render_conversations
from .formats import check_regular
from .json_lines import check_writable
from .sources import check_texts, read_table
from .special_text import check_marks, escape, special_text_note
from .table import Table, shown

Format = Literal["text", "completion", "chat"]
ROLES = ("system", "user", "assistant", "tool")
WEIGHT = "weight"  # of a message, as OpenAI's fine-tuning has it: 0 where an answer is context and isn't learnt


class Documents(NamedTuple):
    """Texts in parts, some of which are to be learnt.

    Attributes:
        name: the file or data set, for messages.
        format: what they were read from.
        rows: the parts of each text.
        notes: What a user should know of them.
        left_out: What was left out of bad rows, in words; `None` for nothing.
        skipped: How many these are.
    """

    name: str
    format: Format
    rows: list[tuple[Part, ...]]
    notes: tuple[str, ...] = ()
    left_out: str | None = None
    skipped: int = 0

    @property
    def is_framed(self) -> bool:
        """Whether special tokens begin and end a text; a chat template writes its own."""
        return self.format != "chat"


class Pair(NamedTuple):
    """A prompt, and what is expected to follow."""

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
        source: a file or a hub data set, as for `read_examples`; or a file that ends in `.txt`, which is one text.
        columns: `messages`; or `prompt` and `completion`; or `text`, all of which is to be learnt.
        special: of the base; its chat template renders `messages`.
        split: of a hub data set, where `source` names none.
        skip_bad_rows: Whether rows that can't be used are left out, and counted.
        escape_special_tokens: Whether special tokens that a text spells out are plain text, see `escape`; otherwise
            they are control tokens, and a note says so.

    Raises:
        DataError: as for `read_examples`; messages of another form; a template that can't be used.
    """
    form = format_of(columns)
    if Path(source).suffix.lower() == ".txt":
        if form != "text":
            raise DataError(f"{source} is plain text and has no columns: leave out `--prompt` and `--messages`.")
        return _framed(source, form, [(Part(_read_text(Path(source)), True),)], special, escape_special_tokens)
    wanted = {f"--{name}": getattr(columns, name) for name in _COLUMNS[form]}
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
    """Texts that special tokens begin and end; those that they have there already are meant so."""
    if escaped:
        return Documents(source, form, [tuple(Part(escape(t, special.added), is_t) for t, is_t in row) for row in rows])
    begin, end = special.texts.get("bos_token", ""), special.texts.get("eos_token", "")
    texts = ("".join(part.text for part in row).strip().removeprefix(begin).removesuffix(end) for row in rows)
    return Documents(source, form, rows, notes=tuple(special_text_note(texts, special.added)))


def _conversations(
    table: Table, column: str, special: lj.models.SpecialTokens, escaped: bool
) -> tuple[Documents, Table]:
    """The rendered conversations of a column, and the rows that they are of."""

    def check(value: Any, where: str) -> list[dict[str, Any]]:
        talk = check_messages(value, f"{where}: column '{column}'")
        answers = [message for message in talk if message["role"] == "assistant"]
        if not answers:
            raise DataError(f"{where} has no message of the role 'assistant': there's nothing to learn")
        if not any(message.get(WEIGHT, 1) for message in answers):
            raise DataError(
                f"{where} has `{WEIGHT}` 0 on every message of the role 'assistant': there's nothing to learn"
            )
        return talk

    table.convert(column, check)
    table = table.good()
    talks: list[list[dict[str, Any]]] = table.columns[column]
    texts = ("\n".join(message["content"] for message in talk) for talk in talks)
    notes = [] if escaped else special_text_note(texts, special.added)
    weighted = [message["role"] for talk in talks for message in talk if message.get(WEIGHT)]
    if others := sum(role != "assistant" for role in weighted):
        notes.append(f"{others:,} messages that aren't the assistant's have `{WEIGHT}` 1: they aren't learnt even so")
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


def _weighted(parts: tuple[Part, ...], talk: list[dict[str, Any]]) -> tuple[Part, ...]:
    """The parts, of which only those answers are targets that are to be learnt."""
    learnt = iter([bool(message.get(WEIGHT, 1)) for message in talk if message["role"] == "assistant"])
    return tuple(Part(part.text, next(learnt)) if part.is_target else part for part in parts)


def pairs_of(documents: Documents) -> list[Pair]:
    """The prompt and the completion of each text; of a conversation, its last answer and all before it.

    Raises:
        DataError: plain texts.
    """
    if documents.format == "text":
        raise DataError(f"{documents.name} holds plain texts: to generate, prompts and completions are needed.")
    pairs: list[Pair] = []
    for parts in documents.rows:
        last = max(place for place, part in enumerate(parts) if part.is_target)
        pairs.append(Pair("".join(part.text for part in parts[:last]), parts[last].text))
    return pairs


def check_messages(value: Any, where: str) -> list[dict[str, Any]]:
    """A conversation: messages with a role and a content.

    Raises:
        DataError: what isn't one.
    """
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise DataError(
            f'{where} holds {shown(value)}, and a list of messages is expected: [{{"role": "user", "content": ...}}, '
            '{"role": "assistant", "content": ...}].'
        )
    # `datasets` fills what some messages have and others don't.
    messages = [{key: entry for key, entry in message.items() if entry is not None} for message in value]
    for place, message in enumerate(messages, start=1):
        if message.get("role") not in ROLES:
            raise DataError(
                f"{where}, message {place} has the role {shown(message.get('role'))}, and one of {', '.join(ROLES)} is "
                "expected."
            )
        if not isinstance(message.get("content"), str):
            raise DataError(
                f"{where}, message {place} has the content {shown(message.get('content'))}, and a text is expected."
            )
        if message.get(WEIGHT, 1) not in (0, 1):
            raise DataError(
                f"{where}, message {place} has the `{WEIGHT}` {shown(message[WEIGHT])}, and 0 (not learnt) or 1 is "
                "expected."
            )
    check_writable(messages, where, allow_nan=True)  # the template is rendered elsewhere
    return messages


def _read_text(path: Path) -> str:
    check_regular(path)
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
        raise DataError(f"{path} is empty: a text is expected.")
    return text
