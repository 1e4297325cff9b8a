"""A picture file without its metadata: torn texts, profiles or EXIF are no reason to lose good pixels."""
from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

PNG = b"\x89PNG\r\n\x1a\n"
# These optional chunks change how the picture looks. APNG's chunks say that there are several frames.
SEEN = {b"tRNS", b"acTL", b"fcTL", b"fdAT"}
DESCRIPTIONS = {b"iCCP", b"eXIf"}
EXIF, ICC, COMMENT, SCAN = 0xE1, 0xE2, 0xFE, 0xDA
JFIF_AND_ADOBE = {0xE0, 0xEE}  # they say how colours are stored


def bare(data: bytes) -> Iterator[bytes]:
    """The file without texts and torn extras, and then without its profile and EXIF too. Nothing where it is neither
    PNG nor JPEG, or has no such parts. Data that the pixels need is not repaired."""
    cut = _png if data.startswith(PNG) else _jpeg if data.startswith(b"\xff\xd8") else None
    last = len(data)
    for described in (True, False) if cut else ():
        made = b"".join(cut(data, described))
        if len(made) < last:
            yield made
            last = len(made)


def _png(data: bytes, described: bool) -> Iterator[bytes]:
    yield PNG
    at, kept = len(PNG), SEEN | DESCRIPTIONS if described else SEEN
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        optional = kind[0] & 32
        if not optional or kind in kept and data[end - 4:end] == struct.pack(">I", zlib.crc32(data[at + 4:end - 4])):
            yield data[at:end]
        at = end
    yield data[at:]


def _jpeg(data: bytes, described: bool) -> Iterator[bytes]:
    yield data[:2]
    at, kept = 2, JFIF_AND_ADOBE | {EXIF, ICC} if described else JFIF_AND_ADOBE
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != SCAN:
        marker, end = data[at + 1], at + 2 + struct.unpack_from(">H", data, at + 2)[0]
        if not (0xE0 <= marker <= 0xEF or marker == COMMENT) or marker in kept:
            yield data[at:end]
        at = end
    yield data[at:]
