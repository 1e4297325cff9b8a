"""Editing an embedding by instruction, and where an edit may not reach."""

from __future__ import annotations

from comfy_api.latest import io

from ..kernels import algebra, regions
from ..kernels.edit_decoder import MODES
from . import queue, types
from .host import running
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
        return queue.verdict((_check_instruction, instruction))

    @classmethod
    def execute(cls, embedding, clip, edit_decoder, instruction, mode) -> io.NodeOutput:
        _check_instruction(instruction)  # a linked text was not checked when the prompt was queued
        return io.NodeOutput(running.edit_embedding(edit_decoder, embedding, clip, instruction, mode))


class KeepOutsideMask(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SDAKeepOutsideMask",
            display_name="Keep Outside Mask",
            description="Let an edit happen only inside a mask: every token whose box misses it returns to the source's.",
            search_aliases=["inpaint", "protect", "restrict edit"],
            inputs=[
                types.Embedding.Input("edited", tooltip="The edited embedding."),
                types.Embedding.Input("source", tooltip="The embedding before the edit."),
                io.Mask.Input("mask", tooltip="Where the edit may happen: white. Any size; a picture's mask from the mask editor."),
                io.Float.Input(
                    "feather", default=0.05, min=0.0, max=0.5, step=0.01,
                    tooltip="How softly the mask ends, as a share of the picture's side.",
                ),
            ],
            outputs=[types.Embedding.Output(display_name="embedding", tooltip="Edited inside the mask, the source outside.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, edited, source, mask, feather) -> io.NodeOutput:
        soft = regions.feather(mask, feather)
        if not soft.any():
            raise ValueError("Nothing of the mask is left inside its soft border, so there would be no edit: paint it white where "
                             "the edit may happen, or lower feather.")
        return io.NodeOutput(algebra.restrict(edited, source, soft))


def _check_instruction(text: str) -> None:
    if not text.strip():
        raise ValueError("The instruction is empty: write what to change, for example `remove the red circle`.")
