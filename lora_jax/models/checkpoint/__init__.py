"""Hugging Face checkpoints: the hub, names, weight files, tokenizers."""
