"""The cost of a training, before it starts."""
