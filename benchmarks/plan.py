"""The error of `sda plan` on the machine at hand: the miniature's adapter step, predicted and measured.

    python3 run.py bench plan [--steps 6] [--json]

The plan divides FLOPs by a speed. Here one case gives the speed. The others show the model's own error: how well FLOPs
alone say how the time grows with tokens, patches, samples and checkpointing. Small cases are slower than their FLOPs. A
run of the default steps replaces benchmarks/plan.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from datetime import date
from pathlib import Path

import torch

from ..training.engine import Step
from ..training.frozen.base import load_flux
from ..training.frozen.region_attention import attend_by_region
from ..training.miniature.evaluation import table
from ..training.objectives.reconstruct import AdapterObjective, AdapterTraining, Batch, load_adapter, named_hierarchy
from ..training.plan import costs

PAGE = Path(__file__).with_suffix(".md")
STEPS = 6
ASSETS = Path(__file__).resolve().parents[1] / "assets" / "miniature"
CASES = tuple((preset, side, micro) for preset in ("global32", "tree128") for side in (16, 32) for micro in (2, 8))
FIRST = ("tree128", 16, 8)  # the case that gives the machine's speed


class Miniature:
    def __init__(self) -> None:
        self.flux = load_flux(ASSETS / "diffusion_models" / "miniature_flux.safetensors", "fp32")
        self.attention = attend_by_region(self.flux)
        path = ASSETS / "semantic_adapters" / "miniature_tree128.safetensors"
        self.adapter = load_adapter(path, torch.device("cpu"))[0].train().requires_grad_(True)

    def seconds(self, preset: str, side: int, micro: int, checkpointing: bool, steps: int) -> float:
        """The median time of a step: forward and backward."""
        self.flux.gradient_checkpointing = False
        if checkpointing:
            self.flux.enable_gradient_checkpointing()
        objective = AdapterObjective(self.flux, self.attention, self.adapter, {},
                                     AdapterTraining(growth=((1.0, preset),)))
        features = {t.id: torch.randn(micro, t.grid[0] * t.grid[1], t.width) for t in self.adapter.config.towers}
        batch = Batch(torch.randn(micro, self.flux.config.in_channels // 4, side, side), None, features=features)
        taken = []
        for number in range(steps + 1):
            start = time.perf_counter()
            objective.loss(batch, Step(number, 100, 0, "bench", torch.device("cpu"), range(micro), micro))[0].backward()
            taken.append(time.perf_counter() - start)
        return sorted(taken[1:])[steps // 2]

    def flops(self, preset: str, side: int, micro: int, checkpointing: bool) -> float:
        tokens = named_hierarchy(preset).token_count
        base = sum(costs.flux_flops(self.flux.config, (side // 2) ** 2, tokens, checkpointing, pooled=False))
        return micro * (base + costs.adapter_flops(self.adapter.config, tokens))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="run.py bench plan", description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args(argv)
    made, results = Miniature(), []
    speed = made.flops(*FIRST, False) / made.seconds(*FIRST, False, options.steps)
    lines = []
    for case in CASES:
        for checkpointing in (False, True):
            flops, seconds = made.flops(*case, checkpointing), made.seconds(*case, checkpointing, options.steps)
            results.append({"case": case, "checkpointing": checkpointing, "ratio": flops / speed / seconds})
            lines.append([case[0], str(case[1]), str(case[2]), "yes" if checkpointing else "no", f"{flops / 1e9:.1f}",
                          f"{flops / speed / seconds:.2f}"])
            print(*lines[-1], sep="  ", file=sys.stderr, flush=True)
    page = "\n".join([
        "# What `sda plan` says of a step, and what it takes",
        "",
        f"{table.machine()}; {date.today()}; `python3 run.py bench plan --steps {options.steps}`",
        "",
        "The miniature's adapter step, forward and backward, in float32: its FLOPs at the speed of one case "
        f"({speed / 1e9:.0f} GFLOP/s: {FIRST[0]}, {FIRST[1]} x {FIRST[1]} latents, {FIRST[2]} samples), over the time "
        "it takes.",
        "",
        *table.rows(["preset", "latent", "samples", "checkpointing", "GFLOP", "predicted / measured"], lines),
        "",
    ])
    print(page)
    if options.steps == STEPS:
        PAGE.write_text(page, encoding="utf-8")
    if options.json:
        print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
