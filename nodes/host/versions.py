"""What differs between ComfyUI 0.3.75 and the newest, in one place."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from comfy_api.latest import io


def schema(inputs: list, advanced: Collection[str] = (), **fields: Any) -> io.Schema:
    """`io.Schema` of these fields, without those that this core does not know yet (search_aliases before about 0.9).

    advanced: the inputs that are rarely used; newer pages fold them away until they are asked for.
    """
    for each in inputs:
        if each.id in advanced and hasattr(each, "advanced"):
            each.advanced = True
    known = {field.name for field in dataclasses.fields(io.Schema)}
    fields = {name: value for name, value in fields.items() if name in known}
    return io.Schema(category="semantic diffusion", inputs=inputs, **fields)
