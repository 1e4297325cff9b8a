"""The names of the files that `sda invert` writes."""
from __future__ import annotations

import pytest

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[training]'")
pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install -e '.[training]'")

from semantic_diffusion_adapter.training.data.sources import listing  # noqa: E402
from semantic_diffusion_adapter.training.stages.invert_pictures import file_of, named  # noqa: E402


def test_every_name_becomes_a_file_of_its_own_inside_of_the_folder():
    assert file_of("sub/ä b.jpg") == "sub/ä b.jpg.safetensors"
    odd = ["../../etc/x.jpg", "/etc/x.jpg", "https://host/x.jpg?size=1", "https://host/x.jpg?size=2", "..", "a" * 300, "ü" * 300, "a|b"]
    made = [file_of(name) for name in odd]
    assert len(set(made)) == len(odd)
    for name in made:
        assert not name.startswith("/") and ".." not in name.split("/") and all(len(part.encode()) < 256 for part in name.split("/"))


def test_the_pictures_of_one_row_have_names_of_their_own(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"image": [[b"one", b"two"], [b"three"]]}), tmp_path / "set.parquet")
    found = [(name, it.data[""]) for name, it in named(listing(str(tmp_path / "set.parquet"))[0])]
    assert found == [("set.parquet, row 0 of group 0", b"one"), ("set.parquet, row 0 of group 0, number 2", b"two"),
                     ("set.parquet, row 1 of group 0", b"three")]
