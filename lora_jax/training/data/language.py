"""Texts for a language model as rows of a run: tokens, which of them are to be predicted, several texts a row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

import lora_jax as lj
from lora_jax.models.checkpoint.tokenizer import refused_if_it_breaks_off
from lora_jax.models.nn.decoder import DecoderConfig

from ..config import TrainConfig
from ..errors import ConfigError, DataError
from ..task import CausalLM
from .documents import Documents, read_documents
from .fingerprint import text_fingerprint
from .sources import HUB_SPLITS
from .special_text import encode_texts
from .token_cache import cached
from .token_rows import TokenRows, make_rows

if TYPE_CHECKING:
    import tokenizers

_VERSION = 2  # of what `tokenize` does


class LanguageData:
    """The splits of a run of a language model, read and checked: `Data` of the set-up.

    Args:
        config: its columns, base and task.
        sources: by split.

    Raises:
        ConfigError: the base is an encoder.
        DataError: a file that can't be used, see `read_documents`.
        FileError: the base isn't found, or has no end-of-text.
    """

    def __init__(self, config: TrainConfig, sources: dict[str, str]) -> None:
        base = lj.models.read_model_config(lj.models.find_base(config.base))
        if not isinstance(base, DecoderConfig):
            raise ConfigError(
                f"`base` {config.base} is a {base.model_type}, an encoder: causal-lm needs a decoder "
                "(GPT-2, Llama, Mistral, Qwen2, Qwen3)."
            )
        self.new_head, self.prior, self.baselines = False, None, {}
        self.task = CausalLM(label_smoothing=config.label_smoothing)
        self._special = lj.models.read_special_tokens(config.base)
        self._packing, self._seed = config.packing, config.seed
        self._documents = {
            split: read_documents(
                source,
                config.columns,
                special=self._special,
                split=HUB_SPLITS[split],
                skip_bad_rows=config.skip_bad_rows,
                escape_special_tokens=config.escape_special_tokens,
            )
            for split, source in sources.items()
        }

    def rows(self, tokenizer: tokenizers.Tokenizer, max_length: int) -> dict[str, TokenRows]:
        """Each split in tokens, packed if the config says so."""
        return {
            name: token_rows(documents, tokenizer, self._special, max_length, packing=self._packing, seed=self._seed)
            for name, documents in self._documents.items()
        }

    def fingerprints(self) -> dict[str, str]:
        """A hash of each split's content."""
        return {
            name: text_fingerprint(
                [documents.format, *([(part.text, part.is_target) for part in parts] for parts in documents.rows)]
            )
            for name, documents in self._documents.items()
        }

    def describe(self) -> str:
        return f"loss on {_LEARNT[self._documents['train'].format]}"

    def notes(self) -> list[str]:
        """What was left out, and what else a user should know of the texts."""
        return [
            f"{split}: {note}"
            for split, texts in self._documents.items()
            for note in (texts.left_out, *texts.notes)
            if note is not None
        ]


_LEARNT = {"text": "every token", "completion": "completions", "chat": "the assistant's answers"}


def token_rows(
    documents: Documents,
    tokenizer: tokenizers.Tokenizer,
    special: lj.models.SpecialTokens,
    max_length: int,
    *,
    packing: bool,
    seed: int = 0,
) -> TokenRows:
    """The rows of a split. Tokens of many texts are kept on disk and found again, see `token_cache`.

    Raises:
        DataError: nothing to be predicted is left.
    """
    rows = cached(
        kind=TokenRows,
        texts=[part.text for parts in documents.rows for part in parts],
        tokenizer=tokenizer,
        settings=(
            f"language {_VERSION} {max_length} {documents.format} {special.end} {special.stops} "
            + " ".join("".join("01"[part.is_target] for part in parts) for parts in documents.rows)
        ),
        make=lambda: tokenize(documents, tokenizer, special, max_length),
    )
    if not rows.rows:
        raise DataError(
            f"{documents.name}: all that was to be predicted lies beyond `max_length`, {max_length} tokens. Raise it."
        )
    return rows.packed(seed=seed) if packing else rows


def tokenize(
    documents: Documents, tokenizer: tokenizers.Tokenizer, special: lj.models.SpecialTokens, max_length: int
) -> TokenRows:
    """One row a text; plain texts that are longer are cut into chunks, others lose their end.

    Each part is tokenized by itself, so that a prompt has the tokens that it will have when a completion is asked for.
    Before a text stand the special tokens that the tokenizer puts there, after it the end-of-text, to be predicted too;
    each unless the text has it already. A rendered conversation has its own. In one, what follows the last special
    token of an answer (a line end, say) is not to be predicted: a model is stopped before.
    """
    tokenizer.no_padding()
    tokenizer.no_truncation()
    begin = leading_tokens(tokenizer) if documents.is_framed else []
    pieces = [part.text for parts in documents.rows for part in parts]
    whole = documents.format == "text"  # whose chunks need all of it
    # One token more than a row holds, so that it is known which are cut.
    starts = iter(encode_texts(tokenizer, pieces, None if whole else max_length + 1))
    specials = {token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}
    specials.add(special.end)
    marks = [mark for token in specials if (mark := tokenizer.id_to_token(token))]
    texts: list[tuple[np.ndarray, np.ndarray]] = []
    short = 0  # texts that were cut, see `encode_texts`, and yet fit
    for parts in documents.rows:
        is_short = False
        ids: list[int] = []
        targets: list[bool] = []
        for part in parts:
            new, rest = next(starts)
            is_short |= rest is not None and len(new) <= max_length
            ends = part.is_target and not documents.is_framed and not (rest and any(mark in rest for mark in marks))
            learnt = _learnt(new, specials) if ends else len(new)
            ids += new
            targets += [part.is_target] * learnt + [False] * (len(new) - learnt)
        if documents.is_framed:
            added = missing_start(begin, ids)
            ids, targets = added + ids, [False] * len(added) + targets
            if not ids or ids[-1] not in special.stops:
                ids, targets = [*ids, special.end], [*targets, True]
        short += is_short and len(ids) <= max_length
        texts.append((np.array(ids, np.int32), np.array(targets, bool)))
    rows = make_rows(texts, max_length, chunk=whole)
    return rows._replace(truncated=rows.truncated + short)


def leading_tokens(tokenizer: tokenizers.Tokenizer) -> list[int]:
    """The special tokens that a tokenizer puts before a text."""
    with refused_if_it_breaks_off("the base"):
        encoding = tokenizer.encode("a")
    count = next((place for place, special in enumerate(encoding.special_tokens_mask) if not special), 0)
    return encoding.ids[:count]


def missing_start(begin: list[int], ids: list[int]) -> list[int]:
    """What to put before a text, so that it begins as the tokenizer has it begin: nothing if it does."""
    return [] if ids[: len(begin)] == begin else begin


def _learnt(ids: list[int], specials: set[int]) -> int:
    last = max((place for place, token in enumerate(ids) if token in specials), default=len(ids) - 1)
    return last + 1
