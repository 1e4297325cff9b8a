"""How much of an edit is painted."""

from __future__ import annotations

from comfy_api.latest import io

from .host import guider
from .host.versions import schema


class EditGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SDAEditGuider",
            display_name="Edit Guider",
            description="Sample anywhere between a source and its edit, or beyond the edit. For SamplerCustomAdvanced.",
            search_aliases=["edit strength", "edit slider", "edit guidance", "guider"],
            advanced=["cfg"],
            inputs=[
                io.Model.Input("model", tooltip="The model that went through Masked Attention (Flux)."),
                io.Conditioning.Input(
                    "source", tooltip="The unedited embedding through Embedding to Conditioning: what strength 0 paints."
                ),
                io.Conditioning.Input(
                    "edited",
                    tooltip="The edited embedding through Embedding to Conditioning, with the same prompt and references "
                    "as the source: what strength 1 paints.",
                ),
                io.Float.Input(
                    "edit_strength",
                    default=1.0,
                    min=-1.0,
                    max=3.0,
                    step=0.05,
                    tooltip="0 is the source, 1 the edit; less edits less, more exaggerates, below 0 does the opposite. "
                    "At 0 and 1 a step costs as much as without this node, else one evaluation of the model more.",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="What to keep away from, as with KSampler. It only counts with a cfg above 1.",
                ),
                io.Float.Input(
                    "cfg",
                    default=1.0,
                    min=1.0,
                    max=30.0,
                    step=0.1,
                    tooltip="How strongly to keep away from the negative. 1 does not evaluate it; FLUX.1-dev is made for 1.",
                ),
            ],
            outputs=[io.Guider.Output(display_name="guider", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, model, source, edited, edit_strength, cfg, negative=None) -> io.NodeOutput:
        made = guider.EditGuider(model)
        made.set_edit(source, edited, edit_strength, negative, cfg)
        return io.NodeOutput(made)
