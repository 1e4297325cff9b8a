"""Checkpoints that are whole or absent: written to a staging folder, sealed by complete.json with every file's hash,
and then renamed."""
from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..config import RunConfig, resolve_precisions, to_dict
from .learner import Learner
from .sealed import found, newest_whole, plain, read_record, sync, write_record, write_tensors


def flat(data: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as {dotted key: value}."""
    if not isinstance(data, dict):
        return {prefix[:-1]: data}
    return {k: v for name, part in data.items() for k, v in flat(part, f"{prefix}{name}.").items()}


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field]]:
    """(dotted key, value, field) of a configuration and its tables."""
    for field in dataclasses.fields(config):
        value, key = getattr(config, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{key}.")
        else:
            yield key, value, field


def began_with(run: RunConfig) -> dict:
    """The configuration in the checkpoints of a run; {} for a new run."""
    for _, folder in reversed(found(run.out / "checkpoints")):
        with contextlib.suppress(ValueError, FileNotFoundError):  # a torn checkpoint is passed over for another one
            return read_record(folder)["config"]
    return {}


def settle(config: Any, device: torch.device) -> Any:
    """The configuration of a stage with every open choice decided. In a resumed run `plan_steps` and every precision
    are those that the run began with. In a new run they are all of its steps and what the device computes fast."""
    run, began = config.run, began_with(config.run)
    first = began.get("run", {})
    steps = run.plan_steps or first.get("plan_steps") or first.get("max_steps") or run.max_steps
    return resolve_precisions(dataclasses.replace(config, run=dataclasses.replace(run, plan_steps=steps)), device,
                              began)


def is_free(value: Any, field: dataclasses.Field) -> bool:
    """Whether a resumed run may change the field (config.free)."""
    paths = value if isinstance(value, tuple) and value else (value,)
    return field.metadata.get("free", False) or all(isinstance(v, Path) for v in paths)


def differences(old: dict, new: dict) -> dict[str, str]:
    """{key: "old -> new"} of two flat dicts."""
    return {k: f"{old.get(k)} -> {new.get(k)}" for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)}


class Checkpoints:
    """The checkpoints of a run folder. One process writes; all of them read."""

    def __init__(self, learner: Learner, config: Any):
        self.learner, self.config, self.world = learner, config, learner.world
        self.folder = config.run.out / "checkpoints"

    def start(self) -> int:
        """Load the newest whole checkpoint; returns its step, 0 for a new run.

        Raises ValueError where the checkpoint is of another stage, base, data plan or configuration, and shows the
        difference.
        """
        if self.config.run.resume == "never" and found(self.folder):
            raise ValueError(f"{self.config.run.out} already holds checkpoints; give another --run.out or let "
                             "--run.resume be auto.")
        newest, problem = None, None
        if self.world.main:
            try:
                newest = newest_whole(self.folder)
            except ValueError as error:
                problem = str(error)
        newest, problem = self.world.broadcast((newest, problem))
        if problem:
            raise ValueError(problem)
        if newest is None:
            return 0
        record = read_record(newest)
        self.compare(record)
        self.load(newest, record)
        return record["step"]

    def comfort(self) -> str:
        """A sentence about the checkpoints for a run that ends early."""
        return f"The last checkpoint in {self.folder} is good" if found(self.folder) else "There is no checkpoint yet"

    def compare(self, record: dict) -> None:
        stage = self.learner.stage
        if record["stage"] != stage.name:
            raise ValueError(f"{self.folder} holds a run of '{record['stage']}', not of '{stage.name}'; give another "
                             "--run.out.")
        new, fields = flat(to_dict(self.config)), list(leaves(self.config))
        # A key that an older checkpoint lacks had its default value.
        old = {k: f.default for k, _, f in fields if k in new and f.default is not dataclasses.MISSING}
        old = {**plain(old), **flat(record["config"])}
        old["run.plan_steps"] = old["run.plan_steps"] or old["run.max_steps"]
        new["run.plan_steps"] = new["run.plan_steps"] or old["run.plan_steps"]
        changed = differences(old, new)
        free = {key for key, value, field in fields if is_free(value, field)}
        wrong = {**{k: v for k, v in changed.items() if k not in free},
                 **differences(flat(record["identity"]), flat(plain(stage.identity)))}
        if wrong:
            raise ValueError(f"{self.folder} holds a run of other settings; give them again, or another --run.out. "
                             "What differs: "
                             + "; ".join(f"{k}: {v}" for k, v in wrong.items()) + ".")
        if changed and self.world.main:
            print("changed since the checkpoint: " + "; ".join(f"{k}: {v}" for k, v in changed.items()), flush=True)

    def load(self, folder: Path, record: dict) -> None:
        learner, device = self.learner, str(self.world.device)
        learner.stage.trainables.load_state_dict(load_file(folder / "trainables.safetensors", device))
        learner.average.values = load_file(folder / "average.safetensors", device)
        learner.average.count = record["average_count"]
        optimizer, state = learner.optimizer, {}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for key, value in load_file(folder / "optimizer.safetensors", device).items():
            index, name = key.split(".", 1)
            # The fused optimizer walks parameter and state in memory order, so both need the same strides (channels
            # last).
            like = parameters[int(index)]
            state.setdefault(int(index), {})[name] = torch.empty_like(like).copy_(value) if value.ndim else value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

    def save(self, step: int) -> None:
        """Write the checkpoint of a step and remove those no longer kept. Raises OSError in every process where the
        disk refuses. The earlier checkpoints then stay as they are."""
        problem = None
        if self.world.main:
            staged = self.folder / f".writing_{step:08d}"
            try:
                self.write(staged, step)
                self.remove_old(step)
            except OSError as error:
                shutil.rmtree(staged, ignore_errors=True)
                problem = (f"Step {step} could not be saved ({error.strerror or error}); make room in {self.folder} "
                           f"and give the same command. {self.comfort()}.")
        problem = self.world.broadcast(problem)
        if problem:
            raise OSError(problem)

    def write(self, staged: Path, step: int) -> None:
        learner = self.learner
        for half in (*self.folder.glob(".writing_*"), *self.folder.glob(".removing_*")):
            shutil.rmtree(half)
        staged.mkdir(parents=True)
        slots = {f"{i}.{k}": v if isinstance(v, Tensor) else torch.tensor(v)
                 for i, s in learner.optimizer.state_dict()["state"].items() for k, v in s.items()}
        files = {f"{name}.safetensors": write_tensors(staged / f"{name}.safetensors", tensors.items())
                 for name, tensors in (("trainables", learner.stage.trainables.state_dict()),
                                       ("average", learner.average.values), ("optimizer", slots))}
        write_record(staged, {
            "step": step, "stage": learner.stage.name, "average_count": learner.average.count, "files": files,
            "processes": self.world.size, "identity": learner.stage.identity, "config": to_dict(self.config)})
        sync(staged)
        target = self.folder / f"step_{step:08d}"
        shutil.rmtree(target, ignore_errors=True)  # an existing folder was passed over as damaged
        staged.rename(target)
        sync(self.folder)

    def remove_old(self, step: int) -> None:
        run = self.config.run
        steps = [n for n, _ in found(self.folder) if n <= step]  # later ones were passed over
        for old in steps[:-run.keep]:
            if not (run.keep_every and old % run.keep_every == 0):
                # Rename first: a kill in between must not leave half a folder under a checkpoint's name.
                gone = (self.folder / f"step_{old:08d}").rename(self.folder / f".removing_{old:08d}")
                shutil.rmtree(gone)
