"""The parts that do not learn: the base and its shapes, Flux under a visibility, encoders, text, and painting."""
