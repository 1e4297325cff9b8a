"""The objectives: reconstruct a picture, edit an embedding, and how samples are drawn and augmented."""
