"""How much of the source picture, or of reference pictures, is read while the edit is painted."""

from __future__ import annotations

from comfy_api.latest import io

from . import queue
from .host import flux, gates, reference_gate, source_gate
from .host.versions import schema

_START = io.Float.Input(
    "start_percent", default=0.0, min=0.0, max=1.0, step=0.01, tooltip="From which part of the sampling on the gate works."
)
_END = io.Float.Input("end_percent", default=1.0, min=0.0, max=1.0, step=0.01, tooltip="Until which part of the sampling the gate works.")
_LO = io.Float.Input(
    "lo", default=0.9, min=0.0, max=0.99, step=0.01,
    tooltip="Where black is less than this share, nothing is read: 0.9 closes whatever the mask touches.",
)  # fmt: skip
_HI = io.Float.Input(
    "hi", default=1.0, min=0.01, max=1.0, step=0.01,
    tooltip="Where black is this share or more, everything is read. Between the two it rises smoothly.",
)  # fmt: skip
_BLOCKS = io.String.Input(
    "blocks", default="all",
    tooltip="In which blocks of the model the gate works: all, double, single, or ranges counted from 0 such as double 0-9, "
    "single 20-37.",
)  # fmt: skip


def _verdict(start, end, lo, hi) -> bool | str:
    times, ends = ((None if None in pair else pair) for pair in ((start, end), (lo, hi)))
    return queue.verdict((lambda both: flux.check_times(*both), times), (lambda both: gates.check_ends(*both), ends))


class SourceGate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SDASourceGate",
            display_name="Source Gate (Flux)",
            description="Let the parts of the picture that shall not change attend to the source picture instead of to "
            "themselves, in every block and step, or take its layout alone. Works on a copy of the model, with any sampler and "
            "guider.",
            search_aliases=["attention sharing", "kv edit", "masactrl", "prompt-to-prompt", "keep background", "keep layout"],
            advanced=["lo", "hi", "text_gate", "start_percent", "end_percent", "blocks", "share"],
            inputs=[
                io.Model.Input("model", tooltip="A Flux model; for embeddings the one from Masked Attention (Flux)."),
                io.Conditioning.Input("source", tooltip="What the source picture shows: the unedited embedding, or a prompt."),
                io.Latent.Input("latent", tooltip="The source picture through VAE Encode."),
                io.Float.Input(
                    "strength", default=1.0, min=0.0, max=2.0, step=0.05,
                    tooltip="0 reads nothing and costs nothing, 1 reads the source in place of the picture itself, more lets "
                    "it outweigh the conditioning too.",
                ),
                _LO,
                _HI,
                io.Float.Input(
                    "text_gate", default=0.0, min=0.0, max=2.0, step=0.05,
                    tooltip="How much the text itself reads of the source. Every patch reads the text, so above 0 the source "
                    "comes through where the mask is white as well.",
                ),
                _START,
                _END,
                _BLOCKS,
                io.Combo.Input(
                    "share", options=list(source_gate.SHARES), default=source_gate.SHARES[0],
                    tooltip="keys and values: what the source shows comes along (MasaCtrl, KV-Edit). queries and keys: only how its "
                    "parts belong together, so that colours and surfaces may change everywhere (Prompt-to-Prompt, ConsistEdit).",
                ),
                io.Mask.Input(
                    "mask", optional=True,
                    tooltip="Where the picture may change: white reads nothing. From Change Mask (either output), or painted.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The patched model, for a sampler or a guider.")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, start_percent=None, end_percent=None, lo=None, hi=None) -> bool | str:
        return _verdict(start_percent, end_percent, lo, hi)

    @classmethod
    def execute(
        cls, model, source, latent, strength, lo, hi, text_gate, start_percent, end_percent, blocks, share, mask=None
    ) -> io.NodeOutput:  # fmt: skip
        return io.NodeOutput(
            source_gate.patch(model, source, latent, mask, strength, lo, hi, text_gate, start_percent, end_percent, blocks, share)
        )


class ReferenceGate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SDAReferenceGate",
            display_name="Reference Gate (Flux)",
            description="Say where the picture reads its reference pictures, and how much (FLUX.1 Kontext and others that were "
            "trained on reference latents). Works on a copy of the model; conditionings without references are left alone.",
            search_aliases=["kontext mask", "reference strength", "reference latent", "kontext"],
            advanced=["lo", "hi", "start_percent", "end_percent", "blocks"],
            inputs=[
                io.Model.Input("model", tooltip="A Flux model that reads reference latents, such as FLUX.1 Kontext."),
                io.Float.Input(
                    "strength", default=1.0, min=0.0, max=2.0, step=0.05,
                    tooltip="How much the references weigh: 1 as trained, 0 not at all, more than 1 outweighs the text.",
                ),
                _LO,
                _HI,
                io.Float.Input(
                    "text_gate", default=1.0, min=0.0, max=2.0, step=0.05,
                    tooltip="How much the text's own tokens read of the references: 1 as trained. Every patch reads the text, so "
                    "only at 0 nothing of the references reaches what the mask closes.",
                ),
                _START,
                _END,
                _BLOCKS,
                io.Mask.Input(
                    "mask", optional=True, tooltip="Where the references are not read: white. Without it they are read everywhere."
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The patched model, for a sampler or a guider.")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, start_percent=None, end_percent=None, lo=None, hi=None) -> bool | str:
        return _verdict(start_percent, end_percent, lo, hi)

    @classmethod
    def execute(
        cls, model, strength, lo, hi, text_gate, start_percent, end_percent, blocks, mask=None
    ) -> io.NodeOutput:  # fmt: skip
        return io.NodeOutput(reference_gate.patch(model, mask, strength, lo, hi, text_gate, start_percent, end_percent, blocks))
