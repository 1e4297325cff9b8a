"""Configuration: frozen dataclasses, filled from a TOML file, overridden by dotted flags on the command line."""
from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import tyro

from ..kernels.precision import resolve

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

T = TypeVar("T")


def free(default: Any = dataclasses.MISSING) -> Any:
    """A field that a resumed run may change, since it changes neither what is learnt nor from which samples. (So may a Path:
    where a file lies is free, what it holds is for the stage's identity.)"""
    return field(default=default, metadata={"free": True})


@dataclass(frozen=True)
class RunConfig:
    """What every stage shares."""

    out: Annotated[Path, tyro.conf.arg(aliases=("--out",))]
    """Run folder: config.toml, metrics.jsonl, TensorBoard events, validation/, checkpoints/."""
    max_steps: Annotated[int, tyro.conf.arg(aliases=("--max-steps",))] = free()
    """The run ends after this many steps; more of them extend the plateau of the learning rate, and the last of its phases."""
    plan_steps: int = 0
    """The steps of which growth, unlocking and resolutions name shares. 0: the max_steps that the run began with."""
    batch: int = 32
    """Samples of a step, over all processes."""
    micro: int = free(0)
    """Samples that a process takes at once; their gradients add up to the step's. 0: all of its share."""
    seed: int = 0
    lr: float = 1e-3
    """Peak learning rate: reached after `warmup` steps, kept, and brought to zero over the last `decay` of the run."""
    warmup: int = 200
    decay: float = 0.2
    weight_decay: float = 0.01
    beta2: float = 0.99
    clip: float = 1.0
    """Largest norm of the gradient."""
    ema: float = 0.999
    """Decay of the averaged weights, the ones that are validated and exported."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16 is by autocast; auto takes it where the device computes it fast, and fp32 elsewhere: a GPU before Ampere would need
    fp16, whose gradients vanish without a loss scaler. A resumed run keeps what it began with."""
    device: str = free("auto")
    threads: int = free(0)
    """CPU threads; 0 leaves PyTorch's choice."""
    compile: bool = free(False)
    log_every: int = free(50)
    """Steps between lines on the console and points in TensorBoard; metrics.jsonl has every step."""
    validate_every: int = free(1000)
    save_every: int = free(1000)
    keep: int = free(2)
    """How many checkpoints to keep, the newest ones."""
    keep_every: int = free(0)
    """Besides, every checkpoint of a step that is a multiple of this stays for good; 0: none."""
    on_nonfinite: Literal["stop", "skip"] = free("stop")
    """What to do where the loss or the gradient is not finite: stop and name the samples, or leave the step out."""
    resume: Annotated[Literal["auto", "never"], tyro.conf.arg(aliases=("--resume",))] = free("auto")
    """auto: go on from the last checkpoint of the run folder if there is one; never: start anew in an empty folder."""
    dry_run: Annotated[bool, tyro.conf.arg(aliases=("--dry-run",))] = free(False)
    """Print settings, parameters, memory and data, run one step, and write nothing."""

    @property
    def planned(self) -> int:
        return self.plan_steps or self.max_steps

    def __post_init__(self) -> None:
        for key in ("max_steps", "batch", "log_every", "validate_every", "save_every", "keep"):
            if getattr(self, key) < 1:
                raise ValueError(f"run.{key} is {getattr(self, key)}; it must be at least 1.")
        if self.plan_steps < 0:
            raise ValueError(f"run.plan_steps is {self.plan_steps}; it must be at least 1, or 0 for all of the run.")


def from_toml(kind: type[T], path: Path, **overrides: Any) -> T:
    """Build the dataclass `kind` from a TOML file. Unknown or missing keys raise ValueError and name the nearest key."""
    with open(path, "rb") as file:
        return build(kind, {**tomllib.load(file), **overrides}, str(path))


def build(kind: type[T], data: dict, where: str) -> T:
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in data:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(fields)}."
            raise ValueError(f"{where}: unknown key '{key}'; {hint}")
    values = {}
    for name, known in fields.items():
        if name not in data:
            if known.default is dataclasses.MISSING and known.default_factory is dataclasses.MISSING:
                raise ValueError(f"{where}: the key '{name}' is missing; add it.")
            continue
        values[name] = convert(data[name], hints[name], where, name)
    return kind(**values)


def convert(value: Any, hint: Any, where: str, name: str) -> Any:
    """A value from TOML as the field's type has it."""
    inner = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return tuple(Path(v) if Path in inner else tuple(v) if isinstance(v, list) else v for v in value)
    if typing.get_origin(hint) is Literal and value not in inner:
        raise ValueError(f"{where}: '{name}' cannot be {value!r}; use one of {', '.join(map(repr, inner))}.")
    for kind in (hint, *inner):  # the type itself, or what may also be None
        if dataclasses.is_dataclass(kind):
            return build(kind, value, f"{where} [{name}]")
        if kind is Path:
            return Path(value)
    return value


def settled(config: Any, device: torch.device, began: dict) -> Any:
    """The configuration with every `precision` of "auto", its own and those of its tables, as `began` (an earlier copy by
    `to_dict`, or {}) has it or, where that says nothing, as the device computes fast."""
    changes = {}
    for known in dataclasses.fields(config):
        value, earlier = getattr(config, known.name), began.get(known.name)
        if dataclasses.is_dataclass(value):
            changes[known.name] = settled(value, device, earlier or {})
        elif known.name == "precision" and value == "auto":
            changes[known.name] = earlier or resolve(value, device)
    return dataclasses.replace(config, **changes)


def to_dict(config: Any) -> dict:
    """A JSON- and TOML-ready copy."""
    def plain(value):
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items() if v is not None}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value
    return plain(dataclasses.asdict(config))


def to_toml(config: Any) -> str:
    """The resolved configuration as TOML (scalars, lists and tables)."""
    def table(data: dict, name: str) -> list[str]:
        lines = [f"{k} = {json.dumps(v, ensure_ascii=False)}" for k, v in data.items() if not isinstance(v, dict)]
        for key, value in data.items():
            if isinstance(value, dict):
                lines += ["", f"[{name}{key}]", *table(value, f"{name}{key}.")]
        return lines

    return "\n".join(table(to_dict(config), "")) + "\n"


def write_toml(config: Any, path: Path) -> None:
    path.write_text(to_toml(config), encoding="utf-8")
