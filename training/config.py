"""Configuration: frozen dataclasses, filled from a TOML file, overridden by dotted flags on the command line."""
from __future__ import annotations

import dataclasses
import difflib
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

T = TypeVar("T")


@dataclass(frozen=True)
class RunConfig:
    """What every stage shares."""

    out: Path
    """Run folder: config.toml, metrics.jsonl, TensorBoard events, checkpoints/."""
    max_steps: int
    """The run ends after this many steps."""
    batch: int = 32
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
    precision: str = "bf16"
    """bf16 (autocast) or fp32."""
    device: str = "auto"
    threads: int = 0
    """CPU threads; 0 leaves PyTorch's choice."""
    compile: bool = False
    log_every: int = 50
    validate_every: int = 1000
    save_every: int = 1000
    resume: str = "auto"
    """auto: go on from the last checkpoint of the run folder if there is one; never: start anew in an empty folder."""


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
    for name, field in fields.items():
        if name not in data:
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise ValueError(f"{where}: the key '{name}' is missing; add it.")
            continue
        value, hint = data[name], hints[name]
        if dataclasses.is_dataclass(hint):
            value = build(hint, value, f"{where} [{name}]")
        elif hint is Path:
            value = Path(value)
        elif typing.get_origin(hint) is tuple:
            value = tuple(tuple(v) if isinstance(v, list) else v for v in value)
        values[name] = value
    return kind(**values)


def to_dict(config: Any) -> dict:
    """A JSON- and TOML-ready copy."""
    def plain(value):
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items() if v is not None}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value
    return plain(dataclasses.asdict(config))


def write_toml(config: Any, path: Path) -> None:
    """Write the resolved configuration (scalars, lists and one level of tables)."""
    import json

    data, lines = to_dict(config), []
    for key, value in data.items():
        if not isinstance(value, dict):
            lines.append(f"{key} = {json.dumps(value)}")
    for key, value in data.items():
        if isinstance(value, dict):
            lines += ["", f"[{key}]", *(f"{k} = {json.dumps(v)}" for k, v in value.items())]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
