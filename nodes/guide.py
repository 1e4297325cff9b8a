"""How much of an edit is painted."""

from __future__ import annotations

from comfy_api.latest import io

from .host import flow_edit, guider, inversion
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


class FlowEditGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SDAFlowEditGuider",
            display_name="Flow Edit Guider",
            description="Edit the source picture itself instead of painting it anew: what the edit does not touch stays as it "
            "was (FlowEdit). For SamplerCustomAdvanced.",
            search_aliases=["flowedit", "inversion free editing", "keep background", "guider"],
            advanced=["n_avg", "cfg", "source_cfg"],
            inputs=[
                io.Model.Input("model", tooltip="The model that paints; for embeddings the one from Masked Attention (Flux)."),
                io.Conditioning.Input("source", tooltip="What the picture shows: the unedited embedding, or a prompt."),
                io.Conditioning.Input("edited", tooltip="What it shall show. The same references and ControlNets as the source."),
                io.Latent.Input(
                    "latent", tooltip="The source picture through VAE Encode. Connect it to the sampler's latent_image too."
                ),
                io.Float.Input(
                    "edit_strength", default=1.0, min=-1.0, max=3.0, step=0.05,
                    tooltip="0 is the source, 1 the edit; less edits less, more exaggerates. Other than 0 and 1 it costs one "
                    "evaluation of the model more.",
                ),
                io.Int.Input(
                    "n_avg", default=1, min=1, max=16,
                    tooltip="Over how many noises each step is averaged: steadier, and as many times as slow.",
                ),
                io.Int.Input(
                    "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True,
                    tooltip="Of the noise in which the two are compared. The sampler's own noise is not used.",
                ),
                io.Float.Input(
                    "cfg", default=1.0, min=1.0, max=30.0, step=0.1,
                    tooltip="How strongly the edited side keeps away from the negative. FLUX.1-dev is made for 1.",
                ),
                io.Float.Input(
                    "source_cfg", default=1.0, min=1.0, max=30.0, step=0.1,
                    tooltip="How strongly the source's side keeps away from the negative, lower than cfg.",
                ),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="What to keep away from. It only counts with a cfg above 1."
                ),
                io.Mask.Input(
                    "mask", optional=True, tooltip="Where the picture may change: white. Outside it is held exactly."
                ),
            ],
            outputs=[io.Guider.Output(display_name="guider", tooltip="For SamplerCustomAdvanced.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, source, edited, latent, edit_strength, n_avg, seed, cfg, source_cfg, negative=None, mask=None
    ) -> io.NodeOutput:  # fmt: skip
        made = flow_edit.FlowEditGuider(model)
        made.set_edit(source, edited, latent, edit_strength, negative, cfg, source_cfg)
        made.set_noise(seed, n_avg, mask)
        return io.NodeOutput(made)


class InversionEdit(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SDAInversionEdit",
            display_name="Edit by Inversion",
            description="Turn the source picture back into its noise and paint the edit from there: UniEdit-Flow, FireFlow, "
            "RF-Solver or RF-Inversion. Both outputs go to one SamplerCustomAdvanced.",
            search_aliases=["unsample", "inversion", "uniedit", "fireflow", "rf inversion", "rf solver", "keep background"],
            advanced=["eta_stop", "gamma", "cfg"],
            inputs=[
                io.Model.Input("model", tooltip="The model that paints; for embeddings the one from Masked Attention (Flux)."),
                io.Conditioning.Input("source", tooltip="What the picture shows: the unedited embedding, or a prompt."),
                io.Conditioning.Input("edited", tooltip="What it shall show."),
                io.Combo.Input(
                    "method", options=list(inversion.METHODS), default="uniedit",
                    tooltip="uniedit compares the two at every step; fireflow and rf_solver only change the "
                    "conditioning on the way down; rf_inversion also pulls towards the source.",
                ),
                io.Float.Input(
                    "omega", default=1.0, min=0.0, max=20.0, step=0.1,
                    tooltip="How far uniedit goes beyond the edit. Its paper says 5 for prompts; begin with 1 for embeddings.",
                ),
                io.Float.Input(
                    "eta", default=0.9, min=0.0, max=1.0, step=0.01,
                    tooltip="How strongly rf_inversion pulls towards the source. 1 to the end gives the source back.",
                ),
                io.Float.Input(
                    "eta_stop", default=0.25, min=0.0, max=1.0, step=0.01,
                    tooltip="In which part of the steps, from the first on, rf_inversion pulls.",
                ),
                io.Float.Input(
                    "gamma", default=0.5, min=0.0, max=1.0, step=0.01,
                    tooltip="How strongly rf_inversion's way up is led towards the connected noise.",
                ),
                io.Float.Input(
                    "cfg", default=1.0, min=1.0, max=30.0, step=0.1,
                    tooltip="How strongly the edited side keeps away from the negative. FLUX.1-dev is made for 1.",
                ),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="What to keep away from. It only counts with a cfg above 1."
                ),
            ],
            outputs=[
                io.Guider.Output(display_name="guider", tooltip="For SamplerCustomAdvanced."),
                io.Sampler.Output(display_name="sampler", tooltip="For the same SamplerCustomAdvanced."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, source, edited, method, omega, eta, eta_stop, gamma, cfg, negative=None
    ) -> io.NodeOutput:  # fmt: skip
        made = inversion.InversionGuider(model)
        made.set_edit(source, edited, negative, cfg)
        return io.NodeOutput(made, inversion.InversionSampler(method, omega, eta, eta_stop, gamma))
