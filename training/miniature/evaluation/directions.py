"""Attribute edits by directions: one word ("green", "circle", "large") pushes one thing of a real test picture.

Every scene gets one attribute that a thing of it can take, colours, shapes and sizes in turn, and the region of that thing
(the patches that its box touches, two pixels wider), the same for all methods:

fluxspace       Attribute Edit with the raw strength and the mask threshold that were best on validation scenes
fluxspace_auto  Attribute Edit at strength 1 of the scale auto, without a mask of its own: nothing was chosen
appended        the word beside the picture's embedding, in the region (Regional Prompt, mode join), as strong as was best on
                validation scenes
guider          Edit Guider from the source's embedding towards that of the edit decoder, told a whole instruction, to 1;
                its language has no sizes, which fail there
rf_inversion    RF-Inversion up from the picture, and fluxspace_auto on the way down

`success`: the attribute is seen on a thing at the subject's place. `kept`: share of the other things that are found as they
were. `psnr_outside`: of the pixels that the true edit leaves alone, against the source. `monotonic`: share of the pictures
that move away from the unedited one at every quarter of the dial, as the kit measures Edit Guider's strength. `nearer`: of
those in whose region every quarter comes nearer to the true edit, or stays within 0.02 of the whole way. `mask`
is the AUC with which the attribute's own mask, without a region, tells the patches that truly change: chance is 0.5, since
any thing may hear a word. `cost` is the time of a forward with one direction over that of a plain one.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ....kernels import inversion
from ....kernels.attention import Regions
from ....kernels.steering import Push
from ....kernels.visibility import region_bias
from ...engine.timing import ratios
from ..captions import Edit
from ..scenes import Scene, render
from ..score import distance, matches
from ..text import encode, token_ids
from .attributes import KINDS, attribute_of, box_of, region_of
from .decoder import PATCH, Decoder
from .editing import REACH, same_and_near
from .fidelity import auc, patches_of, truly_changed
from .kit import STILL
from .reconstruction import parse_all, psnr
from .sheet import sheet
from .solvers import ETA, GAMMA, STOP
from .steered import Steered
from .system import Miniature

DIAL = (0.25, 0.5, 0.75, 1.0)
RAW, THRESHOLDS = (5.0, 10.0, 20.0), (0.0, 0.5)  # the paper's, and beyond, as this model asks for it
WEIGHTS = (1.0, 8.0, 64.0)  # of the appended word: it stands beside 128 tokens
TRIALS = 12  # validation scenes on which they are chosen
TOLERANCE = 0.02
TURNS = 15  # of a steered and a plain forward
WORD = 2  # tokens of a bare word: itself and the end mark
SHOWN = 10  # trials on the page's picture
METHODS = ("fluxspace", "fluxspace_auto", "appended", "guider", "rf_inversion")

Paint = Callable[[float], np.ndarray]


class Trials:
    """One attribute for each scene of a split, and what paints it at any place of a dial."""

    def __init__(self, system: Miniature, split: str, count: int, seed: int) -> None:
        self.changes, self.words = map(list, zip(*(attribute_of(split, index, seed) for index in range(count))))
        self.sources, self.targets = (np.stack([render(each) for each in scenes])
                                      for scenes in zip(*((c.source, c.target) for c in self.changes)))
        self.regions = np.stack([region_of(change) for change in self.changes])
        own = system.embed(self.sources, "tree128")
        self.decoder = Decoder(system, self.sources, own, system.noise(split, range(count), seed), seed)
        self.edited = system.edit(own, [change.instruction for change in self.changes], "parallel").tokens
        for row, change in enumerate(self.changes):
            if not change.instruction:  # no words for it
                self.edited[row] = own.tokens[row]
        with torch.no_grad():
            self._texts = tuple(encode(system.text, token_ids(texts, system.device))[0]
                                for texts in (self.words, [""] * count))

    def plain(self) -> np.ndarray:
        return self._paint(lambda rows, x, now, tokens: self.decoder.velocity(x, now, tokens))

    def steered(self, strength: float, bounded: bool, threshold: float, inverted: bool = False) -> np.ndarray:
        where = torch.from_numpy(self.regions).float().flatten(1)
        with Steered(self.decoder) as steered:
            def velocity(rows: slice, x: Tensor, now: float, tokens: Tensor) -> Tensor:
                push = Push(strength, bounded, threshold, None, where[rows].to(x.device))
                return steered.velocity(x, now, tokens, self._spoken(rows), push)

            return self._inverted(velocity) if inverted else self._paint(velocity)

    def appended(self, weight: float) -> np.ndarray:
        decoder, system = self.decoder, self.decoder.system
        own, grid = decoder.own, self.regions.shape[1:]
        strengths = torch.cat([own.strengths, torch.full((WORD,), float(np.log(weight)))])
        bias = torch.stack([region_bias(torch.cat([own.boxes, box_of(region).expand(WORD, -1)]), strengths, grid, len(strengths))
                            for region in self.regions])

        def velocity(rows: slice, x: Tensor, now: float, tokens: Tensor) -> Tensor:
            with system.attention.under(Regions(bias[rows].to(system.device))):
                return decoder.velocity(x, now, torch.cat([tokens, self._spoken(rows)[0][:, :WORD]], 1))

        return self._paint(velocity)

    def guided(self, strength: float) -> np.ndarray:
        def velocity(rows: slice, x: Tensor, now: float, tokens: Tensor) -> Tensor:
            before, after = (self.decoder.velocity(x, now, each)
                             for each in (tokens, self.edited[rows].to(tokens)))
            return before + strength * (after - before)

        return self._paint(velocity)

    def heard(self) -> Tensor:
        """[N, 64]: the attribute's own mask, its mean over blocks and over four noises, without a region."""
        decoder, found = self.decoder, []
        everywhere = torch.ones(1, self.regions[0].size, device=decoder.system.device)

        def work(rows: slice) -> Tensor:
            noise, source, tokens = decoder.on_device(rows, decoder.noise, decoder.latents, decoder.own.tokens)
            parts: list[Tensor] = []
            for now in (0.2, 0.4, 0.6, 0.8):
                # At the least threshold that is one: the kernel's sigmoid never falls below 0.006.
                push = Push(0.0, False, 1e-3, None, everywhere)
                steered.velocity((1 - now) * source + now * noise, now, tokens, self._spoken(rows), push, parts.append)
            found.append((rows.start, torch.stack(parts).mean(0)))
            return source

        with Steered(decoder) as steered:
            decoder.paint(work)
        return torch.cat([part for _, part in sorted(found, key=lambda each: each[0])])

    def cost(self) -> float:
        """Seconds of a forward with a direction over those of a plain one, of one picture."""
        decoder, found = self.decoder, {}

        def work(rows: slice) -> Tensor:
            noise, tokens = decoder.on_device(slice(0, 1), decoder.noise, decoder.own.tokens)
            push = Push(1.0, True, 0.5, None, torch.ones(1, self.regions[0].size, device=noise.device))
            ways = {"plain": lambda: decoder.velocity(noise, 0.5, tokens),
                    "steered": lambda: steered.velocity(noise, 0.5, tokens, self._spoken(slice(0, 1)), push)}
            found.update(ratios(ways, decoder.system.device.type, TURNS))
            return noise

        with Steered(decoder) as steered:
            decoder.system.paint_by(decoder.own, 1, work)
        return found["steered"]

    def _spoken(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Texts [B, L, D] of the bare words, and of as many empty prompts."""
        return tuple(text[rows] for text in self._texts)

    def _paint(self, velocity: Callable[[slice, Tensor, float, Tensor], Tensor]) -> np.ndarray:
        decoder = self.decoder

        def work(rows: slice) -> Tensor:
            x, tokens = decoder.on_device(rows, decoder.noise, decoder.own.tokens)
            for now, later in decoder.steps():
                x = x + (later - now) * velocity(rows, x, now, tokens)
            return x

        return decoder.paint(work)

    def _inverted(self, velocity: Callable[[slice, Tensor, float, Tensor], Tensor]) -> np.ndarray:
        decoder = self.decoder
        times = [*(now for now, _ in decoder.steps()), 0.0]

        def work(rows: slice) -> Tensor:
            source, noise, tokens = decoder.on_device(rows, decoder.latents, decoder.noise, decoder.own.tokens)
            *_, top = inversion.pulled(source, times[::-1], lambda x, t: decoder.velocity(x, t, tokens), noise, GAMMA)
            *_, x = inversion.held(top, times, lambda x, t: velocity(rows, x, t, tokens), source, ETA, STOP)
            return x

        return decoder.paint(work)


def seen(change: Edit, found: Scene) -> bool:
    """Whether a thing at the subject's place has the attribute."""
    there = [thing for thing in found.things if distance(thing, change.result) <= REACH]
    return any(getattr(thing, change.operation) == getattr(change.result, change.operation) for thing in there)


def alone(change: Edit, found: Scene) -> bool:
    """Whether a thing is there that the edit has made, in colour, shape and size."""
    new = change.result
    return any((thing.name, thing.size) == (new.name, new.size) and distance(thing, new) <= REACH for thing in found.things)


def succeeded(trials: Trials, found: Sequence[Scene]) -> list[bool]:
    return [seen(change, each) for change, each in zip(trials.changes, found)]


def untouched(change: Edit) -> tuple:
    return tuple(thing for thing in change.source.things if thing != change.subject)


def figures(trials: Trials, dial: Sequence[np.ndarray]) -> dict[str, float]:
    """dial: the pictures at 0 and at every place of DIAL."""
    full, kinds = parse_all(dial[-1]), [change.operation for change in trials.changes]
    success = succeeded(trials, full)
    kept = [len(matches(Scene(c.source.ground, untouched(c)), found, same_and_near)) for c, found in zip(trials.changes, full)]
    wanted = sum(len(untouched(change)) for change in trials.changes)
    outside = ~truly_changed(trials.sources, trials.targets)
    return {
        "success": float(np.mean(success)), "kept": sum(kept) / wanted if wanted else 1.0,
        "psnr_outside": float(np.mean([psnr(s[o], p[o]) for s, p, o in zip(trials.sources, dial[-1], outside)])),
        "monotonic": steady(dial),
        "nearer": float(np.mean(rising(trials, dial))),
        "alone": float(np.mean([alone(change, found) for change, found in zip(trials.changes, full)])),
        "kinds": {kind: float(np.mean([s for s, k in zip(success, kinds) if k == kind])) for kind in KINDS if kind in kinds},
    }


def steady(dial: Sequence[np.ndarray]) -> float:
    """Share of the pictures that move ever further from the first."""
    moved = np.stack([abs(pictures.astype(np.float32) - dial[0]).mean((1, 2, 3)) for pictures in dial])
    return float((np.diff(moved, axis=0) > -STILL).all(0).mean())


def rising(trials: Trials, dial: Sequence[np.ndarray]) -> list[bool]:
    """Whether the region of each trial never moves away from the true edit."""
    pixels = trials.regions.repeat(PATCH, 1).repeat(PATCH, 2)
    verdicts = []
    for row, inside in enumerate(pixels):
        def apart(picture: np.ndarray, row=row, inside=inside) -> float:
            return float(((picture[row][inside].astype(float) - trials.targets[row][inside]) ** 2).mean())

        whole = apart(trials.sources)
        steps = [apart(picture) / whole for picture in dial]
        verdicts.append(all(later <= now + TOLERANCE for now, later in zip(steps, steps[1:])))
    return verdicts


def choose(system: Miniature, count: int, seed: int) -> tuple[tuple[float, float], float]:
    """((raw strength, threshold) of fluxspace, weight of the appended word) with the highest success + kept on validation
    scenes."""
    trials = Trials(system, "validation", count, seed)

    def worth(picture: np.ndarray) -> float:
        found = figures(trials, [picture])
        return found["success"] + found["kept"]

    raw = [(strength, threshold) for threshold in THRESHOLDS for strength in RAW]
    return (max(raw, key=lambda each: worth(trials.steered(each[0], False, each[1]))),
            max(WEIGHTS, key=lambda weight: worth(trials.appended(weight))))


def painted(count: int) -> int:
    """Pictures that are painted for `count` scenes."""
    tries = len(RAW) * len(THRESHOLDS) + len(WEIGHTS)
    return count * (2 + len(METHODS) * len(DIAL)) + tries * min(count, TRIALS) + 1  # the one that is timed


def run(system: Miniature, count: int, seed: int) -> tuple[dict, dict]:
    """(every figure, as `--json` prints them; further figures for the page) of the first `count` test scenes."""
    (strength, threshold), weight = choose(system, min(count, TRIALS), seed)
    trials = Trials(system, "test", count, seed)
    ways: dict[str, Paint] = {
        "fluxspace": lambda d: trials.steered(strength * d, False, threshold),
        "fluxspace_auto": lambda d: trials.steered(d, True, 0.0),
        "appended": lambda d: trials.appended(weight * d),
        "guider": trials.guided,
        "rf_inversion": lambda d: trials.steered(d, True, 0.0, inverted=True),
    }
    plain, found, dials = trials.plain(), {}, {}
    for name in METHODS:
        dials[name] = [plain, *(ways[name](place) for place in DIAL)]
        found[name] = figures(trials, dials[name])
    truth = patches_of(truly_changed(trials.sources, trials.targets))
    kinds, entire, nearer = ({name: values.pop(key) for name, values in found.items()} for key in ("kinds", "alone", "nearer"))
    results = {"directions": found, "mask": {"auc": auc(trials.heard().numpy(), truth)}, "cost": {"ratio": trials.cost()}}
    nothing = figures(trials, [plain])
    # The ends of every dial are among the figures already.
    curve = {name: [nothing["success"], *(float(np.mean(succeeded(trials, parse_all(p)))) for p in dial[1:-1]), found[name]["success"]]
             for name, dial in dials.items()}
    return results, {"kinds": kinds, "alone": entire, "nearer": nearer, "strength": strength, "threshold": threshold,
                     "weight": weight, "dial": DIAL,
                     "plain": {key: nothing[key] for key in ("success", "kept", "psnr_outside")},
                     "curve": curve,
                     "pictures": {"directions.jpg": shown(trials, dials["fluxspace_auto"])}}


def shown(trials: Trials, dial: Sequence[np.ndarray]) -> Image.Image:
    """The first trials: the source, every place of a dial, and the true edit."""
    columns = [trials.sources, *dial, trials.targets]
    rows = [[column[row] for column in columns] for row in range(min(SHOWN, len(trials.words)))]
    return sheet(rows, ["source", "0", *(f"{place:g}" for place in DIAL), "true edit"], trials.words)
