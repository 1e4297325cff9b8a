"""`sda prepare-edits`: the column layouts of the published sets, and pairs that stay pairs."""
from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

for package in ("pyarrow", "webdataset"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install -e '.[training,test]'")

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import webdataset  # noqa: E402
from semantic_diffusion_adapter.training.data import prepare_edits  # noqa: E402
from semantic_diffusion_adapter.training.data.batches import Plan  # noqa: E402
from semantic_diffusion_adapter.training.data.decode import decode, decode_edit  # noqa: E402
from semantic_diffusion_adapter.training.data.index import Index  # noqa: E402

from .conftest import jpeg  # noqa: E402


def picture(height: int, width: int, seed: int) -> dict:
    return {"bytes": jpeg(height, width, seed), "path": None}


def mask(height: int, width: int) -> dict:
    stream = io.BytesIO()
    Image.new("RGBA", (width, height), (0, 0, 0, 0)).save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": "m.png"}


ROWS = {
    "ip2p.parquet": {
        "original_prompt": ["a cat", "a dog", ""], "original_image": [picture(256, 256, i) for i in range(3)],
        "edit_prompt": ["make it a dog", "make it a cat", " "], "edited_prompt": ["a dog", "a cat", ""],
        "edited_image": [picture(256, 256, 10 + i) for i in range(3)]},
    "magic/0.parquet": {
        "img_id": ["7", "8", "9", "9"], "source_img": [picture(256, 384, i) for i in (20, 21, 22, 22)],
        "target_img": [picture(256, 384, 30), picture(384, 256, 31), *[picture(300, 450, 32)] * 2],
        "mask_img": [mask(256, 384), mask(256, 384), None, None],
        "instruction": ["add a hat", "turn it", "bigger", "larger"]},
    "ultra.parquet": {
        "clip_sim": [0.1, 0.2, 0.2], "source_image": [picture(256, 256, 40), {"bytes": b"torn", "path": "t"}, picture(256, 256, 40)],
        "edited_image": [picture(256, 256, 41), picture(256, 256, 42), picture(256, 256, 41)], "edit_prompt": ["snow", "rain", "snow"],
        "source_caption": ["a hill", "", ""], "target_caption": ["a white hill", "", ""]},
}


@pytest.fixture(scope="module")
def edits(tmp_path_factory) -> Index:
    folder = tmp_path_factory.mktemp("edits")
    (folder / "in/magic").mkdir(parents=True)
    for name, columns in ROWS.items():
        pq.write_table(pa.table(columns), folder / "in" / name, row_group_size=2)
    assert prepare_edits.run(prepare_edits.Config(str(folder / "in"), str(folder / "set"), (256,), workers=1))
    return Index.read(str(folder / "set"))


def test_the_three_layouts_become_one(edits):
    assert edits.kind == "edits"
    assert [(r["origin"].split(",")[0], r["caption"], r["source_caption"], r["target_caption"], r["mask_length"] > 0) for r in edits] == [
        ("ip2p.parquet", "make it a dog", "a cat", "a dog", False), ("ip2p.parquet", "make it a cat", "a dog", "a cat", False),
        ("magic/0.parquet", "add a hat", "", "", True), ("magic/0.parquet", "bigger", "", "", False),
        ("magic/0.parquet", "larger", "", "", False), ("ultra.parquet", "snow", "a hill", "a white hill", False)]
    dropped = {(r["origin"].split(" of")[0], r["reason"]) for r in pq.read_table(edits.root + "/report.parquet").to_pylist()}
    assert dropped == {("ip2p.parquet, row 0", "no instruction"), ("magic/0.parquet, row 1", "unlike shapes"),
                       ("ultra.parquet, row 1", "not a picture"), ("ultra.parquet, row 0", "duplicate")}


def test_a_pair_is_decoded_alike(edits):
    plan = Plan(edits, 2, 0, (256,))
    _, bucket, rows = plan.at("editor", 0)
    for row in rows:
        source, target, instruction = decode_edit(edits, row, bucket)
        assert source.shape == target.shape == (3, *bucket) and instruction == edits[row]["caption"]
    source, target, _ = decode_edit(edits, 0, (256, 256))
    for x, seed in ((source, 0), (target, 10)):
        truth = np.array(Image.open(io.BytesIO(jpeg(256, 256, seed))))
        assert torch.equal(x, torch.from_numpy(truth).permute(2, 0, 1))
    assert edits.read_member(2, "mask") == mask(256, 384)["bytes"] and decode(edits, 2, (256, 384), "mask").min() == 255
    assert edits[3]["height"] == 256 and edits[3]["width"] == 384  # of the smaller of the two


def test_the_shards_name_the_parts(edits):
    sample = list(webdataset.WebDataset([f"{edits.root}/shards/000000.tar"], shardshuffle=False))[2]
    assert {"source.jpg", "target.jpg", "mask.png", "txt"} <= set(sample) and sample["txt"] == b"add a hat"


def test_an_unknown_layout_is_a_sentence_with_its_columns(tmp_path):
    pq.write_table(pa.table({"before": ["x"], "after": ["y"]}), tmp_path / "own.parquet")
    with pytest.raises(ValueError, match="own.parquet has the columns before, after, which is no known layout .*MagicBrush: source_img"):
        prepare_edits.run(prepare_edits.Config(str(tmp_path), str(tmp_path / "set")))
    (tmp_path / "own.parquet").unlink()
    with pytest.raises(ValueError, match="holds no .parquet files"):
        prepare_edits.run(prepare_edits.Config(str(tmp_path), str(tmp_path / "set")))
