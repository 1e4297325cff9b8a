"""Parts of a template's graph, and the picture that it paints."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image
from semantic_diffusion_adapter.runner.client import Client
from semantic_diffusion_adapter.runner.workflow import pictures


def find(prompt: dict, kind: str) -> str:
    (found,) = (key for key, node in prompt.items() if node["class_type"] == kind)
    return found


def upstream(prompt: dict, node: str) -> set[str]:
    links = [value[0] for value in prompt[node]["inputs"].values() if isinstance(value, list)]
    return {node}.union(*(upstream(prompt, link) for link in links))


def painted(client: Client, prompt: dict) -> np.ndarray:
    """The one saved picture, uint8 [H, W, 3]."""
    (output,) = pictures(prompt, client.run(prompt)).values()
    return np.asarray(Image.open(io.BytesIO(client.image(output))).convert("RGB"))
