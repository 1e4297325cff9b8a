"""The pictures of a prepared set for `sda invert`. Of edits, the sources come first; an edited picture goes on from its
source's fit, so that what the edit leaves alone stays where it is."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..data.decode import decode
from ..data.index import CorruptSample, Index
from .fits import file_of
from .invert_pictures import Done, LeftOut, Picture


def passes(index: Index, out: Path, resolution: int, there: dict[str, str],
           captioned: bool) -> Iterator[Iterator[Picture | LeftOut | Done]]:
    """One after the other, the next only when the one before is fitted: the pictures, and of edits the edited ones.
    there, captioned: as `pictures` takes them. ValueError where the set has no buckets at the resolution."""
    sizes = [tuple(map(int, size)) for size in index.buckets(resolution)]

    def members(member: str) -> Iterator[Picture | LeftOut | Done]:
        known = set()
        for row, bucket in enumerate(sizes):
            it, file = index[row], file_of(index[row], member)
            if file not in known:
                found = picture(row, it, member, bucket)
                if not isinstance(found, LeftOut):  # the picture may lie there a second time
                    known.add(file)
                yield found

    def picture(row: int, it: dict, member: str, bucket: tuple[int, int]) -> Picture | LeftOut | Done:
        name, file = ".".join((it["key"], *filter(None, [member]))), file_of(it, member)
        sha256 = it[f"{member}_sha256" if member else "sha256"].hex()
        begin = file_of(it) if member else ""
        caption = (it["source_caption" if index.kind == "edits" else "caption"] or "").strip()
        if there.get(file) == sha256:
            return Done(file)
        if not any(bucket):
            return LeftOut(name, "small", f"{it['width']} x {it['height']} px fill no bucket of {resolution} px")
        if begin and not (out / begin).exists():
            return LeftOut(name, "no source", f"its source was left out, so {begin} to begin with is not there")
        if captioned and not (begin or caption):
            return LeftOut(name, "no caption", "the set has none for it, and the fit begins with it")
        try:
            return Picture(name, file, sha256, caption, decode(index, row, bucket, member), begin)
        except CorruptSample as error:
            return LeftOut(name, "broken", str(error))

    yield members("")
    if index.kind == "edits":
        yield members("target")
