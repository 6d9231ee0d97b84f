"""What the models are built of, in Flax NNX."""
