"""The house as its own imports draw it: which room looks into which, from the ground up, and no circle anywhere."""
from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# From the ground up: a room imports itself and rooms of lower floors, never one above it or beside it.
TOWERS = {
    "training": (("kernels",), ("training/config.py", "training/files.py"), ("training/engine", "training/frozen"),
                 ("training/data", "training/objectives"), ("training/judge", "training/stages"), ("training/plan",),
                 ("training/miniature", "training/cli.py"), ("tests/kernels",), ("benchmarks",)),  # one of them runs the fuzzer
    "nodes": (("kernels",), ("nodes/host",), ("nodes",)),
}
LIBRARIES = {"annotated_types", "einops", "open_clip", "pydantic", "safetensors", "torch", "transformers"}  # what kernels may use
CORE = {"comfy", "comfy_extras", "folder_paths", "latent_preview", "node_helpers"}  # ComfyUI, beside its public comfy_api


def files(room: str) -> list[Path]:
    path = ROOT / room
    return [path] if path.suffix else sorted(path.rglob("*.py"))


def imports(file: Path) -> Iterator[str]:
    """Everything that a file imports, inside functions too: files of the house as paths from its root, libraries by name."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            base = file.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for name in node.names:
                places = (base / f"{name.name}.py", base / name.name / "__init__.py", base.with_suffix(".py"), base / "__init__.py")
                yield next(place for place in places if place.is_file()).relative_to(ROOT).as_posix()


def room_of(file: str, rooms: list[str]) -> str | None:
    return max((room for room in rooms if file == room or file.startswith(f"{room}/")), key=len, default=None)


@pytest.mark.parametrize("tower", TOWERS)
def test_a_room_imports_only_rooms_below_it(tower):
    floor = {room: number for number, rooms in enumerate(TOWERS[tower]) for room in rooms}
    seen = []
    for file in sorted({file for room in (*floor, tower) for file in files(room)}):
        own = room_of(file.relative_to(ROOT).as_posix(), list(floor))
        if own is None:
            assert not file.read_text(encoding="utf-8").strip(), f"{file.relative_to(ROOT)} stands in no room"
            continue
        for target in (target for target in imports(file) if target.endswith(".py")):
            other = room_of(target, list(floor))
            assert other is not None, f"{own} imports {target}, which is no room of this tower"
            assert other == own or floor[other] < floor[own], f"{file.relative_to(ROOT)} imports {target}: {other} is not below {own}"
            seen.append((own, other))
    assert len(set(seen)) > len(floor), "the imports were not found"


def arrows(tower: str) -> dict[str, set[str]]:
    """What each room of a tower imports, less what follows from its other imports."""
    rooms = [room for floor in TOWERS[tower] for room in floor]
    below = {room: {room_of(target, rooms) for file in files(room) if room_of(file.relative_to(ROOT).as_posix(), rooms) == room
                    for target in imports(file) if target.endswith(".py")} - {room} for room in rooms}
    beneath: dict[str, set[str]] = {}
    for room in TopologicalSorter(below).static_order():
        beneath[room] = set().union(below[room], *(beneath[other] for other in below[room]))
    return {room: {other for other in below[room] if not any(other in beneath[third] for third in below[room])} for room in rooms}


def test_the_picture_of_the_rooms_agrees_with_the_imports():
    page = (ROOT / "training" / "README.md").read_text(encoding="utf-8")
    drawn = re.search(r"^```mermaid\nflowchart TD\n(.*?)^```", page, re.M | re.S)[1]
    names = dict(re.findall(r'(\w+)\["([^"]+)"\]', drawn))
    lines = [re.sub(r"\[.*?\]", "", line).split("-->") for line in drawn.splitlines()]
    found = {names[start.strip()]: {names[end.strip()] for end in ends.split("&")} for start, ends in lines}
    outside = {"benchmarks", "tests/kernels"}  # they measure and test the rooms
    derived = {room: below for tower in TOWERS for room, below in arrows(tower).items() if room not in outside and below}
    assert found == derived


def test_no_file_imports_itself_in_a_circle():
    graph = {file.relative_to(ROOT).as_posix(): set(imports(file)) - {file.relative_to(ROOT).as_posix()}
             for room in ("kernels", "nodes", "training", "benchmarks") for file in files(room)}
    TopologicalSorter(graph).prepare()  # CycleError names the files


def test_the_kernels_know_neither_the_host_nor_the_training():
    for file in files("kernels"):
        for name in (name for name in imports(file) if not name.endswith(".py")):
            assert name in LIBRARIES or name in sys.stdlib_module_names, f"{file.relative_to(ROOT)} imports {name}"


def test_only_the_host_room_touches_comfyui():
    for room in ("nodes", "training", "benchmarks", "runner"):
        for file in files(room):
            inside, names = file.relative_to(ROOT).parts[:2] == ("nodes", "host"), set(imports(file))
            assert inside or not names & CORE, f"{file.relative_to(ROOT)} imports {names & CORE}: that belongs to nodes/host"
            assert room == "nodes" or "comfy_api" not in names, f"{file.relative_to(ROOT)} imports comfy_api"
