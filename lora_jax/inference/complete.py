"""A saved adapter of a language model: texts are scored, and prompts are continued."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

import lora_jax as lj
from lora_jax.models.checkpoint.tokenizer import refused_if_it_breaks_off
from lora_jax.training.config import check_seed
from lora_jax.training.data.batching import plan_in_order
from lora_jax.training.data.buckets import choose_buckets
from lora_jax.training.data.documents import Documents, Format, format_of
from lora_jax.training.data.language import leading_tokens, missing_start, token_rows
from lora_jax.training.data.special_text import encode_texts, escape
from lora_jax.training.data.token_rows import TokenRows
from lora_jax.training.errors import ConfigError, DataError, TrainingError
from lora_jax.training.examples import Columns
from lora_jax.training.run.evaluate import check_outputs, make_forward, predict_outputs
from lora_jax.training.task import CausalLM

from .classify import load_adapter

if TYPE_CHECKING:
    import tokenizers

_BUCKETS = 4  # lengths that prompts are padded to: one compiled program each


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How a text is continued, see `lj.models.generate`.

    Attributes:
        batch_size: prompts at once.
        seed: of the drawing; what is drawn depends on the batch that a prompt is in.
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
                raise ConfigError(f"`{name}` is {value!r}, and a whole number of at least {least} is expected.")
        check_seed("seed", self.seed)


class Completion(NamedTuple):
    """What was written.

    Attributes:
        text: without special tokens.
        tokens: how many, the end-of-text included.
        ended: whether the model ended the text, or `max_new_tokens` did.
    """

    text: str
    tokens: int
    ended: bool


class Completer:
    """A decoder with its parameters and tokenizer.

    Args:
        model: the decoder.
        params: its parameters, adapted or merged.
        tokenizer, special: of the base.
        max_length: the most tokens of a row that is scored.
        columns: that it was trained on.
        escape_special_tokens: Whether special tokens that a prompt spells out are plain text.
    """

    def __init__(
        self,
        model: lj.models.Model,
        params: Any,
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
        # Made once: another function would be compiled anew.
        self._apply = lj.adapt(model.apply)
        self._forward = make_forward(self._apply, CausalLM())

    def evaluate(self, documents: Documents) -> tuple[TokenRows, dict[str, float | None]]:
        """The metrics of texts, see `language_metrics`, and their rows, for what was cut."""
        rows = token_rows(documents, self._tokenizer, self.special, self.max_length, packing=True)
        outputs = predict_outputs(self._forward, self.params, rows, buckets=(self.max_length,))
        return rows, CausalLM().measure(check_outputs(outputs), rows.targets)

    def complete(
        self, prompts: Sequence[str], options: GenerationOptions | None = None, *, form: Format | None = None
    ) -> list[Completion]:
        """Continues prompts, in order.

        Args:
            prompts: texts as they stood before the completion in training, separator included; rendered conversations.
            options: how.
            form: what the prompts are; as in training if `None`. Special tokens go before all but conversations.

        Raises:
            DataError: a prompt that leaves no room within the model's positions.
            ValueError: options that don't go together, see `lj.models.generate`.
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
                "it, or ask for less."
            )
        settings = {name: value for name, value in asdict(options).items() if name not in ("batch_size", "seed")}
        buckets = choose_buckets(lengths, count=_BUCKETS, max_length=room)
        completions: list[Completion | None] = [None] * len(ids)
        plans = plan_in_order(lengths, buckets, batch_size=options.batch_size)
        for number, plan in enumerate(plans):
            batch, mask = np.zeros((2, options.batch_size, plan.length), np.int32)
            for place, row in enumerate(np.resize(plan.rows, options.batch_size)):
                batch[place, : lengths[row]], mask[place, : lengths[row]] = ids[row], 1
            key = jax.random.fold_in(jax.random.key(options.seed), number) if options.temperature else None
            generated = lj.models.generate(
                self._apply, self.params, batch, mask, eos_token_id=self.special.stops, key=key, **settings
            )
            for row, tokens, length in zip(plan.rows, *map(np.asarray, generated), strict=False):
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
        if self.escape_special_tokens and form != "chat":  # a rendered conversation has control tokens of its own
            prompts = [escape(prompt, self.special.added) for prompt in prompts]
        ids = [missing_start(begin, ids) + ids for ids, _ in encode_texts(self._tokenizer, prompts)]
        if empty := [row for row, tokens in enumerate(ids, start=1) if not tokens]:
            raise DataError(f"prompt {empty[0]} is empty: one token at least is needed to go on from.")
        return ids

    def _room(self, options: GenerationOptions) -> int:
        """The most tokens of a prompt. Rotary positions go on beyond those that a model was trained with."""
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
    """The adapter of a language model's run, ready to score and to write.

    Args:
        folder, base, progress: As for `load_adapter`.
        escape_special_tokens: See `Completer`; as in training if `None`.

    Example:
        completer = load_completer("out")
        completer.complete(["name[Blue Spice], eatType[pub]\\n"])[0].text
    """
    loaded = load_adapter(folder, base=base, progress=progress)
    saved = loaded.task_file
    if saved.task.kind != "causal-lm":
        raise TrainingError(f"`adapter` {folder} is of a {saved.task.kind}: `load_predictor` is for it.")
    return Completer(
        loaded.model,
        loaded.params,
        tokenizer=lj.models.load_tokenizer(base or saved.base),
        special=lj.models.read_special_tokens(base or saved.base),
        max_length=saved.max_length,
        columns=saved.columns,
        escape_special_tokens=saved.escape_special_tokens if escape_special_tokens is None else escape_special_tokens,
    )
