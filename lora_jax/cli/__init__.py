"""The `lora-jax` commands: one file each, `main` dispatches."""
