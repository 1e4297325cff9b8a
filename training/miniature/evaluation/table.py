"""The evaluation's figures as a Markdown page."""
from __future__ import annotations

import platform
import re
from datetime import date
from pathlib import Path

import torch

from ..captions import OPERATIONS
from .locality import WIDER
from .system import GUIDANCE

PAGE = Path(__file__).resolve().parents[3] / "benchmarks" / "miniature.md"
KIT_PAGE = PAGE.with_name("kit.md")
INVERSION_PAGE = PAGE.with_name("inversion.md")
FIDELITY_PAGE = PAGE.with_name("fidelity.md")
DIRECTIONS_PAGE = PAGE.with_name("directions.md")
COLUMNS = {"f1": "F1", "f1_colour_position": "F1 (colour, position)", "position_px": "position error, px",
           "background": "ground", "iou": "shape, IoU", "psnr": "PSNR, dB"}


def machine() -> str:
    """The processor (and the GPU that was used), threads and PyTorch's version."""
    name, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"model name\s*:\s*(.+)", info.read_text())):
        name = found[1]
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}{gpu}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def rows(head: list[str], lines: list[list[str]]) -> list[str]:
    """A Markdown table: the first column left, the others right."""
    return [f"| {' | '.join(line)} |" for line in [head, ["---", *["---:"] * (len(head) - 1)], *lines]]


def page(results: dict, asides: dict, scenes: int, seed: int, command: str, precision: str, minutes: float) -> str:
    """results: what `--json` prints. asides: further figures, {"chance", "same_ground", "widened", "sdedit_start",
    "edits", "locality_pairs", "blend_pairs"} (see evaluate.run), and "left_out" where ablations are absent."""
    reconstruction = [[name, *(number(values[key]) for key in COLUMNS)]
                      for name, values in (results["reconstruction"] | {"(chance)": asides["chance"]}).items()]
    editing = [[name, *(f"{number(values[op]['success'])} / {number(values[op]['preservation'])}"
                        for op in (*OPERATIONS, "all"))]
               for name, values in results["editing"].items()]
    operations = [f"{op} ({asides['edits'][op]})" for op in (*OPERATIONS, "all")]
    text, local, same, wide = results["text"], results["locality"], asides["same_ground"], asides["widened"]
    return "\n".join([
        "# The miniature",
        "",
        f"{machine()}, {precision}; {date.today()}; `{command}`, {minutes:.1f} minutes",
        "",
        f"{scenes} scenes of the test split (seed {seed}), never trained on; 20 Euler steps, a fresh noise seed per "
        "scene, the same for all that is painted of it. What each figure means stands in the docstrings of "
        "`training/miniature/evaluation/`.",
        "",
        "## Text to image",
        "",
        f"Captions with place words, guidance {GUIDANCE}: F1 (colour, place) {number(text['f1_colour_place'])}, with "
        f"the shape {number(text['f1_shape'])}.",
        "",
        "## Reconstruction",
        "",
        "`vae` is the ceiling, `caption` the exact caption (coordinates) as a prompt, `tree64_unmasked` and "
        "`global64` are the ablations, `shuffled` is the embedding of another scene, *chance* the true picture of "
        "another scene.",
        "",
        *rows(["", *COLUMNS.values()], reconstruction),
        "",
        *(f"`{name}` is left out, since its weights are not there: `{command}` trains them.\n"
          for name, command in asides.get("left_out", {}).items()),
        "## Locality",
        "",
        f"Share of changed pixels that lie in the swapped quadrant, {asides['locality_pairs']} pairs of scenes; "
        "chance is 0.25.",
        "",
        *rows(["", "share", "where grounds are alike", f"in it or within {WIDER} px"],
              [[name, number(local[name]), number(same[name]), number(wide[name])] for name in local]),
        "",
        "## Editing",
        "",
        "Success / preservation, by operation (number of edits). `oracle`: the embedding of the true edited picture; "
        "`copy`: the unedited embedding; `sdedit`: prompted with the edited scene's exact caption, from time "
        f"{asides['sdedit_start']} (chosen on validation scenes).",
        "",
        *rows(["", *operations], editing),
        "",
        f"Where another thing shares the named one's colour, and where one shares its shape ({asides['twin_edits']} edits "
        "of each):",
        "",
        *rows(["", "same colour", "same shape"],
              [[name, *(f"{number(v[kind]['success'])} / {number(v[kind]['preservation'])}" for kind in ("colour", "shape"))]
               for name, v in asides["twins"].items()]),
        "",
        f"Five edits in a row, each from what the decoder wrote before ({asides['chains']} chains): the fifth succeeds in "
        f"{number(results['chain']['success'])}, and {number(results['chain']['preservation'])} of the things that none "
        "names are found again.",
        "",
        "## Blend",
        "",
        f"Evenness of the way from A to B over 9 amounts, {asides['blend_pairs']} pairs: "
        f"{number(results['blend']['evenness'])}. In the middle {number(results['blend']['whole'])} of the things are "
        "whole.",
        "",
        "## Levels",
        "",
        f"Share of pixels that change where a level's strength is 0 or 2, `tree128`, {asides['level_scenes']} scenes.",
        "",
        *rows(["level", "off", "double"],
              [[level, number(v["off"]), number(v["double"])] for level, v in results["levels"].items()]),
        "",
    ])


def kit_page(results: dict, asides: dict, scenes: int, seed: int, command: str, precision: str, minutes: float) -> str:
    """results: what `eval kit --json` prints. asides: further figures, by part and name."""
    beside = {part: ", ".join(f"{name} {number(value)}" for name, value in values.items())
              for part, values in asides.items()}
    return "\n".join([
        "# The artist's kit, on the miniature",
        "",
        f"{machine()}, {precision}; {date.today()}; `{command}`, {minutes:.1f} minutes",
        "",
        f"{scenes} scenes of the test split (seed {seed}), never trained on; 20 Euler steps. What each figure means "
        f"stands in the docstring of `training/miniature/evaluation/kit.py`.",
        "",
        *rows(["", "figure", "", "beside it"], [[part, name, number(value), beside.get(part, "")]
                                                for part, values in results.items() for name, value in values.items()]),
        "",
    ])


def inversion_page(results: dict, asides: dict, scenes: int, seed: int, command: str, precision: str,
                   minutes: float) -> str:
    """results: what `eval inversion --json` prints. asides: those of inversion.run."""
    def pair(values: dict) -> str:
        return f"{number(values['success'])} / {number(values['preservation'])}"

    def reached(by_start: dict) -> list[str]:
        head = ["", *(f"{n} steps" for n in next(iter(by_start.values())))]
        return rows(head, [[name, *(f"{number(v['f1'])} / {number(v['psnr'])}" for v in values.values())]
                           for name, values in by_start.items()])

    seconds = {name: next(v["seconds"] / int(n) for n, v in values.items() if n != "0")
               for name, values in results["fit"].items()}
    edited = results["edited"] | asides["edited"]
    if results["decoder_from_fits"]:
        edited["statistics, by the decoder trained on fits alone"] = (
            results["decoder_from_fits"] | {"twins": asides["from_fits_twins"]})
    return "\n".join([
        "# Embeddings fitted without an encoder, on the miniature",
        "",
        f"{machine()}, {precision}; {date.today()}; `{command}`, {minutes:.1f} minutes",
        "",
        f"{scenes} scenes of the test split (seed {seed}). What each figure and each start means stands in the "
        f"docstring of `training/miniature/evaluation/inversion.py`. A step of one picture took "
        f"{number(sum(seconds.values()) / len(seconds))} s, with as many fits at once as there are cores.",
        "",
        "## How close",
        "",
        "Strict F1 / PSNR in dB, `tree64`.",
        "",
        *reached(results["fit"]),
        "",
        "The same with 64 tokens of the whole picture (`global64`).",
        "",
        *reached(asides["global64"]),
        "",
        "## How well it is edited",
        "",
        f"Success / preservation of {asides['edits']} edits by the shipped decoder in one pass, and of the "
        f"{asides['twins']} among them in which another thing shares the subject's colour or shape.",
        "",
        *rows(["start", "all", "with a twin"],
              [[name, pair(values), pair(values["twins"])] for name, values in edited.items()]),
        "",
        "## What else takes it",
        "",
        *rows(["", "compose, F1", "blend, evenness"],
              [[name, number(v["compose"]), number(v["blend"])] for name, v in asides["joined"].items()]),
        "",
        "## Where it lies",
        "",
        f"In deviations of the text space (`TextSpace.distances`). Two fits of one picture, from the mean and from the "
        f"statistics, lie {number(asides['two_starts_apart'])} deviations apart.",
        "",
        *rows(["", "mean", "deviation", "norm", "cosine"],
              [[name, *(number(v[key]) for key in ("mean", "deviation", "norm", "cosine"))]
               for name, v in asides["distances"].items()]),
        "",
    ])


def fidelity_page(results: dict, asides: dict, scenes: int, seed: int, command: str, precision: str,
                  minutes: float) -> str:
    """results: what `eval fidelity --json` prints. asides: those of fidelity.run."""
    def pair(values: dict) -> str:
        return f"{number(values['success'])} / {number(values['preservation'])}"

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    return "\n".join([
        "# Faithful decoding, on the miniature",
        "",
        f"{machine()}, {precision}; {date.today()}; `{command}`, {minutes:.1f} minutes",
        "",
        f"One edit for each of {scenes} scenes of the test split (seed {seed}), in {asides['twins']} of which another "
        "thing shares the subject's colour or shape. What each way and each figure means stands in the docstring of "
        f"`training/miniature/evaluation/fidelity.py`. The autoencoder alone reaches {number(asides['ceiling'])} dB "
        f"outside; SDEdit begins at {asides['start']}.",
        "",
        *rows(["", "success / preservation", "with a twin", "PSNR outside, dB", "SSIM outside", "PSNR of the true edit, dB",
               "evaluations"],
              [[name, pair(v), pair(v["twins"]), number(v["psnr_outside"]), share(v["ssim_outside"]),
                number(v["psnr_target"]), str(v["evaluations"])] for name, v in results["decode"].items()]),
        "",
        "## Where the edit changes the picture",
        "",
        "AUC over latent patches.",
        "",
        *rows(["", "edit decoder", "true edit"],
              [[name, share(results["change_map"][name]), share(asides["oracle_map"][name])]
               for name in ("model", "tokens")]),
        "",
        "## Five instructions in a row",
        "",
        "PSNR, in dB, of the pixels that none of the instructions so far changes (`training/miniature/evaluation/sequence.py`).",
        "",
        *rows(["", *(f"turn {turn}" for turn in range(1, 6)), "fifth succeeds", "things kept"],
              [[name, *map(number, v["turns"]), number(v["success"]), number(v["preservation"])]
               for name, v in asides["chains"].items()]),
        "",
    ])


def directions_page(results: dict, asides: dict, scenes: int, seed: int, command: str, precision: str, minutes: float) -> str:
    """results: what `eval directions --json` prints. asides: those of directions.run."""
    kinds = list(next(iter(asides["kinds"].values())))
    lines = [[name, *(number(v[key]) for key in ("success", "kept", "psnr_outside", "monotonic")),
              number(asides["nearer"][name]), number(asides["alone"][name]), *(number(asides["kinds"][name].get(kind)) for kind in kinds)]
             for name, v in results["directions"].items()]
    nothing = asides["plain"]
    return "\n".join([
        "# Attribute edits by directions, on the miniature",
        "",
        f"{machine()}, {precision}; {date.today()}; `{command}`, {minutes:.1f} minutes",
        "",
        f"One attribute for one thing of each of {scenes} scenes of the test split (seed {seed}), through the adapter's "
        "embedding. What each method and each figure means stands in the docstring of "
        "`training/miniature/evaluation/directions.py`. Chosen on validation scenes: the raw strength "
        f"{asides['strength']:g} with the threshold {asides['threshold']:g}, and the weight {asides['weight']:g} of the "
        "appended word.",
        "",
        *rows(["", "success", "kept", "PSNR outside, dB", "monotonic", "nearer", "nothing else", *kinds],
              [["(no edit)", *(number(nothing[key]) for key in ("success", "kept", "psnr_outside")), *("-" for _ in ("", "", "", *kinds))],
               *lines]),
        "",
        "*Nothing else*: the thing has the attribute, and its colour, shape and size are otherwise as before. The last columns "
        "are the success by kind of attribute.",
        "",
        f"AUC of the attribute's own mask: {number(results['mask']['auc'])}. A forward with one direction takes "
        f"{results['cost']['ratio']:.2f} times as long as a plain one.",
        "",
        "## By the dial",
        "",
        "Success at each place of the dial.",
        "",
        *rows(["", "0", *(f"{place:g}" for place in asides["dial"])],
              [[name, *map(number, values)] for name, values in asides["curve"].items()]),
        "",
        "![fluxspace_auto on the first scenes, from the source to the end of the dial, and the true edit](directions.jpg)",
        "",
        "*fluxspace_auto* on the first scenes.",
        "",
    ])
