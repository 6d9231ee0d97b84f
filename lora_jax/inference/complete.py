"""A saved adapter of a language model: texts are scored, and prompts are continued."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np

import lora_jax as lj
from lora_jax.models.checkpoint.tokenizer import refused_if_it_breaks_off
from lora_jax.training.config import check_seed
from lora_jax.training.data.batching import plan_in_order
from lora_jax.training.data.buckets import choose_buckets
from lora_jax.training.data.documents import Documents, Format, format_of
from lora_jax.training.data.language import leading_tokens, missing_start, token_sequences
from lora_jax.training.data.special_text import encode_texts, escape
from lora_jax.training.data.token_sequences import TokenSequences
from lora_jax.training.errors import ConfigError, DataError, TrainingError
from lora_jax.training.examples import Columns
from lora_jax.training.run.evaluate import check_outputs, make_forward, predict_outputs
from lora_jax.training.task import CausalLM
from lora_jax.types import Params

from .classify import load_run_adapter

if TYPE_CHECKING:
    import tokenizers

_BUCKETS = 4  # most lengths that prompts are padded to, with one compiled program each


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How a text is continued; see `lj.models.generate` for the other options.

    Attributes:
        batch_size: Number of prompts per batch.
        seed: Seed of sampling. The samples also depend on the batch that a prompt is in.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    no_repeat_ngram_size: int | None = None
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("batch_size", 1)):
            if type(value := getattr(self, name)) is not int or value < least:
                raise ConfigError(f"`{name}` must be an integer of at least {least}, got {value!r}.")
        check_seed("seed", self.seed)


class Completion(NamedTuple):
    """A generated text.

    Attributes:
        text: The text, without special tokens.
        tokens: Number of tokens, including the end-of-text token.
        ended: Whether the model ended the text, rather than `max_new_tokens`.
    """

    text: str
    tokens: int
    ended: bool


class Completer:
    """A decoder with its parameters and tokenizer.

    Args:
        model: The decoder.
        params: Parameters, adapted or merged.
        tokenizer: The base's tokenizer.
        special: The base's special tokens.
        max_length: Most tokens of a sequence that is scored.
        columns: Columns that it was trained on.
        escape_special_tokens: Whether special tokens spelled out in a prompt are plain text.
    """

    def __init__(
        self,
        model: lj.models.Model,
        params: Params,
        *,
        tokenizer: tokenizers.Tokenizer,
        special: lj.models.SpecialTokens,
        max_length: int,
        columns: Columns,
        escape_special_tokens: bool = False,
    ) -> None:
        self.params = params
        self.special = special
        self.max_length = max_length
        self.columns = columns
        self.escape_special_tokens = escape_special_tokens
        self._config, self._tokenizer = model.config, tokenizer
        # Made once, since JAX compiles each new function again.
        self._apply = lj.adapt(model.apply)
        self._forward = make_forward(self._apply, CausalLM())

    def evaluate(self, documents: Documents) -> tuple[TokenSequences, dict[str, float | None]]:
        """The token sequences of texts (which count what was truncated) and their metrics, see `language_metrics`."""
        sequences = token_sequences(documents, self._tokenizer, self.special, self.max_length, packing=True)
        outputs = predict_outputs(self._forward, self.params, sequences, buckets=(self.max_length,))
        return sequences, CausalLM().measure(check_outputs(outputs), sequences.targets)

    def complete(
        self, prompts: Sequence[str], options: GenerationOptions | None = None, *, form: Format | None = None
    ) -> list[Completion]:
        """Continues prompts, in order.

        Args:
            prompts: Texts as they preceded the completion in training, including the separator; or rendered
                conversations.
            options: How they are continued.
            form: Format of the prompts; that of training if `None`. Special tokens go before all but conversations.

        Raises:
            DataError: A prompt leaves no room within the model's positions.
            ValueError: The options contradict each other, see `lj.models.generate`.
        """
        options = options or GenerationOptions()
        if not prompts:
            return []
        ids = self._prompt_ids(prompts, form or format_of(self.columns))
        lengths = np.array([len(row) for row in ids])
        room = self._room(options)
        if (longest := int(lengths.max())) > room:
            raise DataError(
                f"prompt {int(lengths.argmax()) + 1} has {longest:,} tokens, which with `max_new_tokens` "
                f"{options.max_new_tokens:,} is more than the model's {self._config.max_length:,} positions. Shorten "
                "the prompt, or reduce `max_new_tokens`."
            )
        settings = {name: value for name, value in asdict(options).items() if name not in ("batch_size", "seed")}
        buckets = choose_buckets(lengths, count=_BUCKETS, max_length=room)
        completions: list[Completion | None] = [None] * len(ids)
        plans = plan_in_order(lengths, buckets, batch_size=options.batch_size)
        for number, plan in enumerate(plans):
            batch, mask = np.zeros((2, options.batch_size, plan.length), np.int32)
            for place, row in enumerate(np.resize(plan.indices, options.batch_size)):
                batch[place, : lengths[row]], mask[place, : lengths[row]] = ids[row], 1
            key = jax.random.fold_in(jax.random.key(options.seed), number) if options.temperature else None
            generated = lj.models.generate(
                self._apply, self.params, batch, mask, eos_token_id=self.special.stops, key=key, **settings
            )
            for row, tokens, length in zip(plan.indices, *map(np.asarray, generated), strict=False):
                completions[row] = self._completion(tokens[:length].tolist())
        return [completion for completion in completions if completion is not None]

    def _completion(self, tokens: list[int]) -> Completion:
        with refused_if_it_breaks_off("the base"):
            text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return Completion(text, len(tokens), tokens[-1] in self.special.stops)

    def _prompt_ids(self, prompts: Sequence[str], form: Format) -> list[list[int]]:
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        begin = leading_tokens(self._tokenizer) if form != "chat" else []
        if self.escape_special_tokens and form != "chat":  # a rendered conversation has its own control tokens
            prompts = [escape(prompt, self.special.added) for prompt in prompts]
        ids = [missing_start(begin, ids) + ids for ids, _ in encode_texts(self._tokenizer, prompts)]
        if empty := [row for row, tokens in enumerate(ids, start=1) if not tokens]:
            raise DataError(f"prompt {empty[0]} is empty: generation needs at least one token.")
        return ids

    def _room(self, options: GenerationOptions) -> int:
        """The most tokens of a prompt. Rotary positions have no limit of their own."""
        if not self._config.bounded_positions:
            return 1 << 20
        return self._config.max_length - options.max_new_tokens + 1


def load_completer(
    folder: str | Path,
    *,
    base: str | None = None,
    escape_special_tokens: bool | None = None,
    progress: lj.models.Progress | None = None,
) -> Completer:
    """Loads the adapter of a language model's run for scoring and generation.

    Args:
        folder, base, progress: See `load_run_adapter`.
        escape_special_tokens: See `Completer`; the setting of the training run if `None`.

    Example:
        completer = load_completer("out")
        completer.complete(["name[Blue Spice], eatType[pub]\\n"])[0].text
    """
    loaded = load_run_adapter(folder, base=base, progress=progress)
    saved = loaded.task_file
    if saved.task.kind != "causal-lm":
        raise TrainingError(f"`adapter` {folder} was trained for {saved.task.kind}: use `load_predictor`.")
    return Completer(
        loaded.model,
        loaded.params,
        tokenizer=lj.models.load_tokenizer(base or saved.base),
        special=lj.models.read_special_tokens(base or saved.base),
        max_length=saved.max_length,
        columns=saved.columns,
        escape_special_tokens=saved.escape_special_tokens if escape_special_tokens is None else escape_special_tokens,
    )
