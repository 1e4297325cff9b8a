"""The training loop: one explicit loop whose whole state is a counter, the trainables, the optimizer and their average.

The batch, noise and timesteps of step s are a pure function of (seed, stage, s), so a resumed run continues the same
sequence. A checkpoint is written to a temporary folder and renamed, so a killed run never leaves half of one.
"""
from __future__ import annotations

import json
import math
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from .config import RunConfig, to_dict, write_toml


class Stage(Protocol):
    """What is trained. `trainables` holds every parameter that may learn; frozen parts live outside it."""

    name: str
    trainables: nn.Module

    def loss(self, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of step `step` and its parts for the log. All randomness comes from `generator` or from the step."""

    def scales(self, step: int) -> dict[str, float]:
        """Learning rates of children of the trainables as shares of the run's; those not named take 1."""

    def validate(self) -> dict[str, float]:
        """Figures on held-out data; called with the averaged weights in place."""

    def export(self, step: int) -> None:
        """Write the file that the nodes load; called with the averaged weights in place."""


def seeded(seed: int, stage: str, step: int, device: torch.device) -> torch.Generator:
    """The random stream of one step, the same on every resume."""
    code = sum(ord(c) * 131 ** i for i, c in enumerate(stage)) % 2 ** 31
    return torch.Generator(device).manual_seed((seed * 1_000_003 + code) * 10_000_019 % 2 ** 40 * 2 ** 20 + step)


def pick_device(name: str) -> torch.device:
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def learning_rate(run: RunConfig, step: int) -> float:
    """Warm-up, plateau, linear decay to zero (the WSD schedule of MiniCPM, arXiv 2404.06395): a plateau can be extended."""
    start = run.max_steps * (1 - run.decay)
    tail = (run.max_steps - step) / max(1.0, run.max_steps - start)
    return run.lr * min(1.0, (step + 1) / max(1, run.warmup), max(0.0, tail))


def compile_blocks(*stacks: nn.ModuleList) -> None:
    """Compile networks block by block: one small graph for each length of the sequence, whatever surrounds it."""
    torch._dynamo.config.recompile_limit = 64
    for stack in stacks:
        for block in stack:
            block.compile(dynamic=False)


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
        """Exchange live and averaged weights; call again to go back."""
        live = dict(self.module.named_parameters())
        for name, value in self.values.items():
            kept = live[name].detach().clone()
            live[name].data.copy_(value)
            value.copy_(kept)


def save_checkpoint(folder: Path, step: int, stage: Stage, optimizer, average: Average, config: Any) -> None:
    target, staged = folder / f"step_{step:08d}", folder / f".writing_{step:08d}"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    state = optimizer.state_dict()["state"]
    slots = {f"{i}.{k}": v if isinstance(v, Tensor) else torch.tensor(v) for i, s in state.items() for k, v in s.items()}
    for name, tensors in (("trainables", stage.trainables.state_dict()), ("average", average.values), ("optimizer", slots)):
        # Copies, because safetensors refuses tied weights (T5's word table has two names).
        save_file({k: v.detach().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()},
                  staged / f"{name}.safetensors")
    record = {"step": step, "stage": stage.name, "average_count": average.count, "config": to_dict(config)}
    (staged / "complete.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    staged.rename(target)
    for old in sorted(folder.glob("step_*"))[:-2]:
        shutil.rmtree(old)


def load_checkpoint(folder: Path, stage: Stage, optimizer, average: Average) -> int:
    """Load the newest complete checkpoint of `folder`; returns its step, 0 when there is none."""
    found = sorted(p for p in folder.glob("step_*") if (p / "complete.json").exists())
    if not found:
        return 0
    record = json.loads((found[-1] / "complete.json").read_text(encoding="utf-8"))
    if record["stage"] != stage.name:
        raise ValueError(f"{folder} holds a run of '{record['stage']}', not of '{stage.name}'; give another --run.out.")
    device = next(stage.trainables.parameters()).device
    stage.trainables.load_state_dict(load_file(found[-1] / "trainables.safetensors", str(device)))
    average.values, average.count = load_file(found[-1] / "average.safetensors", str(device)), record["average_count"]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    flat, state = load_file(found[-1] / "optimizer.safetensors", str(device)), {}
    for key, value in flat.items():
        index, name = key.split(".", 1)
        # The fused optimizer walks parameter and state in memory order, so both need the same strides (channels last).
        like = parameters[int(index)]
        state.setdefault(int(index), {})[name] = torch.empty_like(like).copy_(value) if value.ndim else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return record["step"]


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups for each child of the trainables, named after it: matrices decay; vectors and norms do not."""
    groups = []
    for name, child in module.named_children():
        live = [p for p in child.parameters() if p.requires_grad]
        groups += [{"name": name, "params": [p for p in live if p.ndim >= 2], "weight_decay": weight_decay},
                   {"name": name, "params": [p for p in live if p.ndim < 2], "weight_decay": 0.0}]
    return groups


def train(stage: Stage, run: RunConfig, config: Any) -> bool:
    """Run the stage from its last checkpoint (or from the start) to `run.max_steps`, then export.

    Ctrl-C and SIGTERM let the step end, save and return False; a finished run returns True.
    """
    device = next(stage.trainables.parameters()).device
    optimizer = torch.optim.AdamW(parameter_groups(stage.trainables, run.weight_decay), lr=run.lr,
                                  betas=(0.9, run.beta2), fused=True)
    average = Average(stage.trainables, run.ema)
    checkpoints = run.out / "checkpoints"
    if run.resume == "never" and any(checkpoints.glob("step_*")):
        raise ValueError(f"{run.out} already holds checkpoints; give another --run.out or let --run.resume be auto.")
    start = load_checkpoint(checkpoints, stage, optimizer, average)
    run.out.mkdir(parents=True, exist_ok=True)
    write_toml(config, run.out / "config.toml")
    board, metrics = SummaryWriter(str(run.out)), open(run.out / "metrics.jsonl", "a", encoding="utf-8")
    stop: list[int] = []
    previous = {number: signal.signal(number, lambda number, frame: stop.append(number))
                for number in (signal.SIGTERM, signal.SIGINT)}
    clock, since = time.time(), start

    def log(step: int, values: dict[str, float]) -> None:
        metrics.write(json.dumps({"step": step, "samples": step * run.batch, **values}) + "\n")
        metrics.flush()
        for key, value in values.items():
            board.add_scalar(key, value, step)

    def validate(step: int) -> None:
        average.swap()
        stage.trainables.eval()
        with torch.no_grad():
            figures = {f"validation/{k}": v for k, v in stage.validate().items()}
        stage.trainables.train()
        average.swap()
        log(step, figures)
        print(f"step {step}  " + "  ".join(f"{k.split('/')[1]} {v:.4f}" for k, v in figures.items()), flush=True)

    stage.trainables.train()
    if start:
        print(f"resumed {stage.name} at step {start}", flush=True)
    for step in range(start, run.max_steps):
        scales = stage.scales(step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run, step) * scales.get(group["name"], 1.0)
        with torch.autocast(device.type, torch.bfloat16, enabled=run.precision == "bf16"):
            loss, parts = stage.loss(step, seeded(run.seed, stage.name, step, device))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(stage.trainables.parameters(), run.clip)
        if not math.isfinite(float(norm)):
            raise FloatingPointError(f"The gradient of step {step} is not finite; lower --run.lr and start again: "
                                     f"the last checkpoint in {checkpoints} is good.")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update()
        done = step + 1
        if done % run.log_every == 0:
            speed = (done - since) * run.batch / (time.time() - clock)
            left = (run.max_steps - done) * run.batch / speed / 60
            values = {"loss": loss.item(), **{k: v.item() for k, v in parts.items()}, "lr": optimizer.param_groups[0]["lr"],
                      "gradient_norm": float(norm), "samples_per_second": speed}
            log(done, values)
            shown = "  ".join(f"{k} {values[k]:.4f}" for k in ("loss", *parts))
            print(f"{stage.name} {done}/{run.max_steps}  {shown}  {speed:.1f} samples/s  {left:.1f} min left", flush=True)
            clock, since = time.time(), done
        if done % run.save_every == 0 or done == run.max_steps or stop:
            save_checkpoint(checkpoints, done, stage, optimizer, average, config)
        if stop:
            print(f"stopped by a signal; step {done} is saved in {checkpoints}", flush=True)
            break
        if done % run.validate_every == 0 or done == run.max_steps:
            validate(done)
            clock, since = time.time(), done
    else:
        if start >= run.max_steps:  # asked again for a finished run: what is exported carries its figures
            validate(start)
        average.swap()
        stage.trainables.eval()
        stage.export(run.max_steps)
    board.close()
    metrics.close()
    for number, handler in previous.items():
        signal.signal(number, handler)
    return not stop


def launch(stage: Callable[[Any, torch.device], Stage], config: Any) -> bool:
    """Make the stage of a configuration (with a `run`) on its device and train it; False if it was stopped."""
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    torch.manual_seed(config.run.seed)
    return train(stage(config, pick_device(config.run.device)), config.run, config)
