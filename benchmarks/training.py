"""Speed and memory of the adapter's training step through FLUX.1's full shape, with random weights.

    python3 run.py bench training [--device cuda] [--recipes flux1_dev_24gb flux1_dev_80gb] [--sizes 512 1024]
                                  [--steps 8] [--json]

One step is the recipe's: its precision, checkpointing, compiler, micro-batch and adapter. The towers' features and the
latents are random, so Flux and the adapter are timed. TFLOP/s counts the FLOPs of `sda plan`. MFU is their share of the
card's bf16 peak. `predicted` is the plan's figure for the same step, and predicted / measured seconds is the plan's
error. A run on a GPU over all recipes and sizes replaces benchmarks/training.md. On a CPU only a toy shape is run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch

from ..kernels.adapter import AdapterConfig
from ..kernels.precision import autocast, resolve
from ..kernels.vision.known import KNOWN_TOWERS
from ..kernels.vision.towers import TowerConfig
from ..training.config import from_toml
from ..training.engine import Step, compile_blocks
from ..training.frozen.random_base import random_flux
from ..training.frozen.region_attention import attend_by_region
from ..training.objectives.reconstruct import AdapterObjective, AdapterTraining, Batch, named_hierarchy
from ..training.plan import costs, plan
from ..training.plan.estimate import CARDS, Card
from ..training.stages.adapter_export import build_adapter
from .attention import machine

CONFIGS = Path(plan.__file__).parents[1] / "configs"
RECIPES = ("flux1_dev_24gb", "flux1_dev_80gb")
SIZES = (512, 1024)
TABLE = Path(__file__).with_suffix(".md")
TOY = dict(hidden_size=256, num_heads=2, depth=2, depth_single_blocks=4, axes_dim=[16, 56, 56], context_in_dim=128,
           vec_in_dim=32,
           in_channels=16, patch_size=2, guidance_embed=True)
PUBLISHED = """Published figures of near tasks, for comparison: unsloth's FLUX LoRA on one B200 at 512 px, batch 1: bf16 compiled
4.12 steps/s and 24.7 GB, int8 2.14 steps/s, NF4 1.81 steps/s and 10.4 GB; SimpleTuner's NF4 on a 4090: 1 to 1.5 s a step;
torchtitan's full Flux-dev on four GB200: 491 TFLOP/s and 21.8% MFU a GPU. None of them is this task.
"""


def card() -> tuple[str, Card] | None:
    """The plan's card for this GPU; None where the plan has none."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name().lower()
    return next(((key, it) for key, it in CARDS.items() if key in name), None)


class Case:
    """A recipe's step at one resolution."""

    def __init__(self, recipe: str, size: int, device: torch.device, toy: bool):
        config = from_toml(plan.Config, CONFIGS / f"{recipe}.toml")
        if toy:
            config = replace(config, adapter=replace(config.adapter, width=64, heads=2, layers=2),
                             run=replace(config.run, compile=False))
            if config.base.precision == "bf16":  # a CPU may lack fast bf16
                config = replace(config, base=replace(config.base, precision=resolve("auto", device)))
        self.config, self.size, self.device = config, size, device
        self.flux = random_flux(TOY if toy else costs.FLUX1_DEV, config.base.precision, device)
        attention = attend_by_region(self.flux)
        if config.base.checkpointing:
            self.flux.enable_gradient_checkpointing()
        small = TowerConfig("toy", "dinov2", {}, 56, 14, 32, (0.5,) * 3, (0.5,) * 3)
        towers = [small] if toy else [KNOWN_TOWERS[i] for i in config.vision.ids]
        adapter = build_adapter(config, self.flux.config, towers).to(device)
        if config.run.compile:
            compile_blocks(adapter.layers, self.flux.transformer_blocks, self.flux.single_transformer_blocks)
        settings = AdapterTraining(growth=((1.0, config.adapter.table),), mu="resolution")
        self.objective = AdapterObjective(self.flux, attention, adapter, {}, settings)
        self.micro, side = config.run.micro or config.run.batch, size // 8
        self.batch = Batch(torch.randn(self.micro, 16, side, side, device=device), None,
                           features={t.id: torch.randn(self.micro, t.grid[0] * t.grid[1], t.width, device=device)
                                     for t in towers})
        self.adapter_config: AdapterConfig = adapter.config
        self.optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-5, fused=True)

    def step(self, number: int) -> float:
        step = Step(number, 1000, 0, "bench", self.device, range(self.micro), self.micro)
        with autocast(self.device):
            loss, _ = self.objective.loss(self.batch, step)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def flops(self) -> tuple[float, float]:
        """FLOPs (base, adapter) of one sample."""
        tokens = named_hierarchy(self.config.adapter.table).token_count
        recipe = self.config
        base = costs.flux_flops(self.flux.config, (self.size // 16) ** 2, tokens, recipe.base.checkpointing,
                                recipe.adapter.pooled)
        return sum(base), costs.adapter_flops(self.adapter_config, tokens)


def measure(recipe: str, size: int, device: torch.device, steps: int, toy: bool) -> dict:
    case = Case(recipe, size, device, toy)
    for number in range(2 if toy else 3):  # warm-up: the compiler, the kernels' choices, the optimizer's state
        loss = case.step(number)
    synchronise(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for number in range(steps):
        loss = case.step(3 + number)
    synchronise(device)
    seconds = (time.perf_counter() - start) / steps
    base, adapter = case.flops()
    found = card()
    rate = case.micro * (base + adapter) / seconds / 1e12
    result = {"recipe": recipe, "precision": case.config.base.precision, "size": size, "micro": case.micro,
              "finite": loss == loss,
              "samples_per_second": round(case.micro / seconds, 4), "tflops": round(rate, 4),
              "mfu": None, "predicted": None, "peak_gb": None}
    if device.type == "cuda":
        result["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    if found and not toy:
        estimate = plan.Estimate(replace(case.config, gpu=found[0], gpus=1))
        predicted = case.micro * (base / (found[1].peak * 1e12 * estimate.reached) + adapter
                                  / (found[1].peak * 0.25e12))
        result |= {"mfu": round(rate / found[1].peak, 4), "predicted": round(predicted / seconds, 3)}
    return result


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def table(results: list[dict], failures: dict[tuple[str, int], str], command: str, device: str) -> str:
    lines = [f"{machine(device)}; {date.today()}; `{command}`", "",
             "| recipe | precision | px | samples at once | samples/s | TFLOP/s | MFU | peak GB | predicted / "
             "measured time |",
             "|---|---|---:|---:|---:|---:|---:|---:|---:|"]
    for r in results:
        cells = (r["recipe"], r["precision"], r["size"], r["micro"], f"{r['samples_per_second']:.3g}",
                 f"{r['tflops']:.3g}",
                 *("" if r[k] is None else f"{r[k]:{form}}"
                   for k, form in (("mfu", ".1%"), ("peak_gb", ".1f"), ("predicted", ".2f"))))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += [f"| {recipe} | | {size} | | {reason} | | | | |" for (recipe, size), reason in failures.items()]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="run.py bench training", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), help="names of recipes of the adapter")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="pixels; multiples of 16")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA device here; use --device cpu.")
    device, toy = torch.device(options.device), options.device == "cpu"
    results, failures = [], {}
    for recipe in options.recipes:
        for size in options.sizes:
            try:
                results.append(measure(recipe, size, device, options.steps, toy))
            except torch.cuda.OutOfMemoryError:
                failures[recipe, size] = "does not fit"
            if device.type == "cuda":
                torch.cuda.empty_cache()
    text = table(results, failures, " ".join(["python3 run.py bench training", *argv]), options.device)
    print(("A toy shape: it shows that the benchmark runs and says nothing of FLUX.1.\n\n" if toy else "") + text)
    if not toy and set(RECIPES) <= set(options.recipes) and set(SIZES) <= set(options.sizes):
        head = f"# Training through FLUX.1's full shape\n\n{__doc__.split(chr(10) * 2)[2]}\n\n"
        TABLE.write_text(head + text + "\n" + PUBLISHED, encoding="utf-8")
    if options.json:
        print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
