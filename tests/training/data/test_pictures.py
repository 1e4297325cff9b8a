"""Good pixels in odd files: torn descriptions, whole numbers of other depths, and a size that is told without the pixels."""
from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo
from semantic_diffusion_adapter.training.data.bare import bare
from semantic_diffusion_adapter.training.data.pictures import BadPicture, open_picture, picture_size

from .conftest import jpeg

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 64, 3), np.uint8))


def saved(image: Image.Image, form: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def chunk(kind: bytes, data: bytes, harm: int = 0) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) ^ harm)


def segment(marker: int, data: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(data) + 2) + data


def within(data: bytes, part: bytes) -> bytes:
    """A PNG with a part after its header, or a JPEG with one after its mark."""
    at = 33 if data.startswith(b"\x89PNG") else 2
    return data[:at] + part + data[at:]


PNG, JPEG = saved(NOISE, "PNG"), saved(NOISE, "JPEG", quality=95)
TORN = {
    "huge text": within(PNG, chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(3 << 20)))),
    "huge profile": within(PNG, chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(3 << 20)))),
    "wrong checksum of a text": within(PNG, chunk(b"tEXt", b"a\0b", 1)),
    "wrong checksum of a time": within(PNG, chunk(b"tIME", bytes(7), 1)),
    "torn EXIF of a PNG": within(PNG, chunk(b"eXIf", b"II*\0\xff\xff\xff\x7f")),
    "torn EXIF of a JPEG": within(JPEG, segment(0xE1, b"Exif\0\0MM\0*\xff\xff\xff\xff")),
    "EXIF that is none": within(JPEG, segment(0xE1, b"Exif\0\0nothing of the kind")),
    "torn list of pictures": within(JPEG, segment(0xE2, b"MPF\0II*\0\x08\0\0\0\xff\xff" + b"\xff" * 30)),
    "a part of a profile": within(JPEG, segment(0xE2, b"ICC_PROFILE\0\x01\x09torn")),
}


@pytest.mark.parametrize("data", TORN.values(), ids=TORN)
def test_torn_descriptions_cost_no_pixels(data):
    image, ending = open_picture(data)
    clean = PNG if ending == "png" else JPEG
    assert np.array_equal(np.asarray(image), np.asarray(open_picture(clean)[0])) and picture_size(data) == ((64, 40), ending)


def test_what_tells_how_it_stands_and_what_its_colours_are_outlives_a_torn_text():
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    whole = saved(NOISE, "PNG", exif=exif, icc_profile=profile)
    torn = within(whole, chunk(b"tEXt", b"a\0b", 1))
    assert picture_size(torn) == ((40, 64), "png") and np.array_equal(*map(np.asarray, (open_picture(torn)[0], open_picture(whole)[0])))
    mild, strict = bare(torn)
    assert b"iCCP" in mild and b"eXIf" in mild and b"tEXt" not in mild and b"iCCP" not in strict


def test_torn_pixels_stay_torn():
    text = PngInfo()
    text.add_text("a", "b")
    data = bytearray(saved(NOISE, "PNG", pnginfo=text))
    data[data.index(b"IDAT") + 40] ^= 1
    for read in (open_picture, picture_size):
        with pytest.raises(BadPicture) as caught:
            read(bytes(data))
        assert caught.value.reason == "broken"


@given(st.sampled_from((PNG, JPEG, *TORN.values())), st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), max_size=4),
       st.integers(0, 6000))
def test_a_size_is_told_of_just_the_pictures_that_open(data, harm, end):
    data = bytearray(data[:end])
    for at, value in harm:
        if at < len(data):
            data[at] = value
    try:
        image, ending = open_picture(bytes(data))
    except BadPicture as error:
        with pytest.raises(BadPicture) as caught:
            picture_size(bytes(data))
        assert caught.value.reason == error.reason
    else:
        assert picture_size(bytes(data)) == (image.size, ending)


@pytest.mark.parametrize("form, options", [("JPEG", {"progressive": True}), ("JPEG", {"subsampling": 0}), ("PNG", {}), ("WEBP", {}),
                                           ("TIFF", {}), ("BMP", {}), ("MPO", {})])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_size_is_that_of_the_upright_picture(form, options, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    if form != "BMP":
        options = options | {"exif": exif}
    data = saved(NOISE, form, **options)
    size, ending = picture_size(data)
    image, same = open_picture(data)
    assert (size, ending) == (image.size, same) and size == ((40, 64) if orientation > 4 and form != "BMP" else (64, 40))
    if form == "JPEG":
        least = open_picture(jpeg(400, 640), (50, 50))[0].size  # at a fraction
        assert least == (80, 50)


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_whole_numbers_of_any_depth_fill_eight_bits(bits):
    ramp = np.linspace(0, 2 ** bits - 1, 256).round().astype(np.uint16)[None].repeat(4, 0)
    for form in ("PNG", "TIFF"):
        image, _ = open_picture(saved(Image.fromarray(ramp), form))
        assert np.array_equal(np.asarray(image)[0, :, 0], np.arange(256))


@pytest.mark.parametrize("bits", [12, 16, 24, 31, 32])
def test_whole_numbers_of_32_bits(bits):
    ramp = np.linspace(0, 2 ** bits - 1, 256).round().astype(np.uint32)[None].repeat(4, 0)
    image, _ = open_picture(saved(Image.fromarray(ramp.view(np.int32)), "TIFF"))
    assert np.array_equal(np.asarray(image)[0, :, 0], np.arange(256))


def test_a_cut_out_lies_on_white():
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[..., 0] = 255  # a red that nobody sees
    pixels[16:48, 16:48] = (0, 0, 255, 255)
    image = np.asarray(open_picture(saved(Image.fromarray(pixels), "PNG"))[0])
    assert image[0, 0].tolist() == [255, 255, 255] and image[32, 32].tolist() == [0, 0, 255]
