"""Real JPEGs go through prepare, train, evaluate and export by the lines of training/README.md, and by nothing else."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image

for package in ("diffusers", "torchmetrics", "tyro"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install -e '.[training]'")

from semantic_diffusion_adapter.kernels import checkpoint  # noqa: E402
from semantic_diffusion_adapter.training import cli  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
SHORTER = {"train": ["--max-steps", "6", "--run.validate-every", "6"], "evaluate": ["--limit", "3", "--steps", "2"]}


def readme_lines() -> list[list[str]]:
    """The `sda` lines of the walkthrough, as arguments."""
    text = (ROOT / "training" / "README.md").read_text(encoding="utf-8")
    block = re.search(r"^## From pictures to a judged adapter.*?^```\n(.*?)^```", text, re.M | re.S)[1]
    return [shlex.split(line)[1:] for line in block.splitlines() if line.startswith("sda ")]


def jpegs(folder: Path) -> int:
    """The photographs that scikit-image and scikit-learn carry inside, as JPEGs; their number."""
    import skimage
    import sklearn.datasets

    data = Path(skimage.__file__).parent / "data"
    names = ("astronaut", "brick", "camera", "chelsea", "coffee", "grass", "gravel", "ihc", "moon", "motorcycle_left", "motorcycle_right")
    pictures = {name: Image.open(data / f"{name}.png") for name in names}
    pictures |= {name: Image.open(data / f"{name}.jpg") for name in ("hubble_deep_field", "retina", "rocket")}
    pictures |= {name: Image.fromarray(sklearn.datasets.load_sample_image(f"{name}.jpg")) for name in ("china", "flower")}
    folder.mkdir()
    for name, picture in pictures.items():
        picture.convert("RGB").save(folder / f"{name}.jpg", quality=90)
    return len(pictures)


def test_the_readme_leads_from_photographs_to_a_judged_adapter(tmp_path, monkeypatch):
    lines = readme_lines()
    assert [line[0] for line in lines] == ["prepare", "train", "evaluate", "export"]
    for shared in ("assets/miniature", "training/configs"):
        shutil.copytree(ROOT / shared, tmp_path / shared)
    count = jpegs(tmp_path / "pictures")
    monkeypatch.chdir(tmp_path)
    for line in lines:
        assert cli.main([*line, *SHORTER.get(line[0], [])]) == 0, " ".join(line)

    assert json.loads(Path("data/miniature/report.json").read_text(encoding="utf-8"))
    run = Path("runs/miniature_cpu")
    figures = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {it["step"] for it in figures} >= {0, 6}
    results = json.loads((run / "judged" / "results.json").read_text(encoding="utf-8"))
    task = results["tasks"]["reconstruction"]
    assert task["count"] == 3 <= count and {sample["name"].split(".")[-1] for sample in task["samples"]} == {"jpg"}
    assert task["means"].keys() == {"vae", "global16", "tree128"} and task["means"]["vae"]["psnr"]["mean"] > 10
    assert (run / "judged" / "index.html").read_text(encoding="utf-8").count("<article") == 3
    files = {path.relative_to(run / "models").as_posix() for path in (run / "models").rglob("*.safetensors")}
    assert files == {"semantic_adapters/miniature_cpu.safetensors", "clip_vision/miniature_cpu_miniature-dinov2.safetensors"}
    record = checkpoint.read_header(run / "models" / "semantic_adapters" / "miniature_cpu.safetensors", "adapter")
    assert record["step"] == 6 and record["base_sha256"] in results["protocol"]["flux"]
