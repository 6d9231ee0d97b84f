"""Predicts labels and numbers with a trained adapter: `Predictor` and `load_predictor`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

import lora_jax as lj
from lora_jax import files
from lora_jax.adapters import read_description
from lora_jax.interop.peft.adapter_config import CONFIG as PEFT_CONFIG
from lora_jax.methods import Method
from lora_jax.models.family import HEAD
from lora_jax.training.data.encoding import Encoded, encode, padding_id
from lora_jax.training.data.labelled import LabelledSequences
from lora_jax.training.data.special_text import special_texts
from lora_jax.training.errors import TrainingError
from lora_jax.training.examples import Examples
from lora_jax.training.run.evaluate import check_outputs, make_forward, predict_outputs
from lora_jax.training.run.step import ModelApply
from lora_jax.training.task import LabelledTask, Regression
from lora_jax.training.task_file import TASK_FILE, TaskFile, read_task
from lora_jax.types import Params

if TYPE_CHECKING:
    import tokenizers


class Prediction(NamedTuple):
    """The prediction for one text.

    Attributes:
        label: Most probable label; for a regression, the number.
        probability: Probability of the label; `None` for a regression.
        probabilities: Probabilities of all labels, in the order of the task's labels; empty for a regression.
    """

    label: str | float
    probability: float | None
    probabilities: tuple[float, ...]


class Predictor:
    """A model with its parameters, tokenizer and task: texts in, labels out.

    Args:
        apply: `apply(params, input_ids, attention_mask, token_type_ids)`, under `lj.adapt` if `params` are adapted.
        params: Parameters, adapted or merged.
        task: The task, which names the outputs.
        tokenizer: The base's tokenizer.
        max_length: Length that longer texts are truncated to, in tokens.
        escape_special_tokens: Whether special tokens spelled out in a text are plain text.
    """

    def __init__(
        self,
        apply: ModelApply,
        params: Params,
        *,
        task: LabelledTask,
        tokenizer: tokenizers.Tokenizer,
        max_length: int,
        escape_special_tokens: bool = False,
    ) -> None:
        self.params = params
        self.task = task
        self.max_length = max_length
        self.escape_special_tokens = escape_special_tokens
        self.special_texts = special_texts(tokenizer)
        self._tokenizer = tokenizer
        self._forward = make_forward(apply, task)
        # The same few shapes for any input, so that later calls compile nothing.
        self._buckets = (*(length for length in (16, 32, 64, 128, 256) if length < max_length), max_length)

    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Encoded:
        examples = Examples("texts", list(texts), None if pairs is None else list(pairs))
        self._tokenizer.encode_special_tokens = self.escape_special_tokens
        return encode(examples, self._tokenizer, self.max_length)

    def outputs(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> np.ndarray:
        """Logits `(texts, labels)`; for a regression, numbers `(texts,)`."""
        return self.encoded_outputs(self.encode(texts, pairs))

    def encoded_outputs(self, encoded: Encoded) -> np.ndarray:
        rows = LabelledSequences(encoded, np.zeros(encoded.num_sequences, np.int32), padding_id(self._tokenizer))
        return check_outputs(predict_outputs(self._forward, self.params, rows, buckets=self._buckets))

    def predict(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[Prediction]:
        """One prediction per text, in order."""
        return self.predict_encoded(self.encode(texts, pairs)) if texts else []

    def predictions(self, outputs: np.ndarray) -> list[Prediction]:
        """The predictions that the outputs stand for, in order."""
        return [self._prediction(row) for row in outputs]

    def predict_encoded(self, encoded: Encoded) -> list[Prediction]:
        """`predict` for texts that `encode` has tokenized, which also counts the truncated ones."""
        return self.predictions(self.encoded_outputs(encoded))

    def evaluate(self, examples: Examples) -> dict[str, float | None]:
        """The metrics of labelled examples; see `Task.measure`."""
        return self.task.measure(self.outputs(examples.texts, examples.pairs), self.task.encode(examples))

    def _prediction(self, output: np.ndarray) -> Prediction:
        if isinstance(self.task, Regression):
            return Prediction(float(output), None, ())
        powers = np.exp(output.astype(np.float64) - output.max())
        probabilities = powers / powers.sum()
        best = int(probabilities.argmax())
        return Prediction(self.task.labels[best], float(probabilities[best]), tuple(map(float, probabilities)))


class RunAdapter(NamedTuple):
    """An adapter on its base.

    Attributes:
        model: The base with a head of the task's size.
        params: Parameters with the adapter's leaves.
        method: Method that it was trained with.
        task_file: Base, task, columns and length.
        folder: Folder of the adapter's files.
    """

    model: lj.models.Model
    params: Params
    method: Method
    task_file: TaskFile
    folder: Path


def load_run_adapter(
    folder: str | Path, *, base: str | None = None, progress: lj.models.Progress | None = None
) -> RunAdapter:
    """Loads the adapter of a run onto its base.

    Args:
        folder: Folder of a run, or the `adapter` folder in it.
        base: The base, if it is no longer where it was in training.
        progress: Callback for reading the base's weights, see `lj.models.load`.
    """
    folder = adapter_folder(folder)
    saved = read_task(folder)
    model = lj.models.load(
        base or saved.base,
        task=saved.task.kind,
        num_labels=saved.task.num_labels,
        dtype=saved.dtype,
        pooling=saved.pooling,
        tie_word_embeddings=False if _has_head(folder) else None,
        new_head=saved.new_head,
        progress=progress,
    )
    limit = model.config.max_length
    if saved.max_length > limit and getattr(model.config, "bounded_positions", True):
        raise TrainingError(
            f"{folder / TASK_FILE}: `max_length` is {saved.max_length:,}, but the base {base or saved.base} has "
            f"{limit:,} positions. The adapter belongs to another base, or the file was changed."
        )
    adapter = lj.load_adapter(folder, model.params)
    return RunAdapter(model, adapter.params, adapter.method, saved, folder)


def _has_head(folder: Path) -> bool:
    """Whether a decoder's head was a leaf of its own, even if the base ties it to the embeddings."""
    description = read_description(folder)
    return HEAD in description["base"] or HEAD in description["tensors"]


def load_predictor(
    folder: str | Path,
    *,
    base: str | None = None,
    escape_special_tokens: bool | None = None,
    progress: lj.models.Progress | None = None,
) -> Predictor:
    """Loads the adapter of a run for prediction, as `lora-jax predict` does.

    Args:
        folder, base, progress: See `load_run_adapter`.
        escape_special_tokens: See `Predictor`; the setting of the training run if `None`.

    Example:
        predictor = load_predictor("out")
        predictor.predict(["where is my order?"])[0].label
    """
    loaded = load_run_adapter(folder, base=base, progress=progress)
    task = loaded.task_file.task
    if not isinstance(task, LabelledTask):
        raise TrainingError(
            f"`adapter` {folder} was trained for {task.kind}, which has no labels: use `load_completer`."
        )
    return Predictor(
        lj.adapt(loaded.model.apply),
        loaded.params,
        task=task,
        tokenizer=lj.models.load_tokenizer(base or loaded.task_file.base),
        max_length=loaded.task_file.max_length,
        escape_special_tokens=(
            loaded.task_file.escape_special_tokens if escape_special_tokens is None else escape_special_tokens
        ),
    )


def adapter_folder(folder: str | Path) -> Path:
    """The folder of an adapter's files: the `adapter` folder in a run's folder, or the folder itself."""
    folder = Path(folder)
    for candidate in (folder / "adapter", folder):
        files.settle(candidate)
        if (candidate / TASK_FILE).is_file():
            return candidate
    hint = ": its run isn't complete; run the same command to resume it" if (folder / "config.yaml").is_file() else ""
    if (folder / PEFT_CONFIG).is_file():
        hint = (
            f": it is a PEFT adapter; convert it with `lora-jax convert --adapter {folder} --to lora_jax --output NEW`"
        )
    raise TrainingError(f"`adapter` {folder} holds no adapter of a run ({TASK_FILE} is missing){hint}.")
