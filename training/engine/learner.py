"""From gradients to weights: the schedule, the optimizer, the average, and the module that the processes share."""
from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ...kernels.precision import autocast
from ..config import RunConfig
from .stage import Stage, Step
from .world import World


def learning_rate(run: RunConfig, step: int) -> float:
    """Learning rate of a step: warm-up, plateau, linear decay to zero (the WSD schedule of MiniCPM, arXiv 2404.06395).
    The plateau can be extended."""
    start = run.max_steps * (1 - run.decay)
    tail = (run.max_steps - step) / max(1.0, run.max_steps - start)
    return run.lr * min(1.0, (step + 1) / max(1, run.warmup), max(0.0, tail))


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups for each child of the trainables, named after it: matrices decay; vectors and norms do not."""
    groups = []
    for name, child in module.named_children():
        live = [p for p in child.parameters() if p.requires_grad]
        groups += [{"name": name, "params": [p for p in live if p.ndim >= 2], "weight_decay": weight_decay},
                   {"name": name, "params": [p for p in live if p.ndim < 2], "weight_decay": 0.0}]
    return groups


class Average:
    """Exponential moving average of the trainables, with the usual warm-up of its decay."""

    def __init__(self, module: nn.Module, decay: float):
        self.module, self.decay, self.count = module, decay, 0
        self.values = {k: v.detach().clone().float() for k, v in module.named_parameters() if v.requires_grad}

    @torch.no_grad()
    def update(self) -> None:
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        live = dict(self.module.named_parameters())
        names = list(self.values)
        torch._foreach_lerp_([self.values[n] for n in names], [live[n].detach().float() for n in names], 1 - decay)

    def swap(self) -> None:
        """Exchange live and averaged weights. A second call restores them."""
        live = dict(self.module.named_parameters())
        for name, value in self.values.items():
            kept = live[name].detach().clone()
            live[name].data.copy_(value)
            value.copy_(kept)


class Objective(nn.Module):
    """The stage's loss as a module over its trainables, so that DistributedDataParallel sees their forward."""

    def __init__(self, stage: Stage):
        super().__init__()
        self.trainables, self.stage_loss = stage.trainables, stage.loss

    def forward(self, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        loss, parts = self.stage_loss(step)
        return loss, {name: part.detach() for name, part in parts.items()}


class Learner:
    """The trainables with their optimizer, their average and, among several processes, their shared gradients."""

    def __init__(self, stage: Stage, run: RunConfig, world: World):
        self.stage, self.run, self.world = stage, run, world
        self.optimizer = torch.optim.AdamW(parameter_groups(stage.trainables, run.weight_decay), lr=run.lr,
                                           betas=(0.9, run.beta2), fused=True)
        self.average = Average(stage.trainables, run.ema)
        self.micro = world.share(run.batch, run.micro)
        self.open: set[str] | None = None

    def set_rates(self, number: int) -> None:
        """Set the learning rates of a step. Where a child of the trainables begins or ceases to learn, every process
        makes the module anew: the scales are a function of the step alone."""
        scales = self.stage.scales(number)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.run, number) * scales.get(group["name"], 1.0)
        learning = {g["name"] for g in self.optimizer.param_groups if scales.get(g["name"], 1.0) > 0}
        if learning != self.open:
            self.open = learning
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.requires_grad_(group["name"] in learning)
            self.objective = self.world.data_parallel(Objective(self.stage))

    def steps(self, number: int) -> list[Step]:
        """This process's micro-batches of a step."""
        run = self.run
        return [Step(number, run.planned, run.seed, self.stage.name, self.world.device, positions, run.batch)
                for positions in self.micro]

    def gradients(self, steps: list[Step],
                  stop: Callable[[], bool] = lambda: False) -> tuple[dict[str, float], float] | None:
        """Forward and backward of the micro-batches. Returns (this process's mean loss and its parts, the gradient norm
        over all processes before clipping). `stop` is asked before each micro-batch and answers the same in all
        processes. Where it says so, the result is None and the weights are those of the step before."""
        run, device = self.run, self.world.device
        sums: dict[str, Tensor] = {}
        for n, step in enumerate(steps):
            if stop():
                self.clear()
                return None
            alone = self.world.size == 1 or n == len(steps) - 1
            with nullcontext() if alone else self.objective.no_sync():
                with autocast(device, run.precision):
                    loss, parts = self.objective(step)
                (loss / len(steps)).backward()
            for name, value in {"loss": loss.detach(), **parts}.items():
                sums[name] = sums.get(name, 0) + value.double()
        norm = nn.utils.clip_grad_norm_(self.stage.trainables.parameters(), run.clip)
        numbers = torch.stack([*sums.values(), norm.double() * len(steps)]).tolist()
        *means, norm = [x / len(steps) for x in numbers]
        return dict(zip(sums, means)), norm

    def rates(self) -> dict[str, float]:
        """The learning rate of each child of the trainables."""
        return {group["name"]: group["lr"] for group in self.optimizer.param_groups}

    def step(self) -> None:
        self.optimizer.step()
        self.average.update()

    def clear(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
