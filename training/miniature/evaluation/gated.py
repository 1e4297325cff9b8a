"""The gates in the harness: the picture's patches read the source by their gate, as a row of the batch or as a trained reference."""
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ....kernels.change_map import changed
from ....kernels.embedding import SemanticEmbedding
from ....kernels.gate import gate
from .decoder import GROW, MAPPED, STEPS, THRESHOLD, Decoder, Way

STRENGTH = 1.0  # of the gate


def gate_rows(decoder: Decoder, edited: SemanticEmbedding, change: Tensor, strength: float = STRENGTH) -> np.ndarray:
    """From noise. A second row of the batch holds the source with the same noise, under its own embedding; in every block
    the patches outside of the change mask read it."""
    gates = gate(changed(change, THRESHOLD, GROW), strength, 0.0, 1.0)

    def work(rows: slice) -> Tensor:
        source, noise, before, after, own = decoder.on_device(rows, decoder.latents, decoder.noise, decoder.own.tokens,
                                                              edited.tokens, gates)
        x = noise
        with decoder.system.attention.reading(own):
            for now, later in decoder.steps():
                both = torch.cat([x, (1 - now) * source + now * noise])
                x = x + (later - now) * decoder.velocity(both, now, torch.cat([after, before]))[:len(x)]
        return x

    return decoder.paint(work)


def gate_lora(decoder: Decoder, edited: SemanticEmbedding) -> np.ndarray:
    """From noise, by Flux with the gate's LoRA: the source's clean patches stand behind the picture's, and all of these read them.
    What stays the LoRA tells by the embedding."""
    system = decoder.system
    gates, regions = torch.ones(len(decoder.latents), *system.grid), system.beside(edited)

    def work(rows: slice) -> Tensor:
        source, x, tokens, own = decoder.on_device(rows, decoder.latents, decoder.noise, edited.tokens, gates)
        with system.attention.beside(own, regions):
            for now, later in decoder.steps():
                x = x + (later - now) * system.velocity(x, now, tokens, source)
        return x

    return decoder.paint(work)


GATED = (Way("gate_rows", lambda d: 2 * STEPS + MAPPED, lambda d, edited, change: gate_rows(d, edited, change)),
         Way("gate_lora", lambda d: STEPS, lambda d, edited, change: gate_lora(d, edited)))
