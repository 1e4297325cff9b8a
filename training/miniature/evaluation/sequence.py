"""Five instructions in a row on one picture, which is to stay the source wherever none of them reaches.

Every turn embeds the last turn's picture, edits that and takes over only the pixels in the change mask (Emu Edit's
thresholding between turns, arXiv 2311.10089). So what no turn touches is the source's own pixels, not a fifth repainting of
them.

turns             PSNR of the pixels that none of the instructions up to a turn changes, after each, a mean over the chains
oracle            the same with the adapter's embedding of each true edited picture: what the instructions that were not
                  followed, or followed elsewhere, take away is not in it
repainted         as `turns`, where a turn's flow edit is taken as a whole
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..captions import Edit
from ..scenes import render
from .decoder import Decoder
from .editing import judge, summary
from .reconstruction import parse_all, psnr
from .system import Miniature
from .turns import LENGTH, chain_of, kept
from .ways import flow_edit, flow_edit_composited

CHAINS = 16
KINDS = {"turns": flow_edit_composited, "oracle": flow_edit_composited, "repainted": lambda d, edited, _: flow_edit(d, edited)}


def painted(count: int) -> int:
    """Pictures that are painted for an evaluation of `count` scenes."""
    return len(KINDS) * LENGTH * min(CHAINS, count)


def pictures(system: Miniature, chains: Sequence[Sequence[Edit]], seed: int, kind: str) -> list[np.ndarray]:
    """The sources, and what is there after each turn, [N, 128, 128, 3] uint8 each."""
    made = [np.stack([render(chain[0].source) for chain in chains])]
    noise = system.noise("test", range(len(chains)), seed)
    for turn in range(LENGTH):
        own = system.embed(made[-1], "tree128")
        if kind == "oracle":
            edited = system.embed(np.stack([render(chain[turn].target) for chain in chains]), "tree128")
        else:
            edited = system.edit(own, [chain[turn].instruction for chain in chains], "parallel")
        decoder = Decoder(system, made[-1], own, noise, seed + turn)
        made.append(KINDS[kind](decoder, edited, decoder.change(edited)))
    return made


def untouched(chains: Sequence[Sequence[Edit]]) -> list[np.ndarray]:
    """[N, 128, 128] bool after each turn: the pixels that no instruction up to it changes."""
    masks, free = [], True
    for turn in range(LENGTH):
        before, after = (np.stack([render(getattr(chain[turn], side)) for chain in chains]) for side in ("source", "target"))
        free = free & (before == after).all(-1)
        masks.append(free)
    return masks


def run(system: Miniature, count: int, seed: int) -> dict[str, dict]:
    """{kind: {"turns": [dB after each], "success": of the fifth instruction, "preservation": the share of the things that
    none of the five names that are found again}}."""
    chains = [chain_of(index, seed) for index in range(min(CHAINS, count))]
    masks, figures = untouched(chains), {}
    for kind in KINDS:
        source, *made = pictures(system, chains, seed, kind)
        found = parse_all(made[-1])
        figures[kind] = {
            "turns": [float(np.mean([psnr(a[o], b[o]) for a, b, o in zip(source, now, free)])) for now, free in zip(made, masks)],
            "success": summary([judge(chain[-1], seen) for chain, seen in zip(chains, found)])["success"],
            "preservation": kept(chains, found),
        }
    return figures
