"""The bundled miniature in one node."""

from __future__ import annotations

from comfy_api.latest import io

from . import types
from .host import folders, miniature
from .host.versions import schema


class LoadMiniature(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        def file(name: str, what: str):
            return types.FileName.Output(display_name=name, tooltip=f"The file name of {what}; link it to the loader's widget.")

        return schema(
            node_id="SDALoadMiniature",
            display_name="Load Miniature",
            description="The whole system at toy width, shipped with the pack: paints scenes of coloured shapes at 128 x 128 "
            "pixels in seconds, on any computer.",
            inputs=[],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The miniature's Flux."),
                io.Clip.Output(display_name="clip", tooltip="The miniature's text encoder."),
                io.Vae.Output(display_name="vae", tooltip="The miniature's VAE."),
                file("clip_encoder", "its CLIP vision encoder"),
                file("dinov2_encoder", "its DINOv2 vision encoder"),
                file("adapter", "its semantic adapter"),
                file("edit_decoder", "its edit decoder"),
                io.Image.Output(display_name="scene", tooltip="A picture that the miniature was never trained on."),
                io.Model.Output(
                    display_name="gated_model",
                    tooltip="The miniature's Flux with a LoRA that reads a source picture: for Reference Gate, with text_gate 0.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls) -> str:
        return "|".join(folders.stamp(path) for path in miniature.files())

    @classmethod
    def execute(cls) -> io.NodeOutput:
        parts = (miniature.CLIP_ENCODER, miniature.DINOV2_ENCODER, miniature.ADAPTER, miniature.EDIT_DECODER)
        model, clip, vae = miniature.load()
        return io.NodeOutput(model, clip, vae, *(name for _, name in parts), miniature.scene(), miniature.with_gate_lora(model))
