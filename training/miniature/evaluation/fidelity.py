"""Faithful decoding: how an edit is painted so that what it does not touch stays.

plain             the edited embedding from noise, as the editing part paints it
keep_outside      the same, with the source's tokens outside of the change mask (Keep Outside Mask)
change_mask       the same, with the source's latent held outside of the change mask (Set Latent Noise Mask)
flow_edit         FlowEdit from the source's latent, the source's and the edited embedding as its two prompts
flow_edit_masked  the same, held outside of the change mask
sdedit            from the source's latent under the noise of a time that was chosen on validation scenes
oracle_...        the same six with the adapter's embedding of the true edited picture in place of the edit decoder's

Pixels *outside* are those that the true edit leaves as they were. `psnr_outside` and `ssim_outside` compare the picture
there with the source's, `psnr_target` the whole of it with the true edit; all are means over the pictures. `evaluations`
are those of Flux for one picture, with the change mask's. `change_map` is the AUC with which a score of the 8 x 8 latent
patches, relative to the picture's greatest, tells those in which a pixel truly changes: by the frozen model, and by the
tokens alone.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from ....kernels.algebra import restrict
from ....kernels.change_map import changed, enlarge, patch_change, relative, times, token_change
from ....kernels.embedding import SemanticEmbedding, from_hierarchy
from ....kernels.flow_edit import coupled
from ....kernels.noise import own_noise
from ....kernels.regions import feather
from ...judge.metrics import ssim_map
from ..base import schedule
from ..captions import Edit
from ..editor import has_twin
from ..scenes import SIZE, render
from .editing import STARTS, TRIALS, instructions, judge, summary
from .reconstruction import parse_all, psnr
from .system import Miniature

DECODES = ("plain", "keep_outside", "change_mask", "flow_edit", "flow_edit_masked", "sdedit")
STEPS = 20
NOISES, THRESHOLD, GROW, FEATHER = 4, 0.03, 1, 0.05  # the defaults of Change Mask and of Keep Outside Mask
CELLS = 2  # latent cells to a side of a patch
MAPPED = 2 * NOISES  # evaluations that a change mask costs
PATCH = 16  # pixels to a side of a patch


def painted(count: int) -> int:
    """Pictures that are painted for `count` scenes."""
    return 2 * len(DECODES) * count + len(STARTS) * min(count, TRIALS)


class Decoder:
    """One set of scenes, their latents and noise, to be painted in every way."""

    def __init__(self, system: Miniature, own: SemanticEmbedding, latents: Tensor, noise: Tensor, seed: int) -> None:
        self.system, self.own, self.latents, self.noise, self.seed = system, own, latents, noise, seed

    def change(self, edited: SemanticEmbedding) -> Tensor:
        """[N, 8, 8] in 0..1: the change map of the edited embeddings."""
        found = torch.zeros(())
        for number, time in enumerate(times(NOISES)):
            x = (1 - time) * self.latents + time * self._drawn(slice(None), number)
            one, other = (self.system.velocities(e, x, time) for e in (edited, self.own))
            found = found + patch_change(one, other)
        return relative(found)

    def all(self, edited: SemanticEmbedding, change: Tensor, start: float) -> dict[str, np.ndarray]:
        """The pictures of every way, in the order of DECODES."""
        mask = changed(change, THRESHOLD, GROW)
        inside = mask.repeat_interleave(CELLS, 1).repeat_interleave(CELLS, 2)[:, None] > 0
        kept = []
        for number, each in enumerate(enlarge(mask, SIZE, SIZE, PATCH)):
            one = slice(number, number + 1)
            soft = feather(each, FEATHER)
            kept.append(restrict(_rows(edited, one), _rows(self.own, one), soft).tokens)
        kept = from_hierarchy(torch.cat(kept), self.own.hierarchy())
        made = (self.anew(edited), self.anew(kept), self.anew(edited, inside=inside), self.flow_edit(edited),
                self.flow_edit(edited, inside), self.anew(edited, start))
        return dict(zip(DECODES, made))

    def anew(self, edited: SemanticEmbedding, start: float = 1.0, inside: Tensor | None = None) -> np.ndarray:
        """From noise, or from the source's latent under that of the time `start`, the rest held at the source's."""
        def work(rows: slice) -> Tensor:
            source, noise, tokens, free = self._on_device(rows, self.latents, self.noise, edited.tokens, inside)
            x = (1 - start) * source + start * noise
            for now, later in self._steps(start):
                if free is not None:
                    x = torch.where(free, x, (1 - now) * source + now * noise)
                x = x + (later - now) * self.system.velocity(x, now, tokens)
            return x if free is None else torch.where(free, x, source)

        return self.system.paint_by(self.own, len(self.latents), work)

    def flow_edit(self, edited: SemanticEmbedding, inside: Tensor | None = None) -> np.ndarray:
        def work(rows: slice) -> Tensor:
            source, before, after, free = self._on_device(rows, self.latents, self.own.tokens, edited.tokens, inside)
            z = source
            for step, (now, later) in enumerate(self._steps()):
                at_edited, at_source = coupled(z, source, self._drawn(rows, step, 0).to(z), torch.tensor(now))
                one, other = (self.system.velocity(x, now, tokens) for x, tokens in ((at_edited, after), (at_source, before)))
                z = z + (later - now) * (one - other)
                z = z if free is None else torch.where(free, z, source)
            return z

        return self.system.paint_by(self.own, len(self.latents), work)

    def _steps(self, start: float = 1.0) -> list[tuple[float, float]]:
        when = schedule(STEPS, self.system.mu, start).tolist()
        return list(zip(when[:-1], when[1:]))

    def _drawn(self, rows: slice, *key: int) -> Tensor:
        return own_noise(self.latents.shape[1:], range(len(self.latents))[rows], self.seed, *key)

    def _on_device(self, rows: slice, *tensors: Tensor | None) -> list[Tensor | None]:
        return [None if each is None else each[rows].to(self.system.device) for each in tensors]


def _rows(e: SemanticEmbedding, rows: slice) -> SemanticEmbedding:
    return SemanticEmbedding(e.tokens[rows], e.boxes, e.levels, e.strengths)


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
    decoder = Decoder(system, own, system.latents(sources), noise, seed)

    def worth(start: float) -> float:
        pictures = decoder.anew(edited, start)
        return sum(v or 0 for v in summary([judge(c, f) for c, f in zip(changes, parse_all(pictures))]).values())

    return max(STARTS, key=worth)


def run(system: Miniature, changes: Sequence[Edit], sources: np.ndarray, noise: Tensor, seed: int) -> tuple[dict, dict]:
    """(every figure, as `--json` prints them; further figures for the page) of test edits."""
    targets = np.stack([render(change.target) for change in changes])
    start = best_start(system, min(len(changes), TRIALS), seed)
    own, latents = system.embed(sources, "tree128"), system.latents(sources)
    decoder = Decoder(system, own, latents, noise, seed)
    made = {"": system.edit(own, [change.instruction for change in changes], "parallel"),
            "oracle_": system.embed(targets, "tree128")}
    begun = len(schedule(STEPS, system.mu, start)) - 1
    cost = dict(zip(DECODES, (STEPS, STEPS + MAPPED, STEPS + MAPPED, 2 * STEPS, 2 * STEPS + MAPPED, begun)))
    truth = patches_of(truly_changed(sources, targets))
    decodes, maps = {}, {}
    for prefix, edited in made.items():
        change = decoder.change(edited)
        maps[prefix] = {"model": auc(change.numpy(), truth),
                        "tokens": auc(relative(token_change(edited, own, truth.shape[1:])).numpy(), truth)}
        for name, pictures in decoder.all(edited, change, start).items():
            decodes[prefix + name] = figures(changes, sources, targets, pictures) | {"evaluations": cost[name]}
    ceiling = figures(changes, sources, targets, system.decode(latents))
    asides = {"oracle_map": maps["oracle_"], "start": start, "ceiling": ceiling["psnr_outside"],
              "twins": sum(map(has_twin, changes))}
    return {"decode": decodes, "change_map": maps[""]}, asides
