"""What is asked of what learns: to reconstruct a picture, to edit an embedding, and how both are drawn and
augmented."""
