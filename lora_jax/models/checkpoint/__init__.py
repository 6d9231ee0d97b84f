"""Hugging Face checkpoints: the hub, tensor names, weight files and tokenizers."""
