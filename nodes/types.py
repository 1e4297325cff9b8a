"""The pack's own socket types."""

from __future__ import annotations

from comfy_api.latest import io

Vision = io.Custom("SDA_VISION")
Features = io.Custom("SDA_FEATURES")
Adapter = io.Custom("SDA_ADAPTER")
Embedding = io.Custom("SDA_EMBEDDING")
EditDecoder = io.Custom("SDA_EDIT_DECODER")
# Core's own (io.BoundingBox of newer cores), by its name: on the others a workflow with it opens as well.
BoundingBox = io.Custom("BOUNDING_BOX")
# An output that carries the value of a combo, so that it links to any loader's file widget.
FileName = io.Custom("COMBO")
