"""From an adapter and its base to a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import lora_jax as lj

from .errors import RunFolderError
from .predict import load_adapter


def merge_adapter(
    adapter: str | Path,
    output: str | Path,
    *,
    base: str | None = None,
    max_shard_size: int | str = "5GB",
    progress: lj.models.Progress | None = None,
) -> Path:
    """Folds an adapter into its base and writes the merged model for `transformers`.

    Args:
        adapter: a run's folder, or the `adapter` folder in it.
        output: a new or empty folder.
        base: where the base is now, if not where it was.
        max_shard_size: see `lj.models.save_pretrained`.
        progress: told of the weights read, and then of those written; see `lj.models.load`.

    Returns:
        `output`.

    Raises:
        RunFolderError: `output` holds files.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RunFolderError(f"`output` {output} isn't a new or empty folder: choose another.")
    loaded = load_adapter(adapter, base=base, progress=progress)
    merged = lj.merge_params(loaded.params)
    saved = loaded.task_file
    labels = list(saved.task.labels) or None
    lj.models.save_pretrained(
        output,
        loaded.model,
        merged,
        source=base or saved.base,
        labels=labels,
        max_shard_size=max_shard_size,
        progress=progress,
    )
    return output
