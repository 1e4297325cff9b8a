"""The held-out samples: shared by the processes, the same figures from any number of them; what is too small is left out."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[training]'")
pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install -e '.[training]'")

from semantic_diffusion_adapter.training.data.decode import decode, send  # noqa: E402
from semantic_diffusion_adapter.training.data.index import Index  # noqa: E402
from semantic_diffusion_adapter.training.engine import World  # noqa: E402
from semantic_diffusion_adapter.training.stages.held_out import Held  # noqa: E402

CPU = torch.device("cpu")


@pytest.mark.skipif(sys.platform == "win32", reason="forks processes")
def test_any_number_of_processes_finds_the_same_and_each_looks_at_its_share(toml, tmp_path):
    """Four pictures in batches of one, so that three processes, or two whose base is cut between them, come out uneven."""
    file = toml(run=dict(batch=6, micro=1))
    subprocess.run([sys.executable, str(Path(__file__).with_name("held_ranks.py")), str(file), str(tmp_path)], check=True, timeout=300)
    told = {case: [json.loads((tmp_path / f"{case}.{rank}.json").read_text()) for rank in range(size)]
            for case, size in (("1", 1), ("2", 2), ("3", 3), ("cut", 2))}
    alone = told["1"][0]
    for case, ranks in told.items():
        assert all(each["figures"] == ranks[0]["figures"] for each in ranks), "every process knows them"
        if case != "cut":
            assert ranks[0]["figures"] == alone["figures"], "to the last bit"
        assert ranks[0]["figures"] == pytest.approx(alone["figures"], rel=1e-5)
        assert {row for each in ranks for row in each["looked"]} == {0, 1, 2, 3}
        assert max(len(each["looked"]) for each in ranks) == -(-4 // len(ranks))
        assert np.abs(np.array(ranks[0]["grid"]) - np.array(alone["grid"])).max() <= 1


def held(folder: Path, edit=lambda table: table) -> Held:
    index = Index.read(str(folder))
    return Held(Index(index.url, edit(index.table)), 64, "skip", World(0, 1, 0, 1, CPU), decode)


def test_what_is_smaller_than_the_resolution_is_left_out_and_counted(parts):
    """As an edit may be whose picture was held out for another edit of it."""
    import pyarrow as pa

    def shrink(table):
        place = table.schema.get_field_index("bucket_64")
        sizes = [[0, 0] if row in (1, 5) else size for row, size in enumerate(table["bucket_64"].to_pylist())]
        return table.set_column(place, table.schema.field(place), pa.array(sizes, table.schema.field(place).type))

    whole, some = held(parts / "photos"), held(parts / "photos", shrink)
    assert (len(whole), whole.small, len(some), some.small) == (19, 0, 17, 2)
    assert sorted(row for share in some.batches(17, 4) for row in share.rows) == sorted(set(range(19)) - {1, 5})
    assert some.report("edits") == "17 edits held out (2 more are smaller than the validation's resolution)"
    assert whole.report("edits") == "19 edits held out"


def test_pictures_travel_as_bytes_and_arrive_as_what_they_were(parts):
    index = Index.read(str(parts / "photos"))
    rows = [decode(index, row, (64, 64)) for row in range(3)]
    assert {row.dtype for row in rows} == {torch.uint8}
    batch = send(rows, CPU)
    assert batch.dtype == torch.float32 and torch.equal((batch * 255).round().byte(), torch.stack(rows))
    features = [torch.randn(4, 5).half() for _ in range(3)]
    assert torch.equal(send(features, CPU), torch.stack(features)) and send(features, CPU).dtype == torch.float16
    if torch.cuda.is_available():
        assert torch.equal(send(rows, torch.device("cuda")).cpu(), batch)
