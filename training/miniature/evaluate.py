"""Measure the shipped miniature on scenes that it was never trained on.

    python3 run.py eval [--scenes N] [--seed S] [--json] [--dump DIR]
    python3 run.py eval kit [--scenes N] [--seed S] [--json]
    python3 run.py eval inversion [--scenes N] [--seed S] [--json]
    python3 run.py eval fidelity [--scenes N] [--seed S] [--json]
    python3 run.py eval directions [--scenes N] [--seed S] [--json]

The parts are reconstruction, locality, editing, twins, chains, blend and levels, or the artist's kit, or embeddings
fitted without an encoder, or edits that keep the rest, or attribute edits, as the modules of `evaluation/` define them.
A run over 256 scenes replaces benchmarks/miniature.md, one of the kit over 64 benchmarks/kit.md, one of the inversion
over 32 benchmarks/inversion.md, one of the fidelity over 64 benchmarks/fidelity.md, one of the directions over 48
benchmarks/directions.md.
"""
from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ...kernels.precision import resolve
from ..engine import pick_device
from .captions import OPERATIONS
from .evaluation import (
    blend,
    directions,
    editing,
    fidelity,
    inversion,
    kit,
    levels,
    locality,
    reconstruction,
    table,
    turns,
)
from .evaluation.system import ADAPTERS, ASSETS, VARIANTS, Miniature, has_editor_from_fits, left_out
from .scenes import render, scene


def painted_in_all(count: int, absent: Sequence[str] = ()) -> int:
    """Number of pictures that Flux paints for `count` scenes where some adapters are absent. `copy` costs none."""
    variants = [name for name, variant in VARIANTS.items() if variant.adapter not in absent]
    swapped = [name for name in locality.VARIANTS.values() if name in variants]
    return (count * (len(variants) + reconstruction.PAINTED + len(editing.DECODERS) - 1) + len(swapped)
            * locality.pairs(count)
            + len(editing.STARTS) * editing.trials(count) + len(blend.AMOUNTS) * blend.pairs(count)
            + len(turns.DECODERS) * len(turns.KINDS) * turns.twins(count) + turns.chains(count)
            + len(levels.STRENGTHS) * levels.LEVELS * levels.scenes(count))


def run(system: Miniature, count: int, seed: int) -> tuple[dict, dict, dict]:
    """(results as `--json` prints them, figures beside them for the page, what was painted) of the first `count` test
    scenes.

    The last is {"edits", "sources", "reconstructions" (by name), "edited" (by decoder)}.
    """
    changes = editing.instructions("test", count, seed)
    scenes = [change.source for change in changes]
    sources = np.stack([render(each) for each in scenes])
    noise = system.noise("test", range(count), seed)

    text = reconstruction.text_to_image(system, scenes, noise)
    rebuilt = reconstruction.reconstruct(system, scenes, sources, noise)
    figures = {name: reconstruction.measure(scenes, reconstruction.parse_all(pictures), sources, pictures)
               for name, pictures in rebuilt.items()}
    local, same_ground, widened = locality.locality(system, scenes, sources, noise, rebuilt)
    start = editing.best_start(system, editing.trials(count), seed)
    edited = editing.edit_pictures(system, changes, sources, noise, rebuilt["tree128"], start)
    edits = {name: editing.by_operation(changes, reconstruction.parse_all(pictures))
             for name, pictures in edited.items()}
    beside_twins = turns.run_twins(system, count, seed)
    for name, values in beside_twins.items():
        edits[name]["twins"] = {key: values[key] for key in ("success", "preservation")}
    few = levels.scenes(count)
    results = {"text": text, "reconstruction": figures, "locality": local, "editing": edits,
               "chain": turns.run_chains(system, count, seed, noise),
               "blend": blend.figures(system, scenes, sources, noise),
               "levels": levels.run(system, system.embed(sources[:few], "tree128"), noise, rebuilt["tree128"])}
    other = reconstruction.others(scenes)
    asides = {
        "chance": reconstruction.measure(scenes, other, sources, np.stack([render(each) for each in other])),
        "same_ground": same_ground, "widened": widened, "sdedit_start": start, "locality_pairs": locality.pairs(count),
        "blend_pairs": blend.pairs(count), "twins": beside_twins, "twin_edits": turns.twins(count),
        "chains": turns.chains(count), "level_scenes": few,
        "edits": {op: sum(change.operation == op for change in changes) for op in OPERATIONS} | {"all": count},
    }
    return results, asides, {"edits": changes, "sources": sources, "reconstructions": rebuilt, "edited": edited}


def run_kit(system: Miniature, count: int, seed: int) -> tuple[dict, dict, dict]:
    """The kit's figures over the first `count` test scenes, and those beside them; no pictures are kept."""
    changes = editing.instructions("test", count, seed)
    sources = np.stack([render(change.source) for change in changes])
    return *kit.run(system, changes, sources, system.noise("test", range(count), seed), seed), {}


def run_inversion(system: Miniature, count: int, seed: int) -> tuple[dict, dict, dict]:
    """The figures of embeddings fitted to the first `count` test scenes, and those beside them; no pictures are
    kept."""
    scenes = [scene("test", index, seed) for index in range(count)]
    sources = np.stack([render(each) for each in scenes])
    return *inversion.run(system, scenes, sources, system.noise("test", range(count), seed), seed), {}


def run_fidelity(system: Miniature, count: int, seed: int) -> tuple[dict, dict, dict]:
    """The figures of faithful decoding of an edit of each of the first `count` test scenes, and those beside them; no
    pictures are kept."""
    changes = editing.instructions("test", count, seed)
    sources = np.stack([render(change.source) for change in changes])
    return *fidelity.run(system, changes, sources, system.noise("test", range(count), seed), seed), {}


def run_directions(system: Miniature, count: int, seed: int) -> tuple[dict, dict, dict]:
    """The figures of attribute edits of the first `count` test scenes, and those beside them; no pictures are kept."""
    return *directions.run(system, count, seed), {}


@dataclass(frozen=True)
class Part:
    """One part of the evaluation: its number of scenes by default (`fewer` on a CPU that computes float32 fastest, so
    that it takes no longer there), its adapters, the pictures that it paints (for a number of scenes, without some
    adapters, from a folder of weights), and its page."""

    scenes: int
    fewer: int
    adapters: Sequence[str]
    pictures: Callable[[int, Sequence[str], Path], int]
    measure: Callable[[Miniature, int, int], tuple[dict, dict, dict]]
    page: Callable[[dict, dict, int, int, str, str, float], str]
    file: Path


PARTS = {"system": Part(256, 24, ADAPTERS, lambda count, absent, assets: painted_in_all(count, absent), run, table.page,
                       table.PAGE),
         "kit": Part(64, 64, ("tree128",), lambda count, absent, assets: kit.painted(count), run_kit, table.kit_page,
                     table.KIT_PAGE),
         "inversion": Part(32, 32, ("tree128",),
                           lambda count, absent, assets: inversion.painted(count, has_editor_from_fits(assets)),
                           run_inversion, table.inversion_page, table.INVERSION_PAGE),
         "fidelity": Part(64, 64, ("tree128",), lambda count, absent, assets: fidelity.painted(count), run_fidelity,
                          table.fidelity_page, table.FIDELITY_PAGE),
         "directions": Part(48, 24, ("tree128",), lambda count, absent, assets: directions.painted(count), run_directions,
                            table.directions_page, table.DIRECTIONS_PAGE)}


def rounded(value):
    """Floats with four decimals, at any depth."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


def dump(folder: Path, painted: dict) -> None:
    """One folder for each scene: source.png, reconstruction_<name>.png, edit_<decoder>.png, and scene.json with the
    scene, the instruction, its operation and the edited scene (coordinates in pixels)."""
    for index, change in enumerate(painted["edits"]):
        own = folder / f"{index:04d}"
        own.mkdir(parents=True, exist_ok=True)
        pictures = {"source": painted["sources"][index]}
        pictures |= {f"reconstruction_{name}": made[index] for name, made in painted["reconstructions"].items()}
        pictures |= {f"edit_{name}": made[index] for name, made in painted["edited"].items()}
        for name, picture in pictures.items():
            Image.fromarray(picture).save(own / f"{name}.png")
        record = {"scene": change.source.to_json(), "operation": change.operation, "instruction": change.instruction,
                  "edited_scene": change.target.to_json()}
        (own / "scene.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="run.py eval", description=__doc__.split("\n\n")[0])
    parser.add_argument("part", nargs="?", choices=list(PARTS), default="system",
                        help="what is measured (default: system)")
    parser.add_argument("--scenes", type=int,
                        help="test scenes, at least 2 (default: 256, or 24 on a CPU without bf16; for kit and "
                             "fidelity 64; for directions 48; for inversion 32)")
    parser.add_argument("--seed", type=int, default=0, help="another seed makes fresh scenes and noise (default: 0)")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--dump", type=Path, help="folder for every source, reconstruction and edit")
    parser.add_argument("--assets", type=Path, default=ASSETS, help="folder of the weights (default: the shipped ones)")
    options = parser.parse_args(argv)
    part = PARTS[options.part]
    device = pick_device("auto")
    slow = device.type == "cpu" and resolve("auto", device) == "fp32"
    options.scenes = options.scenes or (part.fewer if slow else part.scenes)
    if options.scenes < 2 or options.seed < 0:
        parser.error("--scenes is at least 2 and --seed at least 0.")
    if options.dump and options.part != "system":
        parser.error(f"--dump keeps the pictures of the system, not of {options.part}; leave one of the two out.")
    try:
        if options.dump:
            options.dump.mkdir(parents=True, exist_ok=True)  # this fails before the work, not after it
        absent = {name: command for name, command in left_out(options.assets).items() if name in part.adapters}
        for name, command in absent.items():
            print(f"left out, since it is not there: {name} (`{command}` trains it)", file=sys.stderr)
        with tqdm(total=part.pictures(options.scenes, tuple(absent), options.assets), desc="painting", unit="picture",
                  mininterval=1) as bar:
            adapters = [name for name in part.adapters if name not in absent]
            system = Miniature(options.assets, device, bar.update, adapters)
            bar.write(f"computes in {system.precision} on {system.device.type}", file=sys.stderr)
            results, asides, painted = part.measure(system, options.scenes, options.seed)
            minutes = bar.format_dict["elapsed"] / 60
        if absent:
            asides["left_out"] = absent
        if options.dump:
            dump(options.dump, painted)
    except (ValueError, OSError) as error:
        print(f"eval: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("eval: stopped", file=sys.stderr)
        return 130
    results = rounded(results)
    command = f"python3 run.py eval {options.part} --scenes {options.scenes} --seed {options.seed}"
    page = part.page(results, asides, options.scenes, options.seed, command, system.precision, minutes)
    print(page)
    if (options.scenes, options.seed, options.assets) == (part.scenes, 0, ASSETS):
        part.file.write_text(page, encoding="utf-8")
        for name, picture in asides.get("pictures", {}).items():
            picture.save(part.file.with_name(name), quality=85)
    if options.json:
        print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
