"""Pooling a style model's tokens to cells before its projection or after it: which keeps to what the projection gives.

    python3 run.py bench redux [--pictures 2] [--json]

Two projections of the shape of Redux (per-token linear, SiLU, linear) with random weights, since no fitted ones are at
hand: the full widths of FLUX.1 Redux and a toy. Their input is what SigLIP's last layer norm could give: a part that all
patches share, a part that changes smoothly over the picture, and a part of each patch's own, in several shares. Pooling
averages over the parts of the preset tree128 in the grids of FLUX.1 Redux (27 x 27) and Flex Redux (32 x 32). A run of
the default settings replaces benchmarks/redux.md.
"""
from __future__ import annotations

import argparse
import json
import sys
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.hierarchy import PRESETS
from ..kernels.regions import pool_grid
from ..training.miniature.evaluation import table

PAGE = Path(__file__).with_suffix(".md")
WIDTHS = {"toy": (48, 144), "full": (1152, 4096)}
"""name: (what the tower gives, what Flux reads); the hidden layer has three times the second"""
GRIDS = (27, 32)
OWN = (0.1, 0.5, 0.9)  # the share of a patch's variance, beside what all share, that is its own
PICTURES = 2
WAYS = ("after", "before", "bare after", "bare before")
COLUMNS = (("nearest", "after"), ("nearest", "before"), ("nearest", "not pooled"), ("direction", "after"),
           ("direction", "before"), ("length", "before"), ("length", "bare after"), ("length", "bare before"))
TREE = PRESETS["tree128"]


def projection(widths: tuple[int, int], seed: int = 0) -> nn.Sequential:
    """The layers of Redux at these widths, every weight random and what passes of unit variance, with small biases."""
    narrow, wide = widths
    layers = nn.Sequential(nn.Linear(narrow, 3 * wide), nn.SiLU(), nn.Linear(3 * wide, wide)).requires_grad_(False)
    draw = torch.Generator().manual_seed(seed)
    for layer in (layers[0], layers[2]):
        layer.weight.normal_(std=layer.in_features ** -0.5, generator=draw)
        layer.bias.normal_(std=0.1, generator=draw)
    return layers


def features(pictures: int, side: int, width: int, own: float, seed: int = 1) -> Tensor:
    """[pictures, side * side, width]: layer-normed, half of the variance shared by all patches of all pictures."""
    draw = torch.Generator().manual_seed(seed)
    shared = torch.randn(1, 1, width, generator=draw)
    coarse = torch.randn(pictures, width, 4, 4, generator=draw)
    smooth = F.interpolate(coarse, size=(side, side), mode="bicubic").flatten(2).mT
    smooth = smooth / smooth.std()
    noise = torch.randn(pictures, side * side, width, generator=draw)
    return F.layer_norm(shared + (1 - own) ** 0.5 * smooth + own ** 0.5 * noise, (width,))


def weights(side: int) -> Tensor:
    """[T, side * side]: which share every token of the grid has in a pooled one."""
    pooled = pool_grid(torch.eye(side * side)[None], TREE).tokens[0]
    return pooled / pooled.sum(1, keepdim=True)


def measure(widths: tuple[int, int], side: int, own: float, pictures: int) -> dict:
    """{way: {"length", "nearest", "direction"}}, means over all pooled tokens of all pictures."""
    project, share = projection(widths), weights(side)
    seen = features(pictures, side, widths[0], own)
    unpooled = project(seen)
    pooled = {
        "after": pool_grid(unpooled, TREE).tokens, "bare after": share @ unpooled,
        "before": project(pool_grid(seen, TREE).tokens), "bare before": project(share @ seen)}
    units = F.normalize(unpooled, dim=-1)
    lengths, direction = share @ unpooled.norm(dim=-1, keepdim=True), F.normalize(share @ units, dim=-1)
    found = {}
    for way in WAYS:
        unit = F.normalize(pooled[way], dim=-1)
        found[way] = {"length": pooled[way].norm(dim=-1, keepdim=True) / lengths, "nearest": (unit @ units.mT).amax(-1),
                      "direction": (unit * direction).sum(-1)}
    among = units @ units.mT
    among.diagonal(dim1=1, dim2=2).fill_(-1)
    found["not pooled"] = {"nearest": among.amax(-1)}
    return {way: {name: value.mean().item() for name, value in measures.items()} for way, measures in found.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="run.py bench redux", description=__doc__.split("\n\n")[0])
    parser.add_argument("--pictures", type=int, default=PICTURES)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args(argv)
    results, lines = [], []
    for name, widths in WIDTHS.items():
        for side in GRIDS:
            for own in OWN:
                it = measure(widths, side, own, options.pictures)
                results.append({"widths": name, "side": side, "own": own, **it})
                lines.append([f"{name}, {side} x {side}, {own}", *(f"{it[way][key]:.3f}" for key, way in COLUMNS)])
                print(*lines[-1], sep="  ", file=sys.stderr, flush=True)
    page = "\n".join([
        "# A style model's tokens pooled before its projection or after it",
        "",
        f"{table.machine()}; {date.today()}; `python3 run.py bench redux --pictures {options.pictures}`",
        "",
        "Random weights and made-up features: no fitted Redux was at hand, so this says what the two orders do to a "
        "projection of this kind, not how pictures look. *full* has the widths of FLUX.1 Redux (1152, 12288, 4096), *toy* "
        "(48, 432, 144). The last number of a case is the share of a patch's varying features that is its own and not "
        "its neighbours'. Means over the 128 tokens of tree128, each pooled to the mean length of the tokens under its "
        "part. The nodes pool after; before, the projection would run on 128 tokens instead of 729 or 1024.",
        "",
        "*nearest*: cosine to the nearest token of the same picture that is not pooled; *not pooled*: of those to one "
        "another. *direction*: cosine to the mean direction of the tokens under the part. *length*: over their mean "
        "length (*after* is 1 by its making); *bare*: the mean alone, its length not restored.",
        "",
        *table.rows(["case", *(f"{key}, {way}" for key, way in COLUMNS)], lines),
        "",
    ])
    print(page)
    if options.pictures == PICTURES:
        PAGE.write_text(page, encoding="utf-8")
    if options.json:
        print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
