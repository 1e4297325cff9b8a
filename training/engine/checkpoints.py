"""Checkpoints that are whole or absent: staged beside, sealed by complete.json with every file's hash, renamed once.

A folder is taken only if each of its files is, to the bit, the one that complete.json names; otherwise the one before it is.
"""
from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..config import RunConfig, settled, to_dict
from ..files import file_hash
from .learner import Learner


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's folder, None if it is whole."""
    try:
        files = json.loads((folder / "complete.json").read_text(encoding="utf-8"))["files"]
        for name, truth in files.items():
            if (folder / name).stat().st_size != truth["bytes"]:
                return f"{name} has {(folder / name).stat().st_size} of {truth['bytes']} bytes"
            if file_hash(folder / name) != truth["sha256"]:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except ValueError:
        return "complete.json cannot be read"
    except KeyError:
        return "it was written by another version"
    return None


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; None where there is no checkpoint at all.

    Says which ones are passed over; raises ValueError where none is left, since starting anew would bury them.
    """
    found = sorted(folder.glob("step_*"), reverse=True)
    for each in found:
        problem = damage(each)
        if problem is None:
            return each
        print(f"{each} is passed over: {problem}", flush=True)
    if found:
        raise ValueError(f"No checkpoint in {folder} is whole; move the folder away, or give another --run.out.")
    return None


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
    """The configuration that the checkpoints of a run tell of; {} for a new one."""
    for record in sorted((run.out / "checkpoints").glob("step_*/complete.json")):
        with contextlib.suppress(ValueError, KeyError):  # torn: another one will do
            return json.loads(record.read_text(encoding="utf-8"))["config"]
    return {}


def settle(config: Any, device: torch.device) -> Any:
    """The configuration of a stage with all that it leaves open decided: `plan_steps` and every precision are those that the
    run began with or, in a new one, all of its steps and what the device computes fast."""
    run, began = config.run, began_with(config.run)
    first = began.get("run", {})
    steps = run.plan_steps or first.get("plan_steps") or first.get("max_steps") or run.max_steps
    return settled(dataclasses.replace(config, run=dataclasses.replace(run, plan_steps=steps)), device, began)


def is_free(value: Any, field: dataclasses.Field) -> bool:
    """Whether a resumed run may change the field (config.free)."""
    paths = value if isinstance(value, tuple) and value else (value,)
    return field.metadata.get("free", False) or all(isinstance(v, Path) for v in paths)


def plain(data: Any) -> Any:
    """As it comes back from JSON."""
    return json.loads(json.dumps(data, default=str))


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

        Raises ValueError where the checkpoint is of another stage, base, data plan or configuration, and shows the difference.
        """
        if self.config.run.resume == "never" and any(self.folder.glob("step_*")):
            raise ValueError(f"{self.config.run.out} already holds checkpoints; give another --run.out or let --run.resume be auto.")
        found, problem = None, None
        if self.world.main:
            try:
                found = newest_whole(self.folder)
            except ValueError as error:
                problem = str(error)
        found, problem = self.world.said_by_main((found, problem))
        if problem:
            raise ValueError(problem)
        if found is None:
            return 0
        record = json.loads((found / "complete.json").read_text(encoding="utf-8"))
        self.compare(record)
        self.load(found, record)
        return record["step"]

    def compare(self, record: dict) -> None:
        stage = self.learner.stage
        if record["stage"] != stage.name:
            raise ValueError(f"{self.folder} holds a run of '{record['stage']}', not of '{stage.name}'; give another --run.out.")
        new, fields = flat(to_dict(self.config)), list(leaves(self.config))
        # What an older checkpoint has no word of, it had at its default.
        old = {k: f.default for k, _, f in fields if k in new and f.default is not dataclasses.MISSING}
        old = {**plain(old), **flat(record["config"])}
        old["run.plan_steps"] = old["run.plan_steps"] or old["run.max_steps"]
        new["run.plan_steps"] = new["run.plan_steps"] or old["run.plan_steps"]
        changed = differences(old, new)
        free = {key for key, value, field in fields if is_free(value, field)}
        wrong = {**{k: v for k, v in changed.items() if k not in free},
                 **differences(flat(record["identity"]), flat(plain(stage.identity)))}
        if wrong:
            raise ValueError(f"{self.folder} holds a run of other settings; give them again, or another --run.out. What differs: "
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
            # The fused optimizer walks parameter and state in memory order, so both need the same strides (channels last).
            like = parameters[int(index)]
            state.setdefault(int(index), {})[name] = torch.empty_like(like).copy_(value) if value.ndim else value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

    def save(self, step: int) -> None:
        """Write the checkpoint of a step and remove those no longer kept. Raises OSError in every process where the disk
        refuses; the checkpoints that were there stay as they are."""
        problem = None
        if self.world.main:
            staged = self.folder / f".writing_{step:08d}"
            try:
                self.write(staged, step)
                self.remove_old(step)
            except (OSError, SafetensorError) as error:
                shutil.rmtree(staged, ignore_errors=True)
                problem = (f"Step {step} could not be saved ({getattr(error, 'strerror', None) or error}); make room in "
                           f"{self.folder} and give the same command: the checkpoints in it are whole.")
        problem = self.world.said_by_main(problem)
        if problem:
            raise OSError(problem)

    def write(self, staged: Path, step: int) -> None:
        learner = self.learner
        for half in (*self.folder.glob(".writing_*"), *self.folder.glob(".removing_*")):
            shutil.rmtree(half)
        staged.mkdir(parents=True)
        slots = {f"{i}.{k}": v if isinstance(v, Tensor) else torch.tensor(v)
                 for i, s in learner.optimizer.state_dict()["state"].items() for k, v in s.items()}
        files = {}
        for name, tensors in (("trainables", learner.stage.trainables.state_dict()), ("average", learner.average.values),
                              ("optimizer", slots)):
            path = staged / f"{name}.safetensors"
            # Copies, because safetensors refuses tied weights (T5's word table has two names); a GPU has no room for them.
            save_file({k: v.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for k, v in tensors.items()}, path)
            sync(path)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": file_hash(path)}
        record = {"step": step, "stage": learner.stage.name, "average_count": learner.average.count, "files": files,
                  "processes": self.world.size, "identity": learner.stage.identity, "config": to_dict(self.config)}
        (staged / "complete.json").write_text(json.dumps(record, indent=1, default=str), encoding="utf-8")
        sync(staged / "complete.json")
        sync(staged)
        target = self.folder / f"step_{step:08d}"
        shutil.rmtree(target, ignore_errors=True)  # only one that was passed over as damaged can be here
        staged.rename(target)
        sync(self.folder)

    def remove_old(self, step: int) -> None:
        run = self.config.run
        steps = sorted(n for n in (int(p.name[5:]) for p in self.folder.glob("step_*")) if n <= step)  # beyond: passed over
        for old in steps[:-run.keep]:
            if not (run.keep_every and old % run.keep_every == 0):
                # Under another name first: a kill in between must not leave half of one under a checkpoint's name.
                gone = (self.folder / f"step_{old:08d}").rename(self.folder / f".removing_{old:08d}")
                shutil.rmtree(gone)


def sync(path: Path) -> None:
    """Have the disk hold a file, or the names in a folder, before what follows."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders, and orders their names itself
        return
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
