"""A hash of a data set's content, by which a run recognizes its data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable


def text_fingerprint(columns: Iterable[object], *more: bytes) -> str:
    """A hash of texts, column by column, and of what else belongs to them as bytes."""
    digest = hashlib.sha256(json.dumps(list(columns)).encode())
    for data in more:
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
