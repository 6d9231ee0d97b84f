"""What a language model learns from: plain texts, prompts with completions, or conversations."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import lora_jax as lj
from lora_jax import files

from .chat import Part, render_conversations
from .data import Columns, read_table, texts_of
from .errors import DataError

Format = Literal["text", "completion", "chat"]
ROLES = ("system", "user", "assistant", "tool")


class Documents(NamedTuple):
    """Texts in parts, some of which are to be learnt.

    Attributes:
        name: the file or data set, for messages.
        format: what they were read from.
        rows: the parts of each text.
    """

    name: str
    format: Format
    rows: list[tuple[Part, ...]]

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
    source: str, columns: Columns, *, special: lj.models.SpecialTokens, split: str = "train"
) -> Documents:
    """Reads texts for a language model.

    Args:
        source: a file or a hub data set, as for `read_examples`; or a file that ends in `.txt`, which is one text.
        columns: `messages`; or `prompt` and `completion`; or `text`, all of which is to be learnt.
        special: of the base; its chat template renders `messages`.
        split: of a hub data set, where `source` names none.

    Raises:
        DataError: as for `read_examples`; messages of another form; a template that can't be used.
    """
    form = format_of(columns)
    if Path(source).suffix.lower() == ".txt":
        if form != "text":
            raise DataError(f"{source} is plain text and has no columns: leave out `--prompt` and `--messages`.")
        return Documents(source, form, [(Part(_read_text(Path(source)), True),)])
    if form == "completion":
        assert columns.prompt is not None
        table = read_table(source, {"--prompt": columns.prompt, "--completion": columns.completion}, split=split)
        prompts = texts_of(table, columns.prompt, source)
        completions = texts_of(table, columns.completion or "", source)
        pairs = zip(prompts, completions, strict=True)
        rows = [(Part(prompt + columns.separator, False), Part(completion, True)) for prompt, completion in pairs]
        return Documents(source, form, rows)
    if form == "chat":
        assert columns.messages is not None
        table = read_table(source, {"--messages": columns.messages}, split=split)
        talks = [
            check_messages(value, f"{source}, row {row}: column '{columns.messages}'")
            for row, value in enumerate(table[columns.messages], start=1)
        ]
        for row, talk in enumerate(talks, start=1):
            if not any(message["role"] == "assistant" for message in talk):
                raise DataError(
                    f"{source}, row {row} has no message of the role 'assistant': there's nothing to learn."
                )
        rendered = render_conversations(talks, template=special.chat_template, tokens=special.texts, name=source)
        return Documents(source, form, rendered)
    table = read_table(source, {"--text": columns.text}, split=split)
    return Documents(source, form, [(Part(text, True),) for text in texts_of(table, columns.text, source)])


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
            f'{where} holds {value!r:.80}, and a list of messages is expected: [{{"role": "user", "content": ...}}, '
            '{"role": "assistant", "content": ...}].'
        )
    # `datasets` fills what some messages have and others don't.
    messages = [{key: entry for key, entry in message.items() if entry is not None} for message in value]
    for place, message in enumerate(messages, start=1):
        if message.get("role") not in ROLES:
            raise DataError(
                f"{where}, message {place} has the role {message.get('role')!r:.40}, and one of {', '.join(ROLES)} is "
                "expected."
            )
        if not isinstance(message.get("content"), str):
            raise DataError(
                f"{where}, message {place} has the content {message.get('content')!r:.80}, and a text is expected."
            )
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
        raise DataError(f"{path} is empty: a text is expected.")
    return text
