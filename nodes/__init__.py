"""The nodes of the pack. Importing this changes nothing; creating the extension registers the model folders."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .attribute import AttributeEdit, AttributeMask
from .blend import BlendEmbeddings
from .change import ChangeMask
from .decode import EmbeddingToConditioning, MaskedAttention
from .edit import EditEmbedding, KeepOutsideMask
from .encode import BuildEmbedding, EncodeImage
from .files import LoadEmbedding, SaveEmbedding
from .fit import FitEmbedding
from .gate import ReferenceGate, SourceGate
from .guide import EditGuider, FlowEditGuider, InversionEdit
from .host import folders
from .load import LoadAdapter, LoadEditDecoder, LoadVisionEncoders
from .miniature import LoadMiniature
from .region import ComposeEmbeddings, PlaceEmbedding, RegionalPrompt
from .regions import Regions
from .see import PreviewEmbedding, VisiblePatches
from .strength import EmbeddingStrength
from .style import EncodeRedux, FromStyleModel


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
            KeepOutsideMask,
            BlendEmbeddings,
            ComposeEmbeddings,
            PlaceEmbedding,
            RegionalPrompt,
            Regions,
            EncodeRedux,
            FromStyleModel,
            FitEmbedding,
            EmbeddingStrength,
            PreviewEmbedding,
            VisiblePatches,
            SaveEmbedding,
            LoadEmbedding,
            EmbeddingToConditioning,
            MaskedAttention,
            EditGuider,
            ChangeMask,
            SourceGate,
            ReferenceGate,
            AttributeEdit,
            AttributeMask,
            FlowEditGuider,
            InversionEdit,
            LoadMiniature,
        ]
