"""Stage 2b: the tiny text encoder and the tiny Flux, trained together from captions (and instructions) to latents.

Beside the flow loss, a linear head on the image stream of a middle block names what each patch shows: representation
alignment (REPA, arXiv 2410.06940) with the scene's truth as the teacher. A second head predicts the patch's row and
column, which rotary positions alone do not give a patch directly. Flux's file has neither head.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import checkpoint
from ...kernels.precision import autocast
from ..config import RunConfig
from ..engine import Ahead, Step, launch
from ..files import file_hash
from ..frozen.flux import Tap, build_flux, from_bfl, shifted, to_bfl, velocity
from ..frozen.region_attention import attend_by_region
from ..objectives.times import sample_times
from .captions import caption, describe, edit, where
from .drawing import labels
from .parser import parse
from .scenes import Scene, generator, scene
from .score import colour_place, f1, shape_place
from .stored import Scenes, take, training_latents, training_scenes
from .text import encode, load_text_encoder, save_text_encoder, token_ids
from .vae import load_vae, to_pixels

FLUX = dict(hidden_size=192, num_heads=3, depth=3, depth_single_blocks=6, axes_dim=[8, 28, 28], context_in_dim=192,
            vec_in_dim=192, in_channels=8, mlp_ratio=4, theta=10000, qkv_bias=True, guidance_embed=False, patch_size=2,
            latent={"channels": 8, "scale": 1.0, "shift": 0.0, "downsample": 8}, sampling_shift_mu=0.5)
VALIDATED = 48  # number of scenes of a validation
TAPPED = 1  # the single block whose image stream the alignment head reads
# share of places given as coordinates: they are more exact than words, so they teach more
FINE = 0.7


@dataclass(frozen=True)
class Config:
    run: RunConfig
    vae: Path
    text: Path
    """The text encoder to start from (stage `text`)."""
    export_flux: Path
    export_text: Path
    cache: Path
    """Folder of what is made once of the training scenes."""
    scenes: int = 160_000
    """Number of distinct training scenes, which are visited again and again."""
    start: Path | None = None
    """An exported Flux to go on from; None: a new one."""
    mu: float = 1.2
    """Time shift of training and sampling. The layout is decided while there is little but noise."""
    opening: int = 2000
    """Number of first steps whose times all lie above 0.9, where only the text tells the picture."""
    uniform: float = 0.2
    """Share of uniform times beside the shifted logit-normal ones."""
    drop_text: float = 0.1
    """Share of empty prompts, for classifier-free guidance."""
    drop_pooled: float = 0.5
    """Share of zero pooled vectors, such as the adapter will give."""
    instructions: float = 0.25
    """Share of texts that are a source caption with an instruction. Their picture is the edited scene."""
    align: float = 0.6
    """Weight of the alignment loss."""
    place: float = 0.1
    """Weight of predicting the patch's own place."""
    text_scale: float = 0.3
    """Learning rate of the text encoder as a share of Flux's: it already knows its words."""


def training_text(truth: Scene, rng: np.random.Generator, instructions: float) -> str:
    """A caption of a scene; or, for a share of the scenes, a source scene and the instruction that leads to it (the
    inverse of a random edit of the scene)."""
    if rng.random() < instructions:
        change = edit(truth, rng, fine=rng.random() < FINE)
        inverse = inverse_instruction(change, fine=rng.random() < FINE)
        if inverse is not None:
            return f"{caption(change.target, rng, fine=rng.random() < FINE)}. {inverse}"
    return caption(truth, rng, fine=rng.random() < FINE)


def inverse_instruction(change, fine: bool) -> str | None:
    """The instruction that turns the edited scene back into its source. None where it cannot be said exactly."""
    old, new = change.subject, change.result
    if change.operation == "remove":
        return f"add {describe(old, True)}" if fine else None
    if change.operation == "add":
        return f"remove the {new.name}"
    if change.operation == "recolour":
        return f"make the {new.name} {old.colour}"
    if change.operation == "replace":
        return f"replace the {new.name} with a {old.name}"
    return f"move the {new.name} {where(old.x, old.y, old.place, True).replace('at', 'to', 1)}" if fine else None


def name_loss(named: Tensor, labels: Tensor, told: Tensor | None = None) -> Tensor:
    """Cross-entropy of predicted against true patch labels, [B, 64, 15] both (drawing.labels), over samples whose
    scene the model was `told` ([B] bool; None: all)."""
    colours, shapes = named.float().split([10, 5], -1)
    entropy = (-(labels[..., :10] * colours.log_softmax(-1)).sum(-1)
               - (labels[..., 10:] * shapes.log_softmax(-1)).sum(-1))
    return entropy.mean() if told is None else (entropy.mean(1) * told).mean()


@lru_cache(maxsize=1)
def epoch_order(seed: int, visit: int, scenes: int) -> np.ndarray:
    """The order in which an epoch visits the scenes."""
    return np.random.default_rng([seed, visit]).permutation(scenes)


def place_loss(placed: Tensor) -> Tensor:
    """Cross-entropy of predicted against true row and column of patches, [B, 64, 16] logits: 8 rows, 8 columns."""
    where = torch.arange(8, device=placed.device)
    rows, columns = placed.float().unflatten(1, (8, 8)).split(8, -1)
    entropy = F.cross_entropy(rows.flatten(0, 2), where[None, :, None].expand(rows.shape[:3]).flatten())
    return entropy + F.cross_entropy(columns.flatten(0, 2), where.expand(columns.shape[:3]).flatten())


def prepare(config: Config, scenes: Scenes, step: Step) -> dict[str, Tensor]:
    """All that a step needs beside the latents: scene numbers [B], their codes, token ids [B, L], times, noise and what
    is dropped. Epochs are random permutations."""
    first = step.number * step.batch
    visit = first // len(scenes)
    numbers = epoch_order(step.seed, visit, len(scenes))[(first + np.array(step.positions)) % len(scenes)]
    texts = [training_text(scenes[n], generator("train", int(n), purpose=100 + visit), config.instructions) for n in numbers]
    ids = token_ids(texts)
    t = sample_times(step, config.mu, config.uniform)
    if step.number < config.opening:
        t = 0.9 + 0.1 * t
    noise = step.randn(8, 16, 16)
    empty = step.rand() < config.drop_text
    return {"numbers": torch.from_numpy(numbers), **scenes.of(numbers), "t": t, "noise": noise,
            "ids": torch.where(empty[:, None], token_ids([""]), ids), "empty": empty,
            "keep_pooled": step.rand(1) >= config.drop_pooled}


def begin_at_nothing(flux) -> None:
    """Zero output and zero modulation (adaLN-zero, as DiT): the first steps learn the mean."""
    for block in (*flux.transformer_blocks, *flux.single_transformer_blocks):
        for name, layer in block.named_modules():
            if name.endswith("linear") and isinstance(layer, nn.Linear) and name.startswith("norm"):
                nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    nn.init.zeros_(flux.proj_out.weight), nn.init.zeros_(flux.proj_out.bias)


def fill_flux(flux, path: Path) -> None:
    state, record = checkpoint.load(path, "flux")
    flux.load_state_dict({k: v.float() for k, v in from_bfl(state, record["config"]["hidden_size"]).items()})


class BaseStage:
    name = "base"

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        scenes = training_scenes(config.scenes, 0, config.cache, device)
        self.latents = training_latents(config.vae, scenes, config.cache, device)
        self.ahead = Ahead(partial(prepare, config, scenes), device, config.run.workers)
        self.vae = load_vae(config.vae, device)
        text = load_text_encoder(config.text, device).train().requires_grad_(True)
        self.trainables = nn.ModuleDict({"text": text, "flux": build_flux(FLUX),
                                         "align": nn.Linear(FLUX["hidden_size"], 15),
                                         "place": nn.Linear(FLUX["hidden_size"], 16)}).to(device)
        if config.start:
            fill_flux(self.flux, config.start)
        else:
            begin_at_nothing(self.flux)
        self.identity = {"vae": file_hash(config.vae), "text": file_hash(config.text),
                         **({"start": file_hash(config.start)} if config.start else {})}
        self.figures: dict[str, float] = {}  # of the latest validation, for the exported file
        attend_by_region(self.flux)
        self.tap = Tap(self.flux.single_transformer_blocks[TAPPED])
        self.objective = torch.compile(self._objective) if config.run.compile else self._objective

    @property
    def flux(self):
        return self.trainables["flux"]

    def loss(self, step: Step):
        made = self.ahead(step)
        truth = labels(made["things"], made["grounds"])
        flow, align, place = self.objective(take(self.latents, made["numbers"]), made["noise"], made["t"], made["ids"],
                                            made["keep_pooled"], truth, made["empty"])
        config = self.config
        return flow + config.align * align + config.place * place, {"flow": flow, "align": align, "place": place}

    def _objective(self, x0, noise, t, ids, keep_pooled, labels, empty):
        context, pooled = encode(self.trainables["text"], ids)
        x = x0 + t[:, None, None, None] * (noise - x0)
        predicted = velocity(self.flux, x, t, context, pooled * keep_pooled)
        flow = F.mse_loss(predicted.float(), noise - x0)
        stream = self.tap.value
        named, placed = self.trainables["align"](stream), self.trainables["place"](stream)
        return flow, name_loss(named, labels, ~empty), place_loss(placed)

    def scales(self, step: int) -> dict[str, float]:
        return {"text": self.config.text_scale}

    def validate(self) -> dict[str, float]:
        truth = [scene("validation", i) for i in range(VALIDATED)]
        words = [caption(s) for s in truth]
        with autocast(self.device, self.config.run.precision):
            pictures = sample_text(self.flux, self.trainables["text"], self.vae, words, self.device, cfg=2.0,
                                   mu=self.config.mu)
        found = [parse(p) for p in pictures]
        self.figures = {"f1_colour_place": f1(truth, found, colour_place),
                        "f1_shape_place": f1(truth, found, shape_place)}
        return self.figures

    def export(self, step: int) -> None:
        save_text_encoder(self.config.export_text, self.trainables["text"], step)
        config = {**FLUX, "sampling_shift_mu": self.config.mu}
        # Eight bits are enough for Flux: the difference in velocity is far below the training's noise.
        checkpoint.save(self.config.export_flux, to_bfl(self.flux.state_dict()), kind="flux", config=config, step=step,
                        dtype=torch.int8, figures=self.figures, vae_sha256=file_hash(self.config.vae),
                        text_encoder_sha256=file_hash(self.config.export_text))


def schedule(steps: int, mu: float, start: float = 1.0) -> Tensor:
    """Falling times from `start` to 0; `steps` of them if it starts at 1."""
    times = shifted(torch.linspace(1, 0, steps + 1).clamp(min=1e-9), mu)
    times[0], times[-1] = 1, 0
    return torch.cat([torch.tensor([start]), times[times < start]])


@torch.no_grad()
def sample(flux, contexts: list[tuple[Tensor, Tensor]], weights: list[float], noise: Tensor, steps: int = 20,
           mu: float = 0.5, start: float = 1.0) -> Tensor:
    """Euler sampling: noise [B, 8, 16, 16] at time `start` -> latents, along the sum of weights x velocities of
    contexts (context [B, N, D], pooled [B, P]); classifier-free guidance s is weights [s, 1 - s] over (prompt,
    empty)."""
    times = schedule(steps, mu, start)
    x = noise
    for now, later in zip(times[:-1], times[1:]):
        t = torch.full((len(x),), float(now), device=x.device)
        v = sum(w * velocity(flux, x, t, context, pooled).float() for w, (context, pooled) in zip(weights, contexts))
        x = x + (later - now) * v
    return x


@torch.no_grad()
def sample_text(flux, text, vae, prompts: list[str], device, cfg: float, mu: float, seed: int = 0,
                steps: int = 20) -> np.ndarray:
    """Pictures [B, 128, 128, 3] uint8 of the prompts."""
    noise = torch.randn(len(prompts), 8, 16, 16, generator=torch.Generator().manual_seed(seed)).to(device)
    contexts, weights = [encode(text, token_ids(prompts, device))], [cfg]
    if cfg != 1:
        contexts.append(encode(text, token_ids([""] * len(prompts), device)))
        weights.append(1 - cfg)
    x = sample(flux, contexts, weights, noise, steps, mu)
    return to_pixels(vae.decode(x).sample)


def load_base(flux_path: Path, text_path: Path, device: torch.device):
    """(diffusers Flux, text encoder, flux record), frozen, in eval mode."""
    flux, record = load_flux(flux_path, device)
    return flux, load_text_encoder(text_path, device), record


def load_flux(path: Path, device: torch.device):
    """(diffusers Flux, its record), frozen, in eval mode."""
    record = checkpoint.read_header(path, "flux")
    flux = build_flux(record["config"])
    fill_flux(flux, path)
    attend_by_region(flux)
    return flux.to(device).eval().requires_grad_(False), record


def run(config: Config) -> bool:
    return launch(BaseStage, config)
