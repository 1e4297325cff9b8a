"""Fitted embeddings of a prepared set: how `sda invert` names them, and how trainings read them.

A file's name is its content: the hash of the picture and, of an edited picture, of the source whose fit it goes on from.
"""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ...kernels import checkpoint, embedding_file
from ...kernels.hierarchy import PRESETS
from ..data.files import digest
from ..data.index import CorruptSample, Index
from ..objectives.reconstruct import named_hierarchy


def file_of(row: dict, member: str = "") -> str:
    """The file of a row's picture. row: of an index; member: "" or, of edits, "target"."""
    name = row["sha256"].hex()[:32]
    return f"{name}-{row['target_sha256'].hex()[:32] if member else 'source'}{embedding_file.SUFFIX}"


class Fits:
    """The embeddings in a folder that `sda invert` filled from a prepared set.

    base_sha256: of the base through which all of them were fitted. preset: the name of their hierarchy. ValueError in one
    sentence where the folder holds none, or what `sda invert` did not write.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        found = sorted(folder.glob(f"*-*{embedding_file.SUFFIX}"))
        if not found:
            raise ValueError(f"{folder} holds no fitted embeddings of a prepared set; make them with `sda invert`, its "
                             "source the folder of `sda prepare` or `sda prepare-edits`.")
        self.files = {path.name for path in found}
        record = checkpoint.read_header(found[0], embedding_file.KIND)
        made = record["source"].get("invert", {})
        if not {"settings", "base_sha256"} <= made.keys():
            raise ValueError(f"{found[0]} was not written by `sda invert`; give the folder of its embeddings.")
        self.settings, self.base_sha256 = made["settings"], made["base_sha256"]
        self.width = record["widths"]["text"]
        self.hierarchy = embedding_file.load(found[0])[0].hierarchy()
        names = [name for name, levels in PRESETS.items() if levels == self.hierarchy]
        self.preset = names[0] if names else f"global{self.hierarchy.token_count}"
        if named_hierarchy(self.preset) != self.hierarchy:
            raise ValueError(f"The embeddings in {folder} have the levels {self.hierarchy.to_json()}, which are no preset; "
                             "fit them to one.")

    @property
    def hash(self) -> str:
        """Of which embeddings there are and how they were made."""
        return digest(self.settings, self.base_sha256, sorted(self.files))

    def has(self, row: dict, member: str = "") -> bool:
        return file_of(row, member) in self.files

    def of(self, index: Index) -> Index:
        """The rows of an index whose pictures are all fitted. ValueError where none is."""
        members = ("", "target") if index.kind == "edits" else ("",)
        columns = [name for name in ("sha256", "target_sha256") if name in index.table.column_names]
        rows = index.table.select(columns).to_pylist()
        there = np.array([all(self.has(row, member) for member in members) for row in rows], bool)
        if not there.any():
            raise ValueError(f"{self.folder} has no fit of any sample of {index.url}; run `sda invert` with that set as its "
                             "source.")
        return Index(index.url, index.table.filter(pa.array(there)))

    def read(self, index: Index, row: int, member: str = "") -> Tensor:
        """Tokens [T, D] float32 of a row's picture. CorruptSample where the file cannot be read or is of another run."""
        path = self.folder / file_of(index[row], member)
        try:
            embedding, _ = embedding_file.load(path)
        except ValueError as error:
            raise CorruptSample(index, row, f"its fit cannot be read ({error})") from None
        if embedding.source.get("invert", {}).get("settings") != self.settings or embedding.hierarchy() != self.hierarchy:
            raise CorruptSample(index, row, f"its fit {path} was made with other settings than the others")
        return embedding.tokens[0]

    def tokens(self, index: Index, row: int) -> Tensor:
        """`read`, and NaN for a picture without a fit."""
        if self.has(index[row]):
            return self.read(index, row)
        return torch.full((self.hierarchy.token_count, self.width), torch.nan)
