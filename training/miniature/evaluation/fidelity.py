"""Faithful decoding: how an edit is painted so that what it does not touch stays.

plain             the edited embedding from noise, as the editing part paints it
keep_outside      the same, with the source's tokens outside of the change mask (Keep Outside Mask)
change_mask       the same, with the source's latent held outside of the change mask (Set Latent Noise Mask)
flow_edit         FlowEdit from the source's latent at time 0.9, the source's and the edited embedding as its two prompts
flow_edit_masked  the same, held outside of the change mask
flow_edit_composited
                  the free flow edit, and the source's own pixels outside of a change mask that is feathered, not grown
gate_rows         the edited embedding from noise; patches outside of the change mask read the source's keys and values, of
                  a row of the same batch and noise (Source Gate)
gate_lora         the edited embedding from noise, by Flux with the gate's LoRA; all patches read the source's clean ones, which
                  stand behind the picture's (Reference Gate without a mask)
rf_inversion, rf_solver, fireflow, uniedit
                  up from the source's latent and down again (`solvers`)
sdedit            from the source's latent under the noise of a time that was chosen on validation scenes
oracle_...        all of these with the adapter's embedding of the true edited picture in place of the edit decoder's

Pixels *outside* are those that the true edit leaves as they were. `psnr_outside` and `ssim_outside` compare the picture
there with the source's, `psnr_target` the whole of it with the true edit; all are means over the pictures. `evaluations`
are those of Flux for one picture, with the change mask's. `change_map` is the AUC with which a score of the 8 x 8 latent
patches, relative to the picture's greatest, tells those in which a pixel truly changes: by the frozen model, and by the
tokens alone. `turns` is what `sequence` measures.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from ....kernels.change_map import relative, token_change
from ...judge.metrics import ssim_map
from ..captions import Edit
from ..editor import has_twin
from ..scenes import SIZE, render
from . import sequence
from .decoder import PATCH, Decoder, Way
from .editing import STARTS, TRIALS, instructions, judge, summary
from .gated import GATED
from .reconstruction import parse_all, psnr
from .solvers import SOLVERS
from .system import Miniature
from .ways import OURS, anew

WAYS: tuple[Way, ...] = (*OURS, *GATED, *SOLVERS)  # the ways of other files are added here
DECODES = tuple(way.name for way in WAYS)


def painted(count: int) -> int:
    """Pictures that are painted for `count` scenes."""
    return 2 * len(DECODES) * count + len(STARTS) * min(count, TRIALS) + sequence.painted(count)


def auc(score: np.ndarray, truth: np.ndarray) -> float | None:
    """The share of pairs of a true and an untrue place in which the true one scores higher, ties half; None without."""
    score, truth = score.ravel(), truth.ravel()
    yes, no = int(truth.sum()), int((~truth).sum())
    if not yes or not no:
        return None
    return float((rankdata(score)[truth].sum() - yes * (yes + 1) / 2) / (yes * no))


def truly_changed(sources: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """[N, 128, 128]: pixels that the true edit changes."""
    return (sources != targets).any(-1)


def patches_of(pixels: np.ndarray) -> np.ndarray:
    """[N, 128, 128] -> [N, 8, 8]: patches in which any pixel is set."""
    side = SIZE // PATCH
    return pixels.reshape(len(pixels), side, PATCH, side, PATCH).any((2, 4))


def figures(changes: Sequence[Edit], sources: np.ndarray, targets: np.ndarray, pictures: np.ndarray) -> dict:
    verdicts = [judge(change, seen) for change, seen in zip(changes, parse_all(pictures))]
    outside = ~truly_changed(sources, targets)
    a, b = (torch.from_numpy(x).movedim(-1, 1).float() / 255 for x in (sources, pictures))
    similar = ssim_map(a, b).mean(1).numpy()
    return summary(verdicts) | {
        "twins": summary([v for v, change in zip(verdicts, changes) if has_twin(change)]),
        "psnr_outside": float(np.mean([psnr(s[o], p[o]) for s, p, o in zip(sources, pictures, outside)])),
        "ssim_outside": float(np.mean([each[o].mean() for each, o in zip(similar, outside)])),
        "psnr_target": float(np.mean([psnr(t, p) for t, p in zip(targets, pictures)])),
    }


def best_start(system: Miniature, count: int, seed: int) -> float:
    """The time of STARTS from which SDEdit has the highest success + preservation on edits of validation scenes."""
    changes = instructions("validation", count, seed)
    sources = np.stack([render(change.source) for change in changes])
    own = system.embed(sources, "tree128")
    edited = system.edit(own, [change.instruction for change in changes], "parallel")
    noise = system.noise("validation", range(count), seed)
    decoder = Decoder(system, sources, own, noise, seed)

    def worth(start: float) -> float:
        pictures = anew(decoder, edited, start)
        return sum(v or 0 for v in summary([judge(c, f) for c, f in zip(changes, parse_all(pictures))]).values())

    return max(STARTS, key=worth)


def run(system: Miniature, changes: Sequence[Edit], sources: np.ndarray, noise: Tensor, seed: int) -> tuple[dict, dict]:
    """(every figure, as `--json` prints them; further figures for the page) of test edits."""
    targets = np.stack([render(change.target) for change in changes])
    start = best_start(system, min(len(changes), TRIALS), seed)
    own = system.embed(sources, "tree128")
    decoder = Decoder(system, sources, own, noise, seed, start)
    made = {"": system.edit(own, [change.instruction for change in changes], "parallel"),
            "oracle_": system.embed(targets, "tree128")}
    truth = patches_of(truly_changed(sources, targets))
    decodes, maps = {}, {}
    for prefix, edited in made.items():
        change = decoder.change(edited)
        maps[prefix] = {"model": auc(change.numpy(), truth),
                        "tokens": auc(relative(token_change(edited, own, truth.shape[1:])).numpy(), truth)}
        for way in WAYS:
            seen = figures(changes, sources, targets, way.paint(decoder, edited, change))
            decodes[prefix + way.name] = seen | {"evaluations": way.evaluations(decoder)}
    chains = sequence.run(system, len(changes), seed)
    ceiling = figures(changes, sources, targets, system.decode(decoder.latents))
    asides = {"oracle_map": maps["oracle_"], "start": start, "ceiling": ceiling["psnr_outside"],
              "twins": sum(map(has_twin, changes)), "chains": chains}
    return {"decode": decodes, "change_map": maps[""], "turns": chains["turns"]["turns"]}, asides
