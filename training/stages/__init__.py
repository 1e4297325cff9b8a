"""The stages of training at FLUX.1's width, which are the same at any other."""
