"""Attribute edits in the harness: the nodes' steering (kernels/steering.py) on the modules of diffusers' Flux."""
from __future__ import annotations

import threading

import torch
from torch import Tensor
from torch.nn.functional import pad

from ....kernels.attention import Regions
from ....kernels.steering import Push, Steering
from ....kernels.visibility import region_bias
from .attention import within
from .decoder import Decoder


class Steered:
    """A decoder's Flux whose forwards can be steered. Its hooks are in place as long as the context lasts, and steer only the
    thread that asks: every core paints its own batches."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self._here = decoder, threading.local()
        self._handles: list = []

    def __enter__(self) -> Steered:
        flux, keep = self.decoder.system.flux, self._handles.append
        for index, block in enumerate(flux.transformer_blocks):
            keep(block.attn.norm_q.register_forward_hook(lambda _, args, out: self._ask("hear", out.transpose(1, 2))))
            keep(block.attn.norm_added_k.register_forward_hook(lambda _, args, out: self._ask("say", out.transpose(1, 2))))
            keep(block.attn.to_out[0].register_forward_hook(
                lambda _, args, out, index=index: self._ask("steer", index, out)))
        for module in (*flux.single_transformer_blocks, flux.norm_out):
            keep(module.register_forward_pre_hook(self._own, with_kwargs=True))
        return self

    def __exit__(self, *_) -> None:
        while self._handles:
            self._handles.pop().remove()

    def velocity(self, x: Tensor, time: float, tokens: Tensor, words: tuple[Tensor, Tensor], push: Push, record=None) -> Tensor:
        """What Flux predicts of latents x [B, C, h, w] under tokens [B, T, D] of the sources' layout, pushed along one direction.
        words: texts [B, L, D] of the attributes and of empty prompts."""
        count, length = len(x), tokens.shape[1]
        system, pads = self.decoder.system, [length - each.shape[1] for each in words]
        texts = torch.cat([tokens, *(pad(each, (0, 0, before, 0)) for each, before in zip(words, pads))])
        steering = Steering(count, count, [0], [push], pads, push.where.shape[1], record)
        with within(self._here, steering=steering), system.attention.under(self._regions(count, length, pads)):
            return system.velocity(x.repeat(len(texts) // count, 1, 1, 1), time, texts)

    def _regions(self, count: int, length: int, pads: list[int]) -> Regions:
        """The layout for the painted rows; companions see their own text alone, which comes last."""
        own, system = self.decoder.own, self.decoder.system
        grid = tuple(side // 2 for side in system.latent_shape[1:])
        painted = region_bias(own.boxes, own.strengths, grid, length)
        rows = [painted.expand(count, -1, -1)]
        for before in pads:
            bias = torch.zeros_like(painted)
            bias[:, :before] = -torch.inf
            rows.append(bias.expand(count, -1, -1))
        return Regions(torch.cat(rows).to(system.device))

    def _ask(self, what: str, *arguments):
        steering = getattr(self._here, "steering", None)
        return None if steering is None else getattr(steering, what)(*arguments)

    def _own(self, _, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        steering = getattr(self._here, "steering", None)
        if steering is None:
            return args, kwargs
        return tuple(map(steering.own, args)), {key: steering.own(value) for key, value in kwargs.items()}
