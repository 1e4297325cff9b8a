"""Editing an embedding by instruction."""

from __future__ import annotations

from comfy_api.latest import io

from ..kernels.edit_decoder import MODES
from . import queue, types
from .host import networks
from .host.versions import schema


class EditEmbedding(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SDAEditEmbedding",
            display_name="Edit Embedding",
            description="Rewrite a semantic embedding as an instruction says. Edits can be chained.",
            advanced=["mode"],
            inputs=[
                types.Embedding.Input("embedding", tooltip="The embedding to edit."),
                io.Clip.Input("clip", tooltip="The CLIP of the Flux model: its own T5 reads the instruction."),
                types.EditDecoder.Input("edit_decoder", tooltip="From Load Edit Decoder."),
                io.String.Input(
                    "instruction",
                    multiline=True,
                    default="",
                    tooltip="What to change, in plain words: remove the person; make the car red.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="parallel",
                    tooltip="parallel writes all tokens at once and is fast; autoregressive writes one after the other, "
                    "each knowing those before it. An edit decoder that is an LLM has only parallel.",
                ),
            ],
            outputs=[types.Embedding.Output(display_name="embedding", tooltip="The edited embedding.")],
        )

    @classmethod
    def validate_inputs(cls, instruction=None) -> bool | str:
        return queue.verdict((networks.check_instruction, instruction))

    @classmethod
    def execute(cls, embedding, clip, edit_decoder, instruction, mode) -> io.NodeOutput:
        return io.NodeOutput(networks.edit_embedding(edit_decoder, embedding, clip, instruction, mode))
