"""Fit: the tokens of an embedding are optimised through the frozen Flux until it repaints a picture.

No encoder and no checkpoint of ours is needed. The loss is that of Flux's training (flow matching, arXiv 2210.02747)
with the picture's latent as the only sample: x_t = (1 - t) x_0 + t noise, target noise - x_0. Adam (arXiv 1412.6980)
moves the tokens, measured in deviations of the text space, so that one rate fits every channel and every base. The
result is the average of the latest iterates (Polyak and Juditsky 1992), which is good at any step: a budget in minutes
and an interruption cost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .embedding import SemanticEmbedding
from .text_space import TextSpace, length

Velocity = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(x [B, C, H, W], t [B], tokens [B, T, D], pooled [B, P] or None) -> noise - x_0 as Flux predicts it, [B, C, H, W],
differentiable in tokens and pooled."""

ORDERS = ("coarse first", "all levels")
_BETAS, _EPSILON = (0.9, 0.99), 1e-8
_GOLDEN = (math.sqrt(5) - 1) / 2
_GROWN = 0.4  # share of the steps after which all levels learn
_SETTLING = 50  # steps after which the rate begins to fall, with the root of their number
_RECENT = 0.1  # share of the steps so far that the average reaches back over


@dataclass(frozen=True)
class FitSettings:
    """How an embedding is fitted.

    steps: number of optimisation steps, each one forward and one backward of Flux.
    rate: step of Adam, in deviations of the text space.
    order: "coarse first" lets level after level learn over the first 40% of the steps, "all levels" all from the start.
    pooled: whether the pooled vector is fitted as well.
    longest: how long a token may become, in deviations a channel, unless it starts out longer. Texts have 1 on average;
        inf does not hold the tokens to their space.
    shift: mu of the base's time shift; every second time is drawn with it, the others without.
    seed: of the noise and of the times.
    """

    steps: int = 100
    rate: float = 0.2
    order: str = "all levels"
    pooled: bool = False
    longest: float = 1.0
    shift: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"A fit needs at least one step, not {self.steps}.")
        if not 0 < self.rate <= 1:
            raise ValueError(f"The rate of a fit is above 0 and at most 1 deviation a step, not {self.rate}: 0.2 is usual.")
        if not self.longest > 0:
            raise ValueError(f"The length that tokens may have is above 0 deviations, not {self.longest}: texts have 1.")
        if self.order not in ORDERS:
            raise ValueError(f"There is no order {self.order!r}: use one of {', '.join(ORDERS)}.")


class Fit:
    """One fit of a batch of pictures, step by step. Every picture has tokens of its own.

    start: the embedding [B, T, D] to begin with; its boxes, levels and strengths stay.
    space: where the text encoder's outputs lie; the tokens never leave it (`TextSpace.hold`).
    """

    def __init__(self, start: SemanticEmbedding, space: TextSpace, settings: FitSettings) -> None:
        if start.width != space.width:
            raise ValueError(
                f"The embedding has width {start.width} and the text space {space.width}: take both from the same model."
            )
        if settings.pooled and start.pooled is None:
            raise ValueError("This embedding has no pooled vector to fit: start from a prompt, or leave the pooled vector out.")
        self.start, self.space, self.settings = start, space, settings
        self.count = 0
        self.losses: list[float] = []
        tokens = space.normalise(start.tokens.float())
        self._longest = length(tokens).clamp_min(settings.longest)
        self._values = [tokens]
        if settings.pooled:
            self._values.append(start.pooled.float().clone())
            self._scale = start.pooled.float().std().clamp_min(1e-3)
        self._averages = [value.clone() for value in self._values]
        self._moments = [(torch.zeros_like(value), torch.zeros_like(value)) for value in self._values]

    @property
    def done(self) -> bool:
        return self.count >= self.settings.steps

    def tokens(self) -> tuple[Tensor, Tensor | None]:
        """(tokens [B, T, D], pooled [B, P] or None) float32 as they stand, averaged."""
        pooled = self._averages[1] if self.settings.pooled else self.start.pooled
        return self.space.denormalise(self._averages[0]), pooled

    def result(self) -> SemanticEmbedding:
        """The embedding as it stands."""
        tokens, pooled = self.tokens()
        source = {**self.start.source, "fit": {"steps": self.count, "loss": self.recent_loss()}}
        return replace(self.start, tokens=tokens, pooled=pooled, source=source)

    def recent_loss(self) -> float | None:
        """Mean loss of the latest fifth of the steps; None before the first."""
        if not self.losses:
            return None
        recent = self.losses[-max(1, len(self.losses) // 5) :]
        return sum(recent) / len(recent)

    def step(self, latents: Tensor, velocity: Velocity) -> float:
        """One step on latents [B, C, H, W] as Flux takes them. Returns the loss, the mean squared error over all pixels.

        ValueError where the loss is not finite; the values stay as they were.
        """
        loss, gradients = self.gradients(latents, velocity)
        if not math.isfinite(loss):
            raise ValueError(
                f"The fit broke down at step {self.count + 1} (the loss is {loss}): take a smaller rate, or weights in bf16."
            )
        self.count += 1
        self.losses.append(loss)
        learning = self._learning()
        rate = self.settings.rate / math.sqrt(1 + self.count / _SETTLING)
        for place, gradient in enumerate(gradients):
            gradient = gradient.float()
            first, second = self._moments[place]
            first.lerp_(gradient, 1 - _BETAS[0])
            second.lerp_(gradient.square(), 1 - _BETAS[1])
            size = second / (1 - _BETAS[1] ** self.count)
            move = first / (1 - _BETAS[0] ** self.count) / (size.sqrt() + _EPSILON)
            if place == 0:
                moved = self._values[0] - rate * move * learning[:, None]
                self._values[0] = self.space.hold(moved, self._longest)
            else:
                self._values[1] = self._values[1] - rate * self._scale * move
            share = max(1 / self.count, 1 / (1 + _RECENT * self.count))
            self._averages[place] = self._averages[place].lerp(self._values[place], share)
        return loss

    def gradients(self, latents: Tensor, velocity: Velocity) -> tuple[float, list[Tensor]]:
        """(loss, gradients by the normalised tokens and, where it is fitted, the pooled vector) at the current step."""
        values = [value.clone().requires_grad_() for value in self._values]
        loss = self.loss(latents, velocity, values)
        # Of the sum over pictures, so that a picture's gradient does not depend on how many there are.
        gradients = torch.autograd.grad(loss * len(latents), values)
        return loss.item(), list(gradients)

    def loss(self, latents: Tensor, velocity: Velocity, values: list[Tensor]) -> Tensor:
        """The loss at the current step's noise and times for normalised tokens [B, T, D] and, where fitted, pooled."""
        noise, t = self.draw(latents)
        x = latents + t[:, None, None, None] * (noise - latents)
        pooled = values[1] if self.settings.pooled else self.start.pooled
        found = velocity(x, t, self.space.denormalise(values[0]), pooled)
        return (found.float() - (noise - latents)).square().mean()

    def draw(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """(noise like the latents, times [B] in (0, 1)) of the current step: a pure function of seed and step.

        All pictures get the same, so that a picture's fit does not depend on what is fitted beside it. The times walk
        through (0, 1) by the golden ratio, which covers it evenly at any number of steps. Noise comes in pairs of
        opposite sign.
        """
        pair, second = divmod(self.count, 2)
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + pair)
        noise = torch.randn(latents.shape[1:], generator=generator) * (-1 if second else 1)
        offset = float(torch.rand((), generator=torch.Generator().manual_seed(self.settings.seed)))
        u = (offset + self.count * _GOLDEN) % 1
        if second:
            factor = math.exp(self.settings.shift)
            u = factor * u / (1 + (factor - 1) * u)
        t = latents.new_full((len(latents),), min(max(u, 0.005), 0.995))
        return noise.to(latents).expand_as(latents), t

    def _learning(self) -> Tensor:
        """[T] 1 for the tokens that learn now, 0 for those of levels whose turn has not come."""
        levels = self.start.levels
        present = levels.unique()
        if self.settings.order == "all levels" or len(present) == 1:
            return torch.ones_like(levels, dtype=torch.float32)
        share = self.count / (_GROWN * self.settings.steps)
        turn = present[min(len(present) - 1, int(share * len(present)))]
        return (levels <= turn).float()
