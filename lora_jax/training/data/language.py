"""The data of a run on a language model: its splits as token sequences, with the tokens to be predicted marked."""

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
from .token_sequences import TokenSequences, make_sequences

if TYPE_CHECKING:
    import tokenizers

_VERSION = 2  # raised when `tokenize` gives other tokens, so that cached ones aren't used


class LanguageData:
    """The splits of a run on a language model, read and checked; implements `RunData`.

    Args:
        config: Columns, base and task.
        sources: The source of each split.

    Raises:
        ConfigError: The base is an encoder.
        DataError: A source can't be used, see `read_documents`.
        FileError: The base isn't found, or has no end-of-text token.
    """

    def __init__(self, config: TrainConfig, sources: dict[str, str]) -> None:
        base = lj.models.read_model_config(lj.models.find_base(config.base))
        if not isinstance(base, DecoderConfig):
            raise ConfigError(
                f"`base` must be a decoder (GPT-2, Llama, Mistral, Qwen2, Qwen3) for the task causal-lm, got the "
                f"{base.model_type} encoder {config.base}."
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

    def sequences(self, tokenizer: tokenizers.Tokenizer, max_length: int) -> dict[str, TokenSequences]:
        """The tokens of each split, packed if the config says so."""
        return {
            name: token_sequences(
                documents, tokenizer, self._special, max_length, packing=self._packing, seed=self._seed
            )
            for name, documents in self._documents.items()
        }

    def fingerprints(self) -> dict[str, str]:
        """A hash of each split's content."""
        return {
            name: text_fingerprint(
                [documents.format, *([(part.text, part.is_target) for part in parts] for parts in documents.texts)]
            )
            for name, documents in self._documents.items()
        }

    def describe(self) -> str:
        return f"loss on {_LEARNED[self._documents['train'].format]}"

    def notes(self) -> list[str]:
        """Notes on skipped rows and on the texts."""
        return [
            f"{split}: {note}"
            for split, texts in self._documents.items()
            for note in (texts.left_out, *texts.notes)
            if note is not None
        ]


_LEARNED = {"text": "every token", "completion": "completions", "chat": "the assistant's answers"}


def token_sequences(
    documents: Documents,
    tokenizer: tokenizers.Tokenizer,
    special: lj.models.SpecialTokens,
    max_length: int,
    *,
    packing: bool,
    seed: int = 0,
) -> TokenSequences:
    """The token sequences of a split. The tokens of many texts are cached on disk, see `token_cache`.

    Raises:
        DataError: No token to be predicted is left after truncation.
    """
    sequences = cached(
        kind=TokenSequences,
        texts=[part.text for parts in documents.texts for part in parts],
        tokenizer=tokenizer,
        settings=(
            f"language {_VERSION} {max_length} {documents.format} {special.end} {special.stops} "
            + " ".join("".join("01"[part.is_target] for part in parts) for parts in documents.texts)
        ),
        make=lambda: tokenize(documents, tokenizer, special, max_length),
    )
    if not sequences.num_sequences:
        raise DataError(
            f"{documents.name}: every token to be predicted lies beyond `max_length`, {max_length} tokens. Increase it."
        )
    return sequences.packed(seed=seed) if packing else sequences


def tokenize(
    documents: Documents, tokenizer: tokenizers.Tokenizer, special: lj.models.SpecialTokens, max_length: int
) -> TokenSequences:
    """One sequence per text. Longer plain texts are cut into chunks, other texts are truncated.

    Each part is tokenized by itself, so that a prompt has the same tokens as when a completion is generated. The
    tokenizer's leading special tokens go before each text and the end-of-text token after it, which is predicted too,
    unless the text already has them. A rendered conversation has its own special tokens; whatever follows the last one
    of an answer (a line end, say) is not predicted, since generation stops before it.
    """
    tokenizer.no_padding()
    tokenizer.no_truncation()
    begin = leading_tokens(tokenizer) if documents.is_framed else []
    pieces = [part.text for parts in documents.texts for part in parts]
    whole = documents.format == "text"  # chunks need all of a text
    # One token more than a sequence holds tells which texts are truncated.
    starts = iter(encode_texts(tokenizer, pieces, None if whole else max_length + 1))
    specials = {token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}
    specials.add(special.end)
    marks = [mark for token in specials if (mark := tokenizer.id_to_token(token))]
    texts: list[tuple[np.ndarray, np.ndarray]] = []
    short = 0  # texts that `encode_texts` cut although the tokens it kept fit
    for parts in documents.texts:
        is_short = False
        ids: list[int] = []
        targets: list[bool] = []
        for part in parts:
            new, rest = next(starts)
            is_short |= rest is not None and len(new) <= max_length
            ends = part.is_target and not documents.is_framed and not (rest and any(mark in rest for mark in marks))
            predicted = _predicted(new, specials) if ends else len(new)
            ids += new
            targets += [part.is_target] * predicted + [False] * (len(new) - predicted)
        if documents.is_framed:
            added = missing_start(begin, ids)
            ids, targets = added + ids, [False] * len(added) + targets
            if not ids or ids[-1] not in special.stops:
                ids, targets = [*ids, special.end], [*targets, True]
        short += is_short and len(ids) <= max_length
        texts.append((np.array(ids, np.int32), np.array(targets, bool)))
    sequences = make_sequences(texts, max_length, chunk=whole)
    return sequences._replace(truncated=sequences.truncated + short)


def leading_tokens(tokenizer: tokenizers.Tokenizer) -> list[int]:
    """The special tokens that a tokenizer puts before a text."""
    with refused_if_it_breaks_off("the base"):
        encoding = tokenizer.encode("a")
    count = next((place for place, special in enumerate(encoding.special_tokens_mask) if not special), 0)
    return encoding.ids[:count]


def missing_start(begin: list[int], ids: list[int]) -> list[int]:
    """The leading tokens `begin` if a text lacks them, otherwise nothing."""
    return [] if ids[: len(begin)] == begin else begin


def _predicted(ids: list[int], specials: set[int]) -> int:
    """Number of tokens up to the last special one; of all if there is none."""
    last = max((place for place, token in enumerate(ids) if token in specials), default=len(ids) - 1)
    return last + 1
