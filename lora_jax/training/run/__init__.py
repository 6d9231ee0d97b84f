"""One run: its setup, step, loop, evaluation, checkpoints and folder."""
