"""Prepared sets made by hand: real picture files in a real tar, without the command that usually makes them."""
from __future__ import annotations

import hashlib
import io
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def jpeg(height: int, width: int, seed: int = 0) -> bytes:
    """A smooth coloured picture, another one for each seed."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    stream = io.BytesIO()
    small.resize((width, height), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def table_of(sizes, resolutions=(512,), kind="pictures", **columns):
    """An index's pyarrow table of pictures of these (height, width), without any shard."""
    import pyarrow as pa
    from semantic_diffusion_adapter.training.data import index

    digests = [hashlib.sha256(f"{i} {s}".encode()).digest() for i, s in enumerate(sizes)]
    values = {
        "key": [f"{i:09}" for i in range(len(sizes))], "origin": [f"{i}.jpg" for i in range(len(sizes))],
        "shard": ["shards/000000.tar"] * len(sizes), "offset": [0] * len(sizes), "length": [0] * len(sizes),
        "sha256": digests, "height": [s[0] for s in sizes], "width": [s[1] for s in sizes],
        "caption": [f"picture {i}" for i in range(len(sizes))],
        **{f"bucket_{r}": [index.bucket_of(*s, r) for s in sizes] for r in resolutions}, **columns,
    }
    schema = index.schema(kind, resolutions)
    return pa.table([pa.array(values[f.name], f.type) for f in schema], schema=schema)


@pytest.fixture(scope="session")
def written():
    """write(url, pictures, resolutions): a tar and an Index at any fsspec URL."""
    import fsspec
    import pyarrow.parquet as pq
    from semantic_diffusion_adapter.training.data.index import Index

    def write(url: str, pictures: list[bytes], resolutions=(64,)) -> Index:
        fs, root = fsspec.url_to_fs(url)
        fs.makedirs(f"{root}/shards", exist_ok=True)
        stream, offsets = io.BytesIO(), []
        with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for i, data in enumerate(pictures):
                info = tarfile.TarInfo(f"{i:09}.jpg")
                info.size = len(data)
                offsets.append(tar.offset + 512)
                tar.addfile(info, io.BytesIO(data))
        fs.pipe_file(f"{root}/shards/000000.tar", stream.getvalue())
        sizes = [Image.open(io.BytesIO(p)).size[::-1] for p in pictures]
        table = table_of(sizes, resolutions, offset=offsets, length=[len(p) for p in pictures],
                         sha256=[hashlib.sha256(p).digest() for p in pictures])
        with fs.open(f"{root}/index.parquet", "wb") as file:
            pq.write_table(table, file)
        return Index.read(url)
    return write


@pytest.fixture(scope="session")
def two_nodes():
    """A Ray cluster of two nodes with one core each, to which this process is connected. One of them says that it has a GPU."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install -e '.[ray]'")
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80 * 2 ** 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    cluster.add_node(**node, num_gpus=1)
    ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """A folder of real photographs (of scikit-learn and scikit-image), with broken and odd files among them."""
    sklearn, skimage = pytest.importorskip("sklearn"), pytest.importorskip("skimage")
    folder = tmp_path_factory.mktemp("photographs")
    found = [Path(sklearn.__file__).parent / f"datasets/images/{n}.jpg" for n in ("china", "flower")]
    names = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "camera.png")
    found += [Path(skimage.__file__).parent / "data" / name for name in names]
    (folder / "deep" / "er").mkdir(parents=True)
    for i, file in enumerate(found):
        shutil.copy(file, folder / ("deep/er" if i % 2 else ".") / file.name)
    rocket = (folder / "deep/er/rocket.jpg").read_bytes()
    (folder / "deep/er/rocket.txt").write_text("a rocket on its pad\n", encoding="utf-8")
    (folder / "china.json").write_text('{"caption": "a temple", "url": "x"}', encoding="utf-8")
    (folder / "again.jpg").write_bytes(rocket)  # sorts before the one that has the caption
    (folder / "torn.jpg").write_bytes(rocket[:len(rocket) // 2])
    (folder / "page.jpg").write_text("<html>404</html>")
    (folder / "notes.pdf").write_bytes(b"%PDF")
    Image.open(found[0]).resize((300, 200)).save(folder / "little.png")
    Image.open(found[1]).convert("CMYK").save(folder / "print.jpg", quality=90)
    for i in range(70):  # enough for two chunks of loose files
        (folder / f"made_{i:02}.jpg").write_bytes(jpeg(256, 256 + 2 * i, i))
    return folder
