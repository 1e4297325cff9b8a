"""Inversion: embeddings fitted to pictures through the frozen Flux, without an encoder.

Starts, each the same for every picture except the last two:

mean        the mean of the adapter's embeddings of 64 validation pictures
statistics  the mean of the text space with a little noise (`TextSpace.start`): nothing of ours is known
caption     the encoding of the picture's caption with place words, cut to the hierarchy
adapter     the adapter's embedding of the picture

One fit of 400 steps gives the figures of all step counts, since a fit is usable at any step. `adapter` is refined by
fewer steps and a smaller rate. Edits are two for each scene, by the shipped decoder in one pass. The last figure is of
the decoder that was trained on fitted embeddings alone (`sda miniature editor-from-fits`), on embeddings fitted from
`statistics`; None where its file is not there.
"""
from __future__ import annotations

import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ....kernels.embedding import SemanticEmbedding, from_hierarchy
from ....kernels.fit import Fit, FitSettings
from ....kernels.hierarchy import Hierarchy
from ....kernels.precision import autocast
from ....kernels.regions import box_mask, insert
from ....kernels.text_space import TextSpace
from ...frozen.flux import velocity
from ...frozen.region_attention import attend_by_region
from ...objectives.reconstruct import named_hierarchy, regions_for
from ..captions import OPERATIONS, Edit, caption
from ..editor import change_of, has_twin
from ..scenes import Scene, render
from ..text import encode, token_ids
from .blend import AMOUNTS, figures_of, pairs
from .editing import judge, summary
from .kit import RIGHT, composed, partners
from .reconstruction import measure, parse_all
from .system import VARIANTS, Miniature

STEPS = (0, 25, 50, 100, 400)
RATES = {"mean": 0.2, "statistics": 0.2, "caption": 0.2, "adapter": 0.03}
PRESET = "tree64"
EDITED_AT = {"mean": 100, "statistics": 100, "caption": 100, "adapter": 50}
GLOBAL_AT = (0, 100)
AVERAGED = 64  # validation pictures whose mean embedding is the start `mean`
TOGETHER = 16  # pictures fitted by one core
PAINTING = 20  # steps of a fit that count as one picture painted


def painted(count: int, from_fits: bool) -> int:
    """Pictures that are painted for `count` scenes, with the fits' share; from_fits: whether that decoder is there."""
    steps = [max(STEPS)] * len(RATES) + [max(GLOBAL_AT)] * 2 + [EDITED_AT["statistics"], EDITED_AT["mean"]]
    figures = len(STEPS) * len(RATES) + len(GLOBAL_AT) * 2
    fits, edited = sum(-(-each // PAINTING) for each in steps), 2 * (len(RATES) + 2 + from_fits)
    return count * (fits + figures + edited + 2) + 2 * len(AMOUNTS) * pairs(count)


def text_space(system: Miniature) -> TextSpace:
    adapter = system.encoders["tree128"].adapter
    return TextSpace(adapter.text_mean.float(), adapter.text_std.float())


def starts(system: Miniature, scenes: Sequence[Scene], sources: np.ndarray, hierarchy: Hierarchy, seed: int
           ) -> dict[str, SemanticEmbedding]:
    """The embeddings to begin with, by their names; `adapter` only for a hierarchy that the adapter has."""
    space, made = text_space(system), {}
    name = next((n for n, v in VARIANTS.items() if v.hierarchy == hierarchy and n in system.variants), None)
    if name:
        changes = [change_of("validation", i, seed) for i in range(AVERAGED)]
        known = system.embed(np.stack([render(change.source) for change in changes]), name)
        made["mean"] = from_hierarchy(known.tokens.mean(0, keepdim=True).repeat(len(scenes), 1, 1), hierarchy)
        made["adapter"] = system.embed(sources, name)
    made["statistics"] = space.start(hierarchy, len(scenes))
    with torch.no_grad():
        words = encode(system.text, token_ids([caption(scene) for scene in scenes], system.device))[0].float().cpu()
    made["caption"] = space.start_from(words, hierarchy, len(scenes))
    return {name: made[name] for name in RATES if name in made}


def fitted(system: Miniature, latents: Tensor, start: SemanticEmbedding, settings: FitSettings,
           at: Sequence[int]) -> tuple[dict[int, SemanticEmbedding], float]:
    """({steps: the embedding fitted by so many}, seconds of one step of one picture)."""
    space, device = text_space(system), system.device
    grid = tuple(side // 2 for side in latents.shape[-2:])
    attention = attend_by_region(system.flux)
    attention.regions = regions_for(start.hierarchy(), grid, device)

    def flow(x: Tensor, t: Tensor, tokens: Tensor, pooled: Tensor | None) -> Tensor:
        pooled = tokens.new_zeros(len(tokens), system.flux.config.pooled_projection_dim) if pooled is None else pooled
        with autocast(device, system.precision):
            return velocity(system.flux, x, t, tokens, pooled).float()

    def batch(first: int) -> dict[int, Tensor]:
        rows, found = slice(first, first + TOGETHER), {}
        own = replace(start, tokens=start.tokens[rows]).to(device)
        fit = Fit(own, space, settings)
        for count in range(max(at) + 1):
            if count in at:
                found[count] = fit.tokens()[0].cpu()
            if count < max(at):
                fit.step(latents[rows].to(device), flow)
                if count % PAINTING == 0:
                    system.progress(len(own.tokens))
        return found

    threads = torch.get_num_threads()
    workers = threads if device.type == "cpu" else 1
    began = time.monotonic()
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,)) as pool:
            parts = list(pool.map(batch, range(0, len(latents), TOGETHER)))
    finally:
        torch.set_num_threads(threads)
        system.flux.set_attn_processor(system.attention)
    seconds = (time.monotonic() - began) / max(1, max(at)) / len(latents)
    return {n: replace(start, tokens=torch.cat([part[n] for part in parts])) for n in at}, seconds


def two_edits(scenes: Sequence[Scene], split: str, seed: int) -> list[Edit]:
    """Two edits of different operations for every scene: all first ones, then all second ones."""
    found: list[list[Edit]] = []
    for index in range(len(scenes)):
        wanted = [OPERATIONS[(index + k) % len(OPERATIONS)] for k in range(len(OPERATIONS))]
        possible = [change for op in wanted if (change := change_of(split, index, seed, op)).operation == op]
        found.append(possible[:2])
    return [pair[0] for pair in found] + [pair[-1] for pair in found]


def edited(system: Miniature, changes: Sequence[Edit], own: SemanticEmbedding, noise: Tensor, decode) -> dict:
    """{"success", "preservation", "twins": the same two of the edits with a twin}. decode: (embedding, instructions)
    -> the edited embedding."""
    twice = replace(own, tokens=own.tokens.repeat(2, 1, 1))
    made = decode(twice, [change.instruction for change in changes])
    pictures = system.paint_regions(own, [made.tokens], [1.0], noise.repeat(2, 1, 1, 1))
    verdicts = [judge(change, seen) for change, seen in zip(changes, parse_all(pictures))]
    return summary(verdicts) | {"twins": summary([v for v, c in zip(verdicts, changes) if has_twin(c)])}


def run(system: Miniature, scenes: Sequence[Scene], sources: np.ndarray, noise: Tensor, seed: int) -> tuple[dict, dict]:
    """(every figure, as `--json` prints them; further figures for the page) of test scenes."""
    latents, space = system.latents(sources), text_space(system)
    changes = two_edits(scenes, "test", seed)

    def paint(e: SemanticEmbedding) -> np.ndarray:
        return system.paint_regions(e, [e.tokens], [1.0], noise)

    def figures(e: SemanticEmbedding) -> dict[str, float | None]:
        pictures = paint(e)
        found = measure(scenes, parse_all(pictures), sources, pictures)
        return {"f1": found["f1"], "psnr": found["psnr"]}

    def edit(e: SemanticEmbedding, words: Sequence[str]) -> SemanticEmbedding:
        return system.edit(e, words, "parallel")

    fits, kept, edits, distances = {}, {}, {}, {}
    begun = starts(system, scenes, sources, named_hierarchy(PRESET), seed)
    for name, start in begun.items():
        settings = FitSettings(max(STEPS), RATES[name], shift=system.mu, seed=seed)
        made, seconds = fitted(system, latents, start, settings, STEPS)
        fits[name] = {str(n): figures(e) | {"seconds": n * seconds} for n, e in made.items()}
        kept[name] = made[EDITED_AT[name]]
        edits[name] = edited(system, changes, kept[name], noise, edit)
        distances[name] = space.distances(kept[name])
    alone, own_twins = None, None
    if system.editor_from_fits is not None:
        alone = edited(system, changes, kept["statistics"], noise,
                       lambda e, words: system.edit(e, words, "parallel", system.editor_from_fits))
        own_twins = alone.pop("twins")
    settings = FitSettings(EDITED_AT["statistics"], RATES["statistics"], longest=math.inf, shift=system.mu, seed=seed)
    loose, _ = fitted(system, latents, begun["statistics"], settings, (settings.steps,))
    beside = {"statistics, not held": loose[settings.steps], "adapter, not refined": begun["adapter"]}
    edits_beside = {name: edited(system, changes, e, noise, edit) for name, e in beside.items()}
    distances |= {name: space.distances(e) for name, e in beside.items()}

    apart = space.normalise(kept["mean"].tokens) - space.normalise(kept["statistics"].tokens)
    whole = {}
    for name, start in starts(system, scenes, sources, named_hierarchy("global64"), seed).items():
        settings = FitSettings(max(GLOBAL_AT), RATES[name], shift=system.mu, seed=seed)
        made, _ = fitted(system, latents, start, settings, GLOBAL_AT)
        whole[name] = {str(n): figures(e) for n, e in made.items()}

    guests = partners(scenes, seed)
    pictures = np.stack([render(scene) for scene in guests])
    theirs, _ = fitted(system, system.latents(pictures), begun["mean"],
                       FitSettings(EDITED_AT["mean"], RATES["mean"], shift=system.mu, seed=seed), (EDITED_AT["mean"],))
    joined = {}
    for name, (a, b) in {"adapter": (begun["adapter"], system.embed(pictures, PRESET)),
                         "mean": (kept["mean"], theirs[EDITED_AT["mean"]])}.items():
        both = insert(a, b, box_mask(RIGHT))
        joined[name] = {"compose": composed(scenes, guests, paint(both)),
                        "blend": figures_of(system, scenes, a, noise)["evenness"]}
    asides = {"edited": edits_beside, "distances": distances, "global64": whole, "joined": joined,
              "two_starts_apart": float(apart.square().mean().sqrt()), "edits": len(changes),
              "twins": sum(map(has_twin, changes)), "from_fits_twins": own_twins}
    return {"fit": fits, "edited": edits, "decoder_from_fits": alone}, asides
