"""An attribute pushed into what is painted, inside the attention, and where it is heard (FluxSpace)."""

from __future__ import annotations

from comfy_api.latest import io

from ..kernels import change_map
from . import queue
from .host import attribute_mask, directions, flux
from .host.versions import schema
from .see import PATCH, PIXELS

_BOUNDED = {"auto": True, "raw": False}


class AttributeEdit(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SDAAttributeEdit",
            display_name="Attribute Edit (FluxSpace)",
            description="A slider for one attribute, such as smiling or eyeglasses, on whatever is painted: a prompt, an embedding, "
            "an inverted picture. No training. Works on a copy of the model; chain several for several attributes.",
            search_aliases=["fluxspace", "concept slider", "attribute slider", "direction", "disentangled edit"],
            advanced=["coarse", "mask_threshold", "start_percent", "end_percent", "blocks"],
            inputs=[
                io.Model.Input("model", tooltip="A FLUX.1 model; for embeddings the one from Masked Attention (Flux)."),
                io.Clip.Input("clip", tooltip="The CLIP of the Flux model."),
                io.String.Input("attribute", default="", tooltip="The attribute alone, not a sentence: smiling, eyeglasses, comics style."),
                io.Float.Input(
                    "strength", default=0.5, min=-15.0, max=15.0, step=0.05,
                    tooltip="How far. 0, with coarse 0, is the picture without it, bit for bit; below 0 goes away from it. With scale "
                    "auto from 0 to about 1; with raw the paper's numbers: 5 for eyeglasses, 8 for a smile.",
                ),
                io.Combo.Input(
                    "scale", options=list(_BOUNDED), default="auto",
                    tooltip="auto: 1 adds as much as the attention itself gives, whatever the attribute. raw: the paper's factor.",
                ),
                io.Float.Input(
                    "coarse", default=0.0, min=0.0, max=1.0, step=0.05,
                    tooltip="How far the text's side also hears the attribute's pooled vector: for styles, and changes of the whole. The "
                    "paper takes 0.8 for eyeglasses and 0.5 for a smile.",
                ),
                io.Float.Input(
                    "mask_threshold", default=0.5, min=0.0, max=1.0, step=0.05,
                    tooltip="Patches that hear the attribute less than this are left alone. 0 is no mask, as the paper takes for styles.",
                ),
                io.Float.Input(
                    "start_percent", default=0.0, min=0.0, max=1.0, step=0.01,
                    tooltip="From which part of the sampling on. Later keeps more of the layout; the paper begins at step 3 to 5 of 30.",
                ),
                io.Float.Input("end_percent", default=1.0, min=0.0, max=1.0, step=0.01, tooltip="Until which part of the sampling."),
                io.String.Input(
                    "blocks", default="all", tooltip="In which double blocks: all, or ranges counted from 0 such as double 0-9."
                ),
                io.Mask.Input("mask", optional=True, tooltip="Where it acts: white. Without it everywhere."),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The patched model, for a sampler or a guider.")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, attribute=None, start_percent=None, end_percent=None) -> bool | str:
        times = None if None in (start_percent, end_percent) else (start_percent, end_percent)
        return queue.verdict((_check, attribute), (lambda both: flux.check_times(*both), times))

    @classmethod
    def execute(
        cls, model, clip, attribute, strength, scale, coarse, mask_threshold, start_percent, end_percent, blocks, mask=None
    ) -> io.NodeOutput:  # fmt: skip
        _check(attribute)
        edit, empty = (_encoded(clip, text) for text in (attribute, ""))
        return io.NodeOutput(
            directions.patch(
                model, edit, empty, strength, _BOUNDED[scale], coarse, mask_threshold, start_percent, end_percent, blocks, mask
            )
        )


class AttributeMask(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SDAAttributeMask",
            display_name="Attribute Mask (FluxSpace)",
            description="Where the last Attribute Edit of a model acts on a picture: the mask that it makes by itself, before "
            "you paint.",
            search_aliases=["fluxspace", "self-supervised mask", "attention map"],
            advanced=["noises", "seed"],
            inputs=[
                io.Model.Input("model", tooltip="The model from Attribute Edit (FluxSpace)."),
                io.Conditioning.Input("positive", tooltip="What is painted: a prompt, or an embedding."),
                io.Latent.Input("latent", tooltip="The picture through VAE Encode."),
                io.Int.Input(
                    "noises", default=4, min=1, max=64, tooltip="In how many noisy versions of the picture it is asked. The mean is shown."
                ),
                io.Int.Input(
                    "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True, tooltip="Of the noise.",
                ),
            ],
            outputs=[io.Mask.Output(display_name="mask", tooltip="White where the attribute acts, at the picture's size.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, positive, latent, noises, seed) -> io.NodeOutput:
        heard = attribute_mask.attribute_mask(model, positive, latent, noises, seed)
        height, width = (cells * PIXELS for cells in latent["samples"].shape[-2:])
        return io.NodeOutput(change_map.enlarge(heard, height, width, PATCH * PIXELS))


def _check(attribute: str) -> None:
    if not attribute.strip():
        raise ValueError("The attribute is empty: name it in a word or two, such as smiling or eyeglasses.")


def _encoded(clip, text: str) -> list:
    """CONDITIONING of a prompt with its padding, which is how Flux reads prompts."""
    tokens, pooled = clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)
    return [[tokens, {"pooled_output": pooled}]]
