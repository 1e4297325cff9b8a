"""Configuration: frozen dataclasses, filled from a TOML file, overridden by dotted flags on the command line.

Values are strict: a quoted number is not a number, true is not a whole number, and every number is finite. pydantic
checks them, as it checks the records of files (kernels/schema.py). An error is one sentence with the file, the key and
what was expected.
"""
from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import tyro
from annotated_types import Ge, Gt, Le, Lt
from pydantic import ConfigDict, TypeAdapter, ValidationError

from ..kernels.precision import resolve
from ..kernels.schema import CLOSED, short

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

Count = Annotated[int, Ge(1)]
Whole = Annotated[int, Ge(0)]
Share = Annotated[float, Ge(0), Le(1)]
Decay = Annotated[float, Ge(0), Lt(1)]
NotNegative = Annotated[float, Ge(0)]
Positive = Annotated[float, Gt(0)]
_STRICT = CLOSED | ConfigDict(strict=True)

T = TypeVar("T")


def free(default: Any = dataclasses.MISSING) -> Any:
    """A field that a resumed run may change, because it affects neither what is learnt nor from which samples. A Path
    may change without this: where a file lies is free, and the stage's identity holds its content.
    Path: where a file lies is free, what it holds is for the stage's identity.)"""
    return field(default=default, metadata={"free": True})


@dataclass(frozen=True)
class RunConfig:
    """What every stage shares."""

    out: Annotated[Path, tyro.conf.arg(aliases=("--out",))]
    """Run folder: config.toml, metrics.jsonl, TensorBoard events, validation/, checkpoints/."""
    max_steps: Annotated[Count, tyro.conf.arg(aliases=("--max-steps",))] = free()
    """The run ends after this many steps. More steps extend the plateau of the learning rate and the run's last
    phase."""
    plan_steps: Whole = 0
    """Growth, unlocking and resolutions name shares of this many steps. 0: the max_steps that the run began with."""
    batch: Count = 32
    """Samples per step, over all processes."""
    micro: Whole = free(0)
    """Samples that a process takes at once. Their gradients add up to the step's. 0: all of its share."""
    seed: int = 0
    lr: Positive = 1e-3
    """Peak learning rate. It is reached after `warmup` steps, kept, and brought to zero over the last `decay` of the
    run."""
    warmup: Whole = 200
    decay: Share = 0.2
    weight_decay: NotNegative = 0.01
    beta2: Decay = 0.99
    clip: Positive = 1.0
    """Largest norm of the gradient."""
    ema: Decay = 0.999
    """Decay of the averaged weights, which are validated and exported."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16 uses autocast. auto takes bf16 where the device computes it fast, and fp32 elsewhere: a GPU before Ampere
    would need fp16, whose gradients vanish without a loss scaler. A resumed run keeps the precision it began with."""
    device: str = free("auto")
    workers: Whole = free(8)
    """Processes that prepare the miniature's batches while a GPU computes. On a CPU there are none."""
    threads: Whole = free(0)
    """CPU threads; 0 leaves PyTorch's choice."""
    compile: bool = free(False)
    log_every: Count = free(50)
    """Steps between lines on the console and points in TensorBoard; metrics.jsonl has every step."""
    validate_every: Count = free(1000)
    save_every: Count = free(1000)
    keep: Count = free(2)
    """How many of the newest checkpoints to keep."""
    keep_every: Whole = free(0)
    """Checkpoints whose step is a multiple of this are kept for good as well. 0: none are."""
    on_nonfinite: Literal["stop", "skip"] = free("stop")
    """What to do where the loss or the gradient is not finite: stop and name the samples, or skip the step."""
    resume: Annotated[Literal["auto", "never"], tyro.conf.arg(aliases=("--resume",))] = free("auto")
    """auto: continue from the last checkpoint of the run folder if there is one. never: start anew in an empty
    folder."""
    dry_run: Annotated[bool, tyro.conf.arg(aliases=("--dry-run",))] = free(False)
    """Print settings, parameters, memory and data, run one step, and write nothing."""

    @property
    def planned(self) -> int:
        return self.plan_steps or self.max_steps


def from_toml(kind: type[T], path: Path, **overrides: Any) -> T:
    """Build the dataclass `kind` from a TOML file. ValueError names the file, the key and what was expected."""
    with open(path, "rb") as file:
        try:
            data = tomllib.load(file)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no TOML file ({str(error).rstrip('.')}); correct it.") from None
    return build(kind, {**data, **overrides}, str(path))


def build(kind: type[T], data: dict, where: str) -> T:
    """The dataclass `kind` of a JSON-like table. where: begins the sentence of the ValueError."""
    try:
        # JSON mode is needed: only there does strict pydantic take lists for tuples, strings for paths and tables for
        # dataclasses.
        return _adapter(kind).validate_json(json.dumps([data], default=str))[0]
    except ValidationError as error:
        found = error.errors(include_url=False)
    raise ValueError(sentence(kind, found, where))


def checked(config: T, where: str = "the command line") -> T:
    """Check every bound of a configuration again after flags have changed it. ValueError as `build`."""
    return build(type(config), to_dict(config), where)


@cache
def _adapter(kind: type) -> TypeAdapter:
    # A nested dataclass takes its rules from the one around it; on its own it would need them in every class.
    return TypeAdapter(tuple[kind], config=_STRICT)


def sentence(kind: type, errors: list[dict], where: str) -> str:
    """The sentence about what is wrong with a table, from pydantic's errors: the place, the key, the value, what was
    expected."""
    # a misspelt key may be the one that is missing
    first = next((e for e in errors if e["type"] in _UNKNOWN), errors[0])
    path, table = [str(part) for part in first["loc"][1:]], kind
    depth = 0  # of the tables around the key
    for part in path:
        inner = _table(table, part)
        if inner is None or depth + 1 == len(path):
            break
        table, depth = inner, depth + 1
    place = f"{where} [{'.'.join(path[:depth])}]" if depth else where
    key = "".join([*path[depth:depth + 1], *(f"[{part}]" for part in path[depth + 1:] if part.isdigit())])
    if first["type"] == "value_error":  # the message is a whole sentence already
        return f"{f'{where} [{chr(46).join(path)}]' if path else where}: {first['ctx']['error']}"
    if first["type"] in _UNKNOWN:
        known = [f.name for f in dataclasses.fields(table)]
        near = difflib.get_close_matches(key, known, 1)
        hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known)}."
        return f"{place}: unknown key '{key}'; {hint}"
    if first["type"] == "missing":
        return f"{place}: the key '{key}' is missing; add it."
    # A union has one error for each of its kinds.
    wanted = [_wanted(e) for e in errors if [str(part) for part in e["loc"][1:]][:depth + 1] == path[:depth + 1]]
    quoted = isinstance(first["input"], str) and any(w.startswith(("a number", "a whole", "true")) for w in wanted)
    value = json.dumps(first["input"]) if isinstance(first["input"], (str, bool)) else short(first["input"])
    return (f"{place}: '{key}' is {value}; it must be {' or '.join(dict.fromkeys(wanted))}"
            f"{', without quotes' if quoted else ''}.")


def _table(kind: type, key: str) -> type | None:
    """The dataclass that a field is, or may be."""
    hint = typing.get_type_hints(kind).get(key)
    return next((k for k in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(k)), None)


_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
_WANTED = {"bool_type": "true or false", "int_type": "a whole number", "int_from_float": "a whole number",
           "float_type": "a number",
           "finite_number": "a finite number", "string_type": "a text", "path_type": "a path", "tuple_type": "a list",
           "dataclass_type": "a table", "none_required": "left out"}


def _wanted(error: dict) -> str:
    """What one of pydantic's errors asks for, without its head."""
    words = error["msg"].removeprefix("Input should be ").replace("greater than or equal to", "at least")
    return _WANTED.get(error["type"], words.replace("less than or equal to", "at most"))


def resolve_precisions(config: Any, device: torch.device, began: dict) -> Any:
    """The configuration with every `precision` of "auto" decided, its own and those of its tables. `began` is an
    earlier copy by `to_dict`, or {}: its value is kept; where it has none, the value is what the device computes
    fast."""
    changes = {}
    for known in dataclasses.fields(config):
        value, earlier = getattr(config, known.name), began.get(known.name)
        if dataclasses.is_dataclass(value):
            changes[known.name] = resolve_precisions(value, device, earlier or {})
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
