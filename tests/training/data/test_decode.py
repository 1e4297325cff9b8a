"""Untrusted picture files: what is refused with a reason, and what becomes sensible RGB; tensors of a bucket; prefetching."""
from __future__ import annotations

import io
import struct
import threading
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

for package in ("fsspec", "pyarrow"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install -e '.[training]'")

from semantic_diffusion_adapter.training.data.decode import CorruptSample, decode, decode_edit  # noqa: E402
from semantic_diffusion_adapter.training.data.pictures import MAX_PIXELS, BadPicture, open_picture  # noqa: E402
from semantic_diffusion_adapter.training.data.prefetch import Prefetch  # noqa: E402

from .conftest import jpeg  # noqa: E402


def saved(image: Image.Image, form: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def png_header(width: int, height: int) -> bytes:
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rest = b"IDAT" + zlib.compress(b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in (head, rest))


RED = Image.new("RGB", (40, 20), (200, 30, 30))
WHOLE_PNG = saved(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)), "PNG")


@pytest.mark.parametrize("data, reason", [
    (b"", "not a picture"),
    (b"<html>not found</html>", "not a picture"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
    (jpeg(64, 64)[:-200], "broken"),
    (WHOLE_PNG[:len(WHOLE_PNG) // 2], "broken"),
    (png_header(20000, 20000), "too large"),
    (png_header(2 ** 14, 2 ** 30 // 2 ** 14), "too large"),
    (png_header(9000, 0), "not a picture"),
    (saved(RED, "GIF", save_all=True, append_images=[Image.new("RGB", (40, 20))]), "animated"),
    (saved(RED, "WEBP", save_all=True, append_images=[Image.new("RGB", (40, 20))]), "animated"),
    (saved(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"), "floating point"),
], ids=str)
def test_what_is_no_whole_still_picture_is_refused_with_a_reason(data, reason):
    with pytest.raises(BadPicture) as caught:
        open_picture(data)
    assert caught.value.reason == reason and str(caught.value)


def test_the_limit_of_pixels_holds_whatever_pillow_is_set_to(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(BadPicture, match=str(MAX_PIXELS)):
        open_picture(png_header(20000, 20000))


def mean(data: bytes) -> list[int]:
    image, _ = open_picture(data)
    assert image.mode == "RGB"
    return np.asarray(image).reshape(-1, 3).mean(0).round().astype(int).tolist()


def test_every_mode_becomes_eight_bits_of_rgb():
    grey16 = Image.fromarray(np.full((20, 40), 0x8080, np.uint16))
    clear = Image.new("RGBA", (40, 20), (200, 30, 30, 0))
    palette = saved(RED.quantize(4), "PNG", transparency=0)
    assert mean(saved(RED, "PNG")) == mean(saved(RED.quantize(4), "GIF")) == [200, 30, 30]
    assert mean(saved(grey16, "PNG")) == mean(saved(grey16, "TIFF")) == [128, 128, 128]
    assert mean(saved(clear, "PNG")) == mean(saved(clear, "WEBP", lossless=True, exact=True)) == mean(palette) == [255, 255, 255]
    assert mean(saved(Image.new("LA", (40, 20), (0, 51)), "PNG")) == [204, 204, 204]
    assert mean(saved(Image.new("1", (40, 20), 1), "PNG")) == [255, 255, 255]
    r, g, b = mean(saved(RED.convert("CMYK"), "JPEG", quality=95))
    assert abs(r - 200) < 5 and abs(g - 30) < 5 and abs(b - 30) < 5


def test_an_embedded_profile_is_followed_and_a_broken_one_ignored():
    srgb = ImageCms.createProfile("sRGB")
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    plain = saved(RED, "PNG", icc_profile=ImageCms.ImageCmsProfile(srgb).tobytes())
    assert mean(plain) == mean(saved(RED, "PNG", icc_profile=b"nonsense")) == mean(saved(RED, "PNG", icc_profile=lab)) == [200, 30, 30]
    swapped = bytearray(ImageCms.ImageCmsProfile(srgb).tobytes())  # a profile whose red primary is sRGB's green
    swapped[:] = swapped.replace("sRGB".encode("utf-16-be"), "xRGB".encode("utf-16-be"))
    count, = struct.unpack(">I", swapped[128:132])
    at = {bytes(swapped[132 + 12 * i:136 + 12 * i]): 132 + 12 * i for i in range(count)}
    red, green = at[b"rXYZ"], at[b"gXYZ"]
    swapped[red + 4:red + 12], swapped[green + 4:green + 12] = swapped[green + 4:green + 12], swapped[red + 4:red + 12]
    r, g, b = mean(saved(RED, "PNG", icc_profile=bytes(swapped)))
    assert abs(r - 30) < 3 and abs(g - 200) < 3 and abs(b - 30) < 3


def test_pictures_stand_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    halves = Image.new("RGB", (40, 20), "black")
    halves.paste((255, 255, 255), (0, 0, 20, 20))
    image, ending = open_picture(saved(halves, "JPEG", exif=exif))
    assert ending == "jpg" and image.size == (20, 40)
    assert np.asarray(image)[:18].min() > 200 and np.asarray(image)[22:].max() < 50


def test_a_bucket_is_covered_and_cropped_about_the_centre(tmp_path, written):
    bars = np.zeros((300, 900, 3), np.uint8)
    bars[:, 300:600] = 255
    index = written(str(tmp_path), [saved(Image.fromarray(bars), "PNG"), jpeg(700, 700, 3)])
    x = decode(index, 0, (64, 64))
    assert x.shape == (3, 64, 64) and x.dtype == torch.uint8 and x[:, :, 4:-4].min() > 252
    wide = decode(index, 0, (64, 192))
    assert wide[:, :, 70:120].min() > 252 and wide[:, :, :60].max() < 3
    small = decode(index, 1, (64, 64))  # read at a fraction of its size: nearly the same pixels as by the long way
    whole = open_picture(index.read_member(1))[0].resize((64, 64), Image.Resampling.LANCZOS)
    assert (small.float() - torch.from_numpy(np.array(whole)).permute(2, 0, 1)).abs().mean() < 2.5


def test_what_can_no_longer_be_decoded_is_a_corrupt_sample(tmp_path, written):
    good = jpeg(64, 64)
    index = written(str(tmp_path), [good, good[:-200]])
    decode(index, 0, (64, 64))
    with pytest.raises(CorruptSample, match="Row 1 .* is corrupt: OSError: .*truncated"):
        decode(index, 1, (64, 64))
    with pytest.raises(ValueError, match="holds pictures, not edits"):
        decode_edit(index, 0, (64, 64))


def test_prefetching_keeps_the_order_and_raises_at_the_step():
    release, asked, others = threading.Event(), [], set(threading.enumerate())

    def work(step: int) -> int:
        asked.append(step)
        if step == 7:
            release.wait(10)  # the others overtake it
        if step == 8:
            raise CorruptSampleOf8
        return step * step

    class CorruptSampleOf8(Exception):
        pass

    with Prefetch(work, start=5, ahead=3) as ahead:
        assert [next(ahead), next(ahead)] == [25, 36]
        release.set()
        assert next(ahead) == 49
        with pytest.raises(CorruptSampleOf8):
            next(ahead)
        assert next(ahead) == 81
    assert sorted(asked)[:5] == [5, 6, 7, 8, 9] and max(asked) <= 12
    assert list(ahead) == []
    assert not any(t.name.startswith("prefetch") for t in set(threading.enumerate()) - others)
