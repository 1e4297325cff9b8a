"""The JSON in files of unknown origin: parsed, typed and bounded by pydantic, every refusal one sentence.

Scalars are strict (1.0 and true are no whole numbers), numbers are finite, unknown fields are refused by name. The
bounds lie far above every network that exists and far below what takes minutes to build; what a file's tensors say is
compared later.
"""

from __future__ import annotations

import json
import math
from functools import cache
from typing import Annotated, Any, TypeVar

from annotated_types import Ge, Gt, Le, Len
from pydantic import BaseModel, ConfigDict, Strict, StrictBool, StringConstraints, TypeAdapter, ValidationError

T = TypeVar("T")

MAX_DEPTH = 200  # of lists and objects inside one another: what a blend of blends of blends says of its sources

CLOSED = ConfigDict(extra="forbid", allow_inf_nan=False)


def whole(least: int, most: int) -> Any:
    """Whole numbers from `least` to `most`."""
    # Not pydantic's Field: older releases keep the default of one field in it, for all that share the annotation.
    return Annotated[int, Strict(), Ge(least), Le(most)]


Flag = StrictBool
Layers = whole(1, 256)
Width = whole(1, 2**17)
Heads = whole(1, 1024)
Side = whole(1, 2**11)  # pixels
Patch = whole(1, 256)  # pixels
Number = Annotated[float, Strict(), Ge(-1e9), Le(1e9)]
Positive = Annotated[float, Strict(), Gt(0), Le(1e9)]
Share = Annotated[float, Strict(), Ge(0), Le(1)]
Name = Annotated[str, Len(1, 200)]
Word = Annotated[
    str, StringConstraints(max_length=64, pattern=r"^[a-z0-9_]+$")
]  # an identifier of a library: no path, no address
# The levels of a hierarchy; how many tokens they may come to is Hierarchy's own affair.
_Count = whole(-(2**31), 2**31)
Levels = Annotated[tuple[tuple[_Count, _Count, _Count], ...], Len(1, 64)]


class Closed(BaseModel):
    """A record whose fields are all known."""

    model_config = CLOSED | ConfigDict(frozen=True)


def read_json(text: str | bytes) -> dict[str, Any]:
    """A JSON object.

    ValueError for anything else, a name that occurs twice, a number that is not finite, or deep nesting.
    """
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(text, object_pairs_hook=_once, parse_float=_finite, parse_constant=_finite)
    except json.JSONDecodeError as error:
        raise ValueError(f"its JSON is broken at {error.pos}") from None
    except UnicodeDecodeError:
        raise ValueError("its JSON is not UTF-8") from None
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("its JSON is no object")
    if _deeper(value, MAX_DEPTH):
        raise ValueError("its JSON is nested too deeply")
    return value


def parse(kind: type[T], value: Any, what: str, remedy: str = "download or export the file again") -> T:
    """`value` (from JSON) as `kind`: a dataclass, a pydantic model or any annotation.

    `what` begins the sentence of the ValueError, `remedy` ends it.
    """
    try:
        return _adapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    where, cause = ".".join(map(str, first["loc"])), first.get("ctx", {}).get("error")
    if cause is not None:  # a sentence of ours already
        raise ValueError(str(cause))
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        raise ValueError(
            f"{what} has the field {short(where)}, which this version of the pack does not take: update the pack."
        )
    if first["type"] == "missing":
        raise ValueError(f"{what} lacks {short(where)}: {remedy}, or update the pack.")
    reason = first["msg"].replace("Input should", "it should").rstrip(".")
    place = f" for {short(where)}" if where else ""
    raise ValueError(f"{what} says {short(first['input'])}{place} ({reason}): {remedy}.")


def short(value: Any) -> str:
    """A value as it stands in a sentence: whatever it is, one line of at most 80 characters."""
    text = repr(value) if isinstance(value, (str, int, float, bool, type(None))) else f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:76]}..."


@cache
def _adapter(kind: Any) -> TypeAdapter:
    return TypeAdapter(kind)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"its JSON names {short(twice)} twice")
    return made


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"its JSON has the number {short(text)}")
    return number


def _deeper(value: Any, depth: int) -> bool:
    if not isinstance(value, (dict, list)):
        return False
    return depth == 0 or any(
        _deeper(child, depth - 1) for child in (value.values() if isinstance(value, dict) else value)
    )
