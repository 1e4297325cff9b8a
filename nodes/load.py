"""Loaders of the networks that are ours to load; Flux, CLIP and VAE come from the stock loaders."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from comfy_api.latest import io

from ..kernels import checkpoint
from ..kernels.vision.known import KNOWN_TOWERS
from . import queue, types
from .host import folders, loading
from .host.versions import schema

FROM_FILE = "from file"
NONE = "none"


class LoadVisionEncoders(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = []
        for slot in (1, 2, 3):
            files = folders.files("clip_vision")
            inputs += [
                io.Combo.Input(
                    f"encoder_{slot}",
                    options=files if slot == 1 else [NONE, *files],
                    tooltip="An image encoder in models/clip_vision. Load every encoder that the adapter was trained with, "
                    "in any order.",
                ),
                io.Combo.Input(
                    f"model_{slot}",
                    options=[FROM_FILE, *KNOWN_TOWERS],
                    default=FROM_FILE,
                    tooltip="Which encoder the file is. Files of this pack say so themselves; choose the model for a "
                    "public file such as DFN5B, DINOv2 or InternViT.",
                ),
            ]
        return schema(
            node_id="SDALoadVisionEncoders",
            display_name="Load Vision Encoders",
            description="Load the image encoders that an adapter looks through.",
            search_aliases=["dino", "clip vision", "internvit", "siglip"],
            inputs=inputs,
            outputs=[types.Vision.Output(display_name="vision", tooltip="The encoders, for Encode Image.")],
        )

    @classmethod
    def validate_inputs(cls, encoder_1=None, encoder_2=None, encoder_3=None) -> bool | str:
        chosen = [name for name in (encoder_1, encoder_2, encoder_3) if name != NONE]
        return queue.verdict((_check_any, chosen), *((partial(folders.find, "clip_vision"), name) for name in chosen))

    @classmethod
    def fingerprint_inputs(cls, **widgets) -> str:
        return "|".join(folders.fingerprint("clip_vision", widgets.get(f"encoder_{slot}")) for slot in (1, 2, 3))

    @classmethod
    def execute(cls, **widgets) -> io.NodeOutput:
        slots = [(widgets[f"encoder_{slot}"], widgets[f"model_{slot}"]) for slot in (1, 2, 3)]
        chosen = [(folders.find("clip_vision", name), _model(model)) for name, model in slots if name != NONE]
        _check_any(chosen)
        return io.NodeOutput(tuple(loading.load_vision_tower(path, model) for path, model in chosen))


class LoadAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SDALoadAdapter",
            display_name="Load Semantic Adapter",
            description="Load an adapter: it turns what the vision encoders see into a semantic embedding for Flux.",
            inputs=[
                io.Combo.Input(
                    "adapter",
                    options=folders.files("semantic_adapters"),
                    tooltip="An adapter in models/semantic_adapters. It belongs to one base model and to the encoders "
                    "that it was trained with.",
                )
            ],
            outputs=[types.Adapter.Output(display_name="adapter", tooltip="The adapter, for Build Hierarchical Embedding.")],
        )

    @classmethod
    def validate_inputs(cls, adapter=None) -> bool | str:
        return queue.verdict((_check("semantic_adapters", "adapter"), adapter))

    @classmethod
    def fingerprint_inputs(cls, adapter=None) -> str:
        return folders.fingerprint("semantic_adapters", adapter)

    @classmethod
    def execute(cls, adapter) -> io.NodeOutput:
        return io.NodeOutput(loading.load_adapter(folders.find("semantic_adapters", adapter)))


class LoadEditDecoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SDALoadEditDecoder",
            display_name="Load Edit Decoder",
            description="Load an edit decoder: it rewrites a semantic embedding as an instruction says.",
            inputs=[
                io.Combo.Input(
                    "edit_decoder",
                    options=folders.files("edit_decoders"),
                    tooltip="An edit decoder in models/edit_decoders. It belongs to the adapter whose embeddings it learnt.",
                )
            ],
            outputs=[types.EditDecoder.Output(display_name="edit_decoder", tooltip="The edit decoder, for Edit Embedding.")],
        )

    @classmethod
    def validate_inputs(cls, edit_decoder=None) -> bool | str:
        return queue.verdict((_check("edit_decoders", "edit_decoder"), edit_decoder))

    @classmethod
    def fingerprint_inputs(cls, edit_decoder=None) -> str:
        return folders.fingerprint("edit_decoders", edit_decoder)

    @classmethod
    def execute(cls, edit_decoder) -> io.NodeOutput:
        return io.NodeOutput(loading.load_edit_decoder(folders.find("edit_decoders", edit_decoder)))


def _check(folder: str, kind: str) -> Callable[[str], object]:
    """A check that a file of this name is there and holds this kind of network.

    It reads the file's record, no tensor.
    """
    return lambda name: checkpoint.read_header(folders.find(folder, name), kind)


def _check_any(chosen: list) -> None:
    if not chosen:
        raise ValueError("No vision encoder is chosen: choose a file in encoder_1, the DINOv2 that the adapter was trained with.")


def _model(name: str) -> str | None:
    """The id of a known encoder, None for "from file". A linked text is checked here only."""
    if name not in (FROM_FILE, *KNOWN_TOWERS):
        raise ValueError(f"There is no encoder model {name!r}: write one of {', '.join((FROM_FILE, *KNOWN_TOWERS))}.")
    return None if name == FROM_FILE else name
