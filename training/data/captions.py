"""Captions as people store them: text in any usual encoding, JSON, or a value of a table. Each becomes one line of
words."""
from __future__ import annotations

import codecs
import csv
import io
import json
import math

import pyarrow.parquet as pq

ENDINGS = ("txt", "caption", "json")
"""Endings of caption files beside a picture. The first that exists counts."""
COLUMNS = ("caption", "text", "prompt", "txt", "captions")
"""Names of a caption in tables and records, in any case. The first that has text counts."""
METADATA = {f"metadata.{ending}" for ending in ("csv", "jsonl", "parquet")}
"""Files of Hugging Face's image folders: a table of `file_name` and captions for the pictures in their folder."""
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
         codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # the mark of UTF-32 begins like that of UTF-16
DEEP = 8
"""Deepest nesting of lists and records in which a caption is looked for."""


def text_of(data: bytes) -> str:
    """The text of bytes: UTF-8, the encoding of its byte order mark, UTF-16 where zeros show it, or else Windows'
    cp1252."""
    for mark, encoding in MARKS.items():
        if data.startswith(mark):
            return data.decode(encoding, "replace")
    if b"\0" in data[:64]:
        return data.decode("utf-16-le" if b"\0" in data[1:64:2] else "utf-16-be", "replace")
    text = data.decode("utf-8", "replace")
    torn, foreign = text.count("\ufffd"), sum(c > "\x7f" for c in text)
    # One or two torn letters do not make it another encoding.
    return data.decode("cp1252", "replace") if 2 * torn > foreign else text


def caption_of(value: object, deep: int = DEEP) -> str:
    """The caption in a value of JSON or of a table: the first of several, the digits of a number, "" where there is
    none."""
    if isinstance(value, bytes):
        value = text_of(value)
    if isinstance(value, str):
        return value.strip().encode("utf-8", "replace").decode()  # JSON may contain half of a surrogate pair
    if isinstance(value, (dict, list, tuple)):
        if isinstance(value, dict):
            named = {str(key).lower(): found for key, found in reversed(value.items())}
            value = [named[name] for name in COLUMNS if name in named]
        return next((text for found in value if (text := caption_of(found, deep - 1))), "") if deep else ""
    if value is None or isinstance(value, bool) or isinstance(value, float) and not math.isfinite(value):
        return ""
    return str(value)


def caption_in(data: bytes, ending: str) -> str:
    """The caption of a file beside a picture. ending "json": the caption is under one of COLUMNS; any other file is
    plain text. Raises ValueError or RecursionError where it is not JSON."""
    return caption_of(json.loads(text_of(data)) if ending == "json" else data)


def metadata(name: str, data: bytes) -> dict[str, str]:
    """{file name: caption} of a file of METADATA, with the names as they stand in it. Raises ValueError where it is not
    one."""
    if name.endswith(".parquet"):
        rows = pq.read_table(io.BytesIO(data)).to_pylist()
    elif name.endswith(".csv"):
        rows = csv.DictReader(io.StringIO(text_of(data).lstrip("\ufeff"), newline=""))
    else:
        rows = map(json.loads, filter(str.strip, text_of(data).splitlines()))
    named = (row for row in rows if isinstance(row, dict) and isinstance(row.get("file_name"), str))
    return {row["file_name"]: caption_of(row) for row in named}
