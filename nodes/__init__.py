"""The nodes of the pack. Importing this changes nothing; creating the extension registers the model folders."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .blend import BlendEmbeddings
from .decode import EmbeddingToConditioning, MaskedAttention
from .edit import EditEmbedding
from .encode import BuildEmbedding, EncodeImage
from .host import folders
from .load import LoadAdapter, LoadEditDecoder, LoadVisionEncoders
from .miniature import LoadMiniature


class SemanticDiffusionExtension(ComfyExtension):
    def __init__(self) -> None:
        folders.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            LoadVisionEncoders,
            LoadAdapter,
            LoadEditDecoder,
            EncodeImage,
            BuildEmbedding,
            EditEmbedding,
            BlendEmbeddings,
            EmbeddingToConditioning,
            MaskedAttention,
            LoadMiniature,
        ]
