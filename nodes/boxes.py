"""What detectors give: core's BOUNDING_BOX, in pixels of the picture that was looked at."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def shares(found: Any, image: Tensor | None) -> list[tuple[float, float, float, float]]:
    """(x, y, width, height) of every box, as shares of the picture's sides.

    found: a box {"x", "y", "width", "height"} in pixels from the top left corner, a list of boxes, or, as core's
        detectors give it, one such list for every picture of a batch.
    image: the IMAGE [B, H, W, C] that the pixels are of.
    ValueError without the picture, without a box, and for boxes of several pictures.
    """
    if image is None:
        raise ValueError("Bounding boxes are in pixels of a picture: connect the one that they were found in to image.")
    boxes = found if isinstance(found, list) else [found]
    if boxes and isinstance(boxes[0], list):
        if len(boxes) > 1:
            raise ValueError(
                f"There are bounding boxes of {len(boxes)} pictures and an embedding takes one region for all its "
                "images: show the detector one picture."
            )
        (boxes,) = boxes
    if not boxes:
        raise ValueError("The detector found nothing, so there is no region: lower its threshold, or look for another thing.")
    height, width = image.shape[1:3]
    try:
        return [(box["x"] / width, box["y"] / height, box["width"] / width, box["height"] / height) for box in boxes]
    except (KeyError, TypeError):
        raise ValueError(
            "A bounding box is x, y, width and height in pixels, and this is something else: connect a detector such as "
            "SAM3 Detect."
        ) from None
