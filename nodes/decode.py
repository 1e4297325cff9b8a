"""From an embedding to what KSampler takes: the conditioning, and the patch that makes Flux obey its boxes."""

from __future__ import annotations

from comfy_api.latest import io

from . import queue, types
from .host import conditioning, flux
from .host.versions import schema


class EmbeddingToConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SDAEmbeddingToConditioning",
            display_name="Embedding to Conditioning",
            description="Make a semantic embedding a conditioning for KSampler. Its boxes are obeyed by a model that went "
            "through Masked Attention (Flux).",
            inputs=[
                types.Embedding.Input("embedding", tooltip="The semantic embedding to paint."),
                io.Conditioning.Input(
                    "text",
                    optional=True,
                    tooltip="A prompt (or another embedding's conditioning) that is read beside the embedding. Without it "
                    "the embedding is all that Flux reads. Join them here: Conditioning (Concat) and Conditioning (Average) "
                    "lose or mix up the boxes.",
                ),
            ],
            outputs=[io.Conditioning.Output(display_name="conditioning", tooltip="For KSampler's positive input.")],
        )

    @classmethod
    def execute(cls, embedding, text=None) -> io.NodeOutput:
        return io.NodeOutput(conditioning.to_conditioning(embedding, text))


class MaskedAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SDAMaskedAttention",
            display_name="Masked Attention (Flux)",
            description="Let every part of the picture see only the tokens whose box it lies in. Works on a copy of the "
            "model; conditionings without an embedding are left alone.",
            search_aliases=["regional attention", "region mask"],
            advanced=["start_percent", "end_percent", "token_mixing", "blocks"],
            inputs=[
                io.Model.Input("model", tooltip="A Flux model, in any format that core loads."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="How much the embedding counts: 1 as trained, less to let a prompt count for more, 0 off.",
                ),
                io.Float.Input(
                    "start_percent", default=0.0, min=0.0, max=1.0, step=0.01,
                    tooltip="From which part of the sampling on the boxes are obeyed. Before it, everything sees every token.",
                ),
                io.Float.Input(
                    "end_percent", default=1.0, min=0.0, max=1.0, step=0.01,
                    tooltip="Until which part of the sampling the boxes are obeyed. After it, everything sees every token.",
                ),
                io.Combo.Input(
                    "token_mixing",
                    options=["all", "overlap"],
                    default="all",
                    tooltip="Which tokens of the embedding see one another: all as trained, or only those whose boxes "
                    "overlap, which keeps regions apart more strictly.",
                ),
                io.String.Input(
                    "blocks", default="all", optional=True,  # prompts saved before it was there still run
                    tooltip="In which blocks of the model the boxes are obeyed: all, double, single, or ranges counted from 0 "
                    "such as double 0-9, single 20-37. In the others everything sees every token.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The patched model, for KSampler.")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, start_percent=None, end_percent=None) -> bool | str:
        both = None if None in (start_percent, end_percent) else (start_percent, end_percent)
        return queue.verdict((lambda times: flux.check_times(*times), both))

    @classmethod
    def execute(cls, model, strength, start_percent, end_percent, token_mixing, blocks="all") -> io.NodeOutput:
        return io.NodeOutput(flux.patch(model, strength, start_percent, end_percent, token_mixing, blocks))
