"""An embedding without an encoder: tokens optimised through Flux itself until it repaints the picture."""

from __future__ import annotations

from dataclasses import replace

from comfy_api.latest import io

from ..kernels import curve
from ..kernels.fit import ORDERS, FitSettings
from ..kernels.hierarchy import PRESETS, hierarchy
from ..kernels.picture import over_white
from . import types
from .host.fitting import fit_embedding
from .host.text_space import text_space
from .host.versions import schema
from .prompt import words


class FitEmbedding(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SDAFitEmbedding",
            display_name="Fit Embedding",
            description="Optimise the tokens of an embedding through Flux itself until it repaints your picture. Needs no "
            "checkpoint of this pack and no vision encoder, but minutes for each picture.",
            search_aliases=["inversion", "textual inversion", "optimize embedding", "image to embedding"],
            inputs=[
                io.Model.Input("model", tooltip="FLUX.1 as you will paint with it: LoRAs and Masked Attention are kept."),
                io.Vae.Input("vae", tooltip="The VAE of the model."),
                io.Clip.Input("clip", tooltip="The CLIP of the Flux model: the tokens are held to where its T5 puts text."),
                io.Image.Input("image", tooltip="The picture. Scale it to about 512 pixels first: time and memory grow with it."),
                io.Combo.Input(
                    "preset", options=list(PRESETS), default="tree64",
                    tooltip="How many tokens, and in which grids. More keep the picture closer and take longer to fit.",
                ),
                io.String.Input(
                    "prompt", multiline=True, default="",
                    tooltip="What to begin with: a caption of the picture. Empty begins with the mean of text.",
                ),
                io.Int.Input("steps", default=100, min=1, max=5000, tooltip="Optimisation steps; each costs about four of sampling."),
                io.Float.Input(
                    "minutes", default=0.0, min=0.0, max=600.0, step=0.5,
                    tooltip="Stop after so many minutes; queued again, it goes on from there. 0 is no limit.",
                ),
                io.Float.Input(
                    "rate", default=FitSettings.rate, min=0.001, max=1.0, step=0.001,
                    tooltip="How far a step may move a token, in deviations of text. 0.02 to refine an embedding that is good.",
                ),
                io.Combo.Input(
                    "order", options=list(ORDERS), default=FitSettings.order,
                    tooltip="coarse first: whole picture, then quarters, then cells begin to learn. all levels: all at once.",
                ),
                io.Boolean.Input("fit_pooled", default=False, tooltip="Fit the pooled vector of CLIP-L too."),
                io.Int.Input(
                    "seed", default=0, min=0, max=2**32 - 1, control_after_generate=False,
                    tooltip="Of the noises and times that the fit sees.",
                ),
                types.Embedding.Input(
                    "embedding", optional=True,
                    tooltip="An embedding to begin with and refine. When connected, preset and prompt are not used.",
                ),
            ],
            outputs=[
                types.Embedding.Output(display_name="embedding", tooltip="The picture as a semantic embedding."),
                io.Image.Output(display_name="curve", tooltip="The loss step by step, from 0 at the bottom; bold its mean."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, vae, clip, image, preset, prompt, steps, minutes, rate, order, fit_pooled, seed, embedding=None
    ) -> io.NodeOutput:
        space = text_space(clip, words)
        start = _start(space, clip, preset, prompt, len(image)) if embedding is None else embedding
        latents = vae.encode(over_white(image))
        settings = FitSettings(steps=steps, rate=rate, order=order, pooled=fit_pooled, seed=seed)
        fitted, losses = fit_embedding(model, latents, start, space, settings, minutes)
        return io.NodeOutput(fitted, curve.draw(losses))


def _start(space, clip, preset: str, text: str, pictures: int):
    grids = hierarchy(preset)
    if text.strip():
        tokens, pooled = words(clip, text)
        start = space.start_from(tokens, grids, pictures)
    else:
        start = space.start(grids, pictures)
        _, pooled = clip.encode_from_tokens(clip.tokenize(""), return_pooled=True)
    return start if pooled is None else replace(start, pooled=pooled.float().expand(pictures, -1).clone())
