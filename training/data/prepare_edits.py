"""`sda prepare-edits`: from (source, target, instruction) sets, laid out as InstructPix2Pix, MagicBrush or UltraEdit,
to shards."""
from __future__ import annotations

import posixpath
from collections import Counter
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from .files import absolute
from .index import EDITS
from .prepare import prepare
from .readers import ending_of
from .sources import files_of, row_chunks, stamp

# Set -> ({ours: column of pictures}, {ours: column of texts}), by their cards on the Hugging Face Hub:
# timbrooks/instructpix2pix-*, osunlp/MagicBrush, BleachNick/UltraEdit. The first two members and "caption", the
# instruction, make the layout; others may be absent.
LAYOUTS = {
    "InstructPix2Pix": ({"": "original_image", "target": "edited_image"},
                        {"caption": "edit_prompt", "source_caption": "original_prompt",
                         "target_caption": "edited_prompt"}),
    "MagicBrush": ({"": "source_img", "target": "target_img", "mask": "mask_img"}, {"caption": "instruction"}),
    "UltraEdit": ({"": "source_image", "target": "edited_image", "mask": "mask_image"},
                  {"caption": "edit_prompt", "source_caption": "source_caption", "target_caption": "target_caption"}),
}


@dataclass(frozen=True)
class Config:
    source: str
    """Parquet files: a folder of them, one file, or a glob, also of an object store. Their columns tell which set they
    are."""
    out: str
    """Folder of the shards and the index, local or of an object store."""
    resolutions: tuple[int, ...] = (512, 768, 1024)
    """In pixels. Pairs whose shorter side is below the smallest are dropped."""
    shard_mb: int = 256
    workers: int = 0
    """Number of processes on this machine. 0: one for each core."""
    ray: bool = False
    """Start Ray, or use the one to which the process is connected."""
    ray_address: str = ""
    """Address of a running Ray cluster, `auto` or `host:6379`. Every node must have this pack and see source and
    out."""


def columns_of(name: str, found: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """({member: column}, {text: column}) of a file with these columns. Raises ValueError where it is not one of the
    sets."""
    for members, texts in LAYOUTS.values():
        if {members[""], members["target"], texts["caption"]} <= set(found):
            return tuple({ours: column for ours, column in part.items() if column in found}
                         for part in (members, texts))
    layouts = "; ".join(f"{title}: {m['']}, {m['target']}, {t['caption']}" for title, (m, t) in LAYOUTS.items())
    raise ValueError(f"{name} has the columns {', '.join(found)}, which is no known layout ({layouts}); rename "
                     "its columns.")


def run(config: Config) -> bool:
    fs, root, infos, lost = files_of(absolute(config.source))
    place, chunks = {"url": fs.unstrip_protocol(root)}, []
    for name, info in infos.items():
        if ending_of(name) == "parquet":
            try:
                with fs.open(posixpath.join(root, name), "rb") as stream:
                    file = pq.ParquetFile(stream)
            except (OSError, pa.ArrowException) as error:
                lost.append((name, "broken table", str(error)))
                continue
            chunks += row_chunks(file, place, name, stamp(info), *columns_of(name, file.schema_arrow.names))
    if lost:
        chunks.append(place | {"kind": "lost", "items": lost})
    if not chunks:
        raise ValueError(f"{config.source} holds no .parquet files; give the folder into which the set was downloaded.")
    passed = Counter(ending_of(name) for name in infos if ending_of(name) != "parquet")
    return prepare(config, chunks, dict(passed), EDITS)
