"""The parts of the models, in Flax NNX."""
