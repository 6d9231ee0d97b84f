"""The small labelled data set that the quickstart trains on; `SOURCE.md` beside it says what it is."""

from __future__ import annotations

from pathlib import Path

from ..errors import ArgumentError

_SPLITS = ("train", "dev", "test")


def path(split: str) -> Path:
    """Where one split of the demonstration data set lies.

    The file is tab-separated UTF-8 without quoting; its header is `text`, `label`, `topic`. The label says
    what the writer of the message does: question, request, complaint, praise, report, thanks, apology or offer.

    Args:
        split: `"train"` (384 messages), `"dev"` (96) or `"test"` (96).

    Returns:
        The path of the file.

    Raises:
        ValueError: `split` names none of the three.

    Example:
        >>> import lora_jax.data
        >>> lora_jax.data.path("dev").name
        'messages_dev.tsv'
    """
    if split not in _SPLITS:
        raise ArgumentError(f"`split` must be one of {', '.join(map(repr, _SPLITS))}, not {split!r}.")
    return Path(__file__).with_name(f"messages_{split}.tsv")
