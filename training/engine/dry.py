"""--dry-run: print settings, parameters and memory by part, and buckets; run one step; write nothing."""
from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..config import to_toml
from .learner import Learner
from .run_folder import peak_memory
from .stage import Stage
from .world import World


def parts_of(stage: Stage) -> Iterator[tuple[str, nn.Module, bool]]:
    """(name, module, whether it learns) of the trainables' children and of the stage's frozen parts."""
    for name, child in stage.trainables.named_children():
        yield name, child, True
    for name, module in getattr(stage, "frozen", {}).items():
        yield name, module, False


def table(stage: Stage) -> str:
    """Parameters and memory of each part. A part that learns also needs its gradient, Adam's two moments and the
    average."""
    lines = [f"{'part':24}{'parameters':>16}{'learning':>16}{'weights':>14}{'training':>14}"]
    total = [0, 0, 0, 0]
    seen: set[int] = set()
    for name, module, learns in parts_of(stage):
        own = [p for p in module.parameters() if id(p) not in seen]
        seen |= {id(p) for p in own}
        live = [p for p in own if p.requires_grad and learns]
        row = [sum(p.numel() for p in own), sum(p.numel() for p in live), sum(p.nbytes for p in own),
               sum(3 * p.nbytes + 4 * p.numel() for p in live)]
        total = [a + b for a, b in zip(total, row)]
        lines.append(line(name, row))
    return "\n".join([*lines, line("total", total)])


def line(name: str, row: list[int]) -> str:
    return f"{name:24}{row[0]:>16,}{row[1]:>16,}{row[2] / 2 ** 20:>10,.1f} MiB{row[3] / 2 ** 20:>10,.1f} MiB"


def dry_run(stage: Stage, config: Any, world: World) -> bool:
    """Print everything on the first process. Every process runs the step."""
    say = print if world.main else lambda *words: None
    say(to_toml(config))
    say(table(stage))
    if hasattr(stage, "report"):
        say(f"\n{stage.report()}")
    learner = Learner(stage, config.run, world)
    learner.set_rates(0)
    clock = time.perf_counter()
    parts, norm = learner.gradients(learner.steps(0))
    learner.step()
    parts = dict(zip(parts, world.mean(list(parts.values()))))
    say(f"\nthe first step, of {config.run.batch} samples on {world.size} x {world.device.type}, in "
        f"{len(learner.micro)} micro-batches each: "
        + "  ".join(f"{k} {v:.4f}" for k, v in parts.items()) + f"  gradient norm {norm:.4f}, "
        f"{time.perf_counter() - clock:.1f} s, at most {peak_memory(world.device):.2f} GiB "
        "(later ones may take more tokens and larger pictures: `sda plan` knows the fullest)")
    return True
