"""What differs between ComfyUI 0.3.75 and the newest, in one place."""

from __future__ import annotations

import dataclasses
from typing import Any

from comfy_api.latest import io


def schema(**fields: Any) -> io.Schema:
    """`io.Schema` of these fields, without those that this core does not know yet (search_aliases before about 0.9)."""
    known = {field.name for field in dataclasses.fields(io.Schema)}
    return io.Schema(category="semantic diffusion", **{name: value for name, value in fields.items() if name in known})
