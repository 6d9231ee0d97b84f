"""A tiny decoder with a vocabulary of its tokenizer's size, and a language that it learns in a few steps."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from .tiny_bert import WORDS
from .tiny_decoders import write_tiny_decoder
from .tiny_encoders import byte_level

ANSWERS = {"good": "great plot", "bad": "poor order", "love": "thanks", "broken": "sorry"}


def write_language_base(folder: Path, **config: Any) -> str:
    """A GPT-2 of one layer; `</s>` (2) ends a text."""
    size = byte_level(WORDS).get_vocab_size()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    entries: dict[str, Any] = {"vocab_size": size, "eos_token_id": 2, "n_layer": 1, **config}
    write_tiny_decoder(folder, "gpt2", **entries)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **special}))
    return str(folder)


def write_pairs(path: Path, count: int, *, seed: int = 0) -> str:
    """A question about a word, and the answer that belongs to it."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        word = rng.choice(list(ANSWERS))
        filler = " ".join(rng.choices(("the", "film", "was"), k=rng.randint(0, 3)))
        rows.append(
            {"question": f"{filler} {word}".strip(), "answer": ANSWERS[word], "text": f"{word} {ANSWERS[word]}"}
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
