"""`sda evaluate` on the shipped miniature: what it paints, what it says, how it goes on, and what it refuses."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from PIL import Image

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[training]'")

from semantic_diffusion_adapter.kernels import checkpoint, precision  # noqa: E402
from semantic_diffusion_adapter.kernels.vision.known import KNOWN_TOWERS  # noqa: E402
from semantic_diffusion_adapter.training import cli  # noqa: E402
from semantic_diffusion_adapter.training.frozen.encoders import with_ids  # noqa: E402
from semantic_diffusion_adapter.training.judge import metrics  # noqa: E402
from semantic_diffusion_adapter.training.judge.encoders import to_tensor  # noqa: E402
from semantic_diffusion_adapter.training.judge.evaluate import Config  # noqa: E402
from semantic_diffusion_adapter.training.judge.painter import Painter, seed_of  # noqa: E402
from semantic_diffusion_adapter.training.miniature.editor import change_of  # noqa: E402
from semantic_diffusion_adapter.training.miniature.scenes import render, scene  # noqa: E402

STEPS = 6


def flags(miniature: Path, **more) -> list[str]:
    """The command line for the miniature."""
    words = {"flux": "diffusion_models/miniature_flux", "adapter": "semantic_adapters/miniature_tree128", "vae": "vae/miniature_vae"}
    line = ["evaluate", "--resolution", "128", "--steps", str(STEPS)]
    for name, file in words.items():
        if name not in more:
            line += [f"--{name}", str(miniature / f"{file}.safetensors")]
    towers = more.pop("towers", [miniature / "clip_vision" / f"miniature_{name}.safetensors" for name in ("clip", "dinov2")])
    line += ["--towers", *map(str, towers)]
    for name, value in more.items():
        line += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return line


@pytest.fixture(scope="module")
def images(tmp_path_factory, photos) -> Path:
    """Two photographs, a scene that the miniature knows how to paint, the same once more, and three that will not do."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "inner").mkdir()
    Image.fromarray(photos["astronaut"]).save(folder / "astronaut.png")
    Image.fromarray(photos["coffee"]).resize((300, 200)).save(folder / "inner" / "coffee.jpg")
    Image.fromarray(render(scene("test", 0))).save(folder / "scene.png")
    shutil.copy(folder / "scene.png", folder / "twin.png")
    Image.fromarray(photos["flower"][:100, :100]).save(folder / "small.png")
    (folder / "broken.jpg").write_bytes(b"no picture at all")
    (folder / "cut.png").write_bytes((folder / "astronaut.png").read_bytes()[:5000])
    (folder / ".hidden.png").write_bytes((folder / "astronaut.png").read_bytes())
    (folder / "notes.txt").write_text("no picture and no claim to be one", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def judged(images, miniature_files, tmp_path_factory) -> tuple[Path, dict]:
    """(run folder, results.json) of one run over `images`."""
    out = tmp_path_factory.mktemp("judged")
    dino = miniature_files / "clip_vision" / "miniature_dinov2.safetensors"
    clip = miniature_files / "clip_vision" / "miniature_clip.safetensors"
    assert cli.main(flags(miniature_files, images=images, out=out, presets=["global16", "tree128"], dino=dino, structure=dino,
                          clip=clip, precision="fp32")) == 0
    return out, json.loads((out / "results.json").read_text(encoding="utf-8"))


def picture(out: Path, task: str, key: str, name: str) -> np.ndarray:
    return np.asarray(Image.open(out / "pictures" / task / key / f"{name}.png"))


def test_every_usable_picture_is_judged_and_the_others_are_named(judged):
    _, results = judged
    task = results["tasks"]["reconstruction"]
    assert {sample["name"] for sample in task["samples"]} == {"astronaut.png", "scene.png", os.path.join("inner", "coffee.jpg")}
    skipped = {each["name"]: each["reason"] for each in task["skipped"]}
    assert skipped.keys() == {"broken.jpg", "cut.png", "small.png", "twin.png"}
    assert skipped["small.png"] == "100 x 100 px is smaller than the resolution of 128 px"
    assert skipped["twin.png"] == "the same as scene.png" and skipped["cut.png"].startswith("unreadable: ")
    sizes = {sample["name"]: sample["size"] for sample in task["samples"]}
    assert sizes["astronaut.png"] == [128, 128] and sizes[os.path.join("inner", "coffee.jpg")] == [96, 160]


def test_figures_are_those_of_the_pictures_that_lie_there(judged):
    out, results = judged
    task = results["tasks"]["reconstruction"]
    assert list(task["means"]) == ["vae", "global16", "tree128"]
    for sample in task["samples"]:
        source = to_tensor([picture(out, "reconstruction", sample["key"], "source")])
        assert list(source.shape[2:]) == sample["size"]
        for name, values in sample["values"].items():
            assert values.keys() == {"dino", "clip_i", "structure", "ssim", "psnr"}
            painted = to_tensor([picture(out, "reconstruction", sample["key"], name)])
            assert values["psnr"] == pytest.approx(metrics.psnr(source, painted).item(), rel=1e-5)
    values = [sample["values"]["tree128"]["dino"] for sample in task["samples"]]
    assert task["means"]["tree128"]["dino"] == {"mean": pytest.approx(np.mean(values)), "count": 3, "infinite": 0,
                                                "error": pytest.approx(np.std(values, ddof=1) / 3 ** 0.5)}
    scene_of = next(sample["values"] for sample in task["samples"] if sample["name"] == "scene.png")
    assert scene_of["vae"]["psnr"] > 30 and scene_of["tree128"]["psnr"] > 17, "the miniature knows its own world"


def test_the_protocol_is_whole(judged, miniature_files):
    _, results = judged
    protocol = results["protocol"]
    assert (protocol["seed"], protocol["steps"], protocol["resolution"], protocol["precision"]) == (0, STEPS, 128, "fp32")
    record = checkpoint.read_header(miniature_files / "semantic_adapters" / "miniature_tree128.safetensors")
    assert record["base_sha256"] in protocol["flux"] and record["dinov2_sha256"] in protocol["tower miniature_dinov2.safetensors"]
    assert results["measures"]["structure"]["sha256"] == record["dinov2_sha256"]
    assert [each["measure"] for each in results["tasks"]["reconstruction"]["missing"]] == ["LPIPS"]
    assert results["software"].keys() >= {"torch", "torchmetrics", "lpips"}


def test_a_second_run_paints_only_what_is_missing_and_paints_it_alike(judged, images, miniature_files, monkeypatch):
    out, results = judged
    line = flags(miniature_files, images=images, out=out, presets=["global16", "tree128"], precision="fp32", batch=1)
    painted = []
    plain = Painter.paint
    monkeypatch.setattr(Painter, "paint", lambda self, *rest: painted.append(rest[2]) or plain(self, *rest))
    key = next(sample["key"] for sample in results["tasks"]["reconstruction"]["samples"] if sample["name"] == "scene.png")
    file = out / "pictures" / "reconstruction" / key / "tree128.png"
    before = np.asarray(Image.open(file)).astype(int)
    file.unlink()
    assert cli.main(line) == 0
    assert painted == [[seed_of(key, 0)]], "one picture was missing"
    assert np.abs(np.asarray(Image.open(file)) - before).max() <= 1, "alone as among others"


def test_a_run_that_is_stopped_says_so_and_leaves_what_it_painted(images, miniature_files, tmp_path, monkeypatch, capsys):
    plain, out = Painter.paint, tmp_path / "out"

    def terminated(self, *rest):
        if list(out.rglob("tree128.png")):
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, *rest)

    monkeypatch.setattr(Painter, "paint", terminated)
    assert cli.main(flags(miniature_files, images=images, out=out, batch=1)) == 130
    assert "Stopped. The same line goes on from here." in capsys.readouterr().out
    assert len(list(out.rglob("tree128.png"))) == 1 and not (out / "results.json").exists() and not list(out.rglob("*.part"))


def test_another_protocol_does_not_go_into_the_same_folder(judged, images, miniature_files, capsys):
    out, _ = judged
    assert cli.main(flags(miniature_files, images=images, out=out, precision="fp32", seed=1)) == 1
    assert f"sda: {out} holds pictures of another seed (0, now 1): give another --out." in capsys.readouterr().err


def test_another_machine_paints_on_in_what_the_folder_was_begun_with(judged, images, miniature_files, tmp_path, monkeypatch, capsys):
    """Precision "auto" is decided once: `judged` was painted in fp32, and this machine computes bf16 fast."""
    out = shutil.copytree(judged[0], tmp_path / "out")
    monkeypatch.setattr(precision, "fast_dtype", lambda device: torch.bfloat16)
    assert cli.main(flags(miniature_files, images=images, out=out)) == 0
    assert "Flux paints in fp32 on cpu" in capsys.readouterr().out
    assert cli.main(flags(miniature_files, images=images, out=out, precision="bf16")) == 1
    assert "holds pictures of another precision (fp32, now bf16)" in capsys.readouterr().err


def test_the_page_holds_the_pictures(judged):
    out, _ = judged
    text = (out / "index.html").read_text(encoding="utf-8")
    assert text.count("<article") == 3 and text.count("data:image/jpeg;base64,") == 3 * 4
    assert "astronaut.png" in text and "another protocol" in text and not list(out.rglob("*.part"))


def test_edits_are_carried_out_and_measured_against_the_truth(miniature_files, tmp_path, prepared_edits):
    changes = [change_of("test", index, operation="recolour") for index in range(3)]
    place = prepared_edits(tmp_path / "set", [(render(c.source), render(c.target), c.instruction) for c in changes])
    out = tmp_path / "out"
    line = flags(miniature_files, edits=place, out=out, editor=miniature_files / "edit_decoders" / "miniature_editor.safetensors",
                 text=miniature_files / "text_encoders" / "miniature_t5.safetensors",
                 clip=miniature_files / "clip_vision" / "miniature_clip.safetensors", limit=2, mode="parallel")
    assert cli.main(line) == 0
    task = json.loads((out / "results.json").read_text(encoding="utf-8"))["tasks"]["edits"]
    assert task["count"] == 2 and list(task["means"]) == ["source", "unedited", "parallel"]
    first = task["samples"][0]
    assert first["instruction"] == changes[0].instruction and first["captions"] == ["", ""]
    truth = to_tensor([render(changes[0].target)])
    assert np.array_equal(picture(out, "edits", first["key"], "target"), render(changes[0].target))
    for name in ("source", "parallel"):
        expected = metrics.l1(truth, to_tensor([picture(out, "edits", first["key"], name)])).item()
        assert first["values"][name]["l1"] == pytest.approx(expected, rel=1e-5)
    assert first["values"]["source"]["l1_source"] == 0 and first["values"]["source"]["clip_i_source"] == pytest.approx(1)
    different = [(picture(out, "edits", s["key"], "parallel") != picture(out, "edits", s["key"], "unedited")).any()
                 for s in task["samples"]]
    assert all(different), "the edit decoder has its say"
    missing = {each["measure"]: each["needs"] for each in task["missing"]}
    assert "no text half" in missing["CLIP-T"] and missing.keys() >= {"CLIP-dir", "DINO-I"} and "CLIP-I" not in missing
    assert changes[0].instruction in (out / "index.html").read_text(encoding="utf-8")


def test_captions_bring_the_measures_of_text(encoders, tmp_path, prepared_edits):
    from semantic_diffusion_adapter.training.judge.measures import EDITS, Judge
    from semantic_diffusion_adapter.training.judge.samples import Edits

    pictures = [(render(scene("test", i)), render(scene("test", i + 1)), "change it") for i in range(2)]
    place = prepared_edits(tmp_path / "set", pictures, source_caption=["a cat", ""], target_caption=["a dog", "a bird"])
    judge = Judge({"clip": encoders["clip"], "dino": None}, torch.device("cpu"))
    both, one = list(Edits(str(place), 128))
    values = judge.edits(both, {"source": both.source, "target": both.target})
    assert values["source"]["clip_dir"] == pytest.approx(0, abs=1e-6) and values["target"]["l1"] == 0
    image, text = judge.networks["clip"].images([both.source, both.target]), judge.networks["clip"].texts(["a cat", "a dog"])
    by_hand = metrics.cosine(image[1] - image[0], text[1] - text[0]).item()
    assert values["target"]["clip_dir"] == pytest.approx(by_hand, abs=1e-5)
    assert values["target"]["clip_t"] == pytest.approx(float(image[1] @ text[1]), abs=1e-5)
    assert judge.edits(one, {"target": one.target})["target"].keys() == {"clip_i", "l1", "clip_i_source", "l1_source", "clip_t"}
    assert {each["measure"] for each in judge.missing(EDITS)} == {"DINO-I", "DINO src", "Struct. src"}


def spoiled(source: Path, target: Path, **changes) -> Path:
    """A copy of a checkpoint with other entries in its record."""
    kind = checkpoint.read_header(source)["kind"]
    tensors, record = checkpoint.load(source, kind)
    fields = {key: value for key, value in record.items() if key not in ("kind", "config", "format_version")}
    fields = {key: value for key, value in {**fields, **changes}.items() if value is not None}
    checkpoint.save(target, tensors, kind, record["config"], **fields)
    return target


def test_any_number_of_tokens_of_the_whole_picture_is_a_preset(images, miniature_files, tmp_path):
    """As it is in training: an adapter whose table is global<n> knows no other."""
    out = tmp_path / "out"
    assert cli.main(flags(miniature_files, images=images / "inner", out=out, presets=["global24", "tree128"])) == 0
    means = json.loads((out / "results.json").read_text(encoding="utf-8"))["tasks"]["reconstruction"]["means"]
    assert list(means) == ["vae", "global24", "tree128"] and means["global24"] != means["tree128"]


def test_the_lines_of_the_readme_name_every_published_tower():
    text = (Path(cli.__file__).parent / "judge" / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [shlex.split(line)[2:] for line in text.splitlines() if line.startswith("sda evaluate ")]
    assert len(lines) == 2
    for line in lines:
        config = tyro.cli(Config, args=line)
        assert with_ids(config.towers, config.tower_ids) == [(Path("dfn5b.safetensors"), "dfn5b-vit-h-14-378"),
                                                             (Path("dinov2_tuned.safetensors"), "")]
        assert "dfn5b-vit-h-14-378" in KNOWN_TOWERS


def test_what_does_not_fit_is_one_sentence(images, miniature_files, tmp_path, prepared_edits, capsys):
    empty, locked = tmp_path / "empty", tmp_path / "file"
    empty.mkdir()
    locked.write_text("", encoding="utf-8")
    only_small = tmp_path / "only_small"
    only_small.mkdir()
    shutil.copy(images / "small.png", only_small)
    adapter, editor = (miniature_files / f"{name}.safetensors" for name in
                       ("semantic_adapters/miniature_tree128", "edit_decoders/miniature_editor"))
    towers = [miniature_files / "clip_vision" / f"miniature_{name}.safetensors" for name in ("clip", "dinov2")]
    text = miniature_files / "text_encoders" / "miniature_t5.safetensors"
    edits = prepared_edits(tmp_path / "edits", [(render(scene("test", 0)), render(scene("test", 1)), "go")])
    silent = prepared_edits(tmp_path / "silent", [(render(scene("test", 0)), render(scene("test", 1)), " ")])
    other_base = spoiled(adapter, tmp_path / "other_base.safetensors", base_sha256="0" * 64)
    other_dino = spoiled(adapter, tmp_path / "other_dino.safetensors", dinov2_sha256="0" * 64)
    other_run = spoiled(adapter, tmp_path / "other_run.safetensors", dinov2_sha256=None, run="mine", step=7,
                        towers={"miniature-dinov2": "tuned: mine_miniature-dinov2.safetensors"})
    other_adapter = spoiled(editor, tmp_path / "other_adapter.safetensors", adapter_sha256="0" * 64)
    out = tmp_path / "out"
    cases = [
        ({"out": out}, "There is nothing to judge: give --images, --edits or both."),
        ({"images": empty, "out": out}, f"There are no pictures in {empty}: give a folder"),
        ({"images": tmp_path / "none", "out": out}, f"There is no {tmp_path / 'none'}; give a folder"),
        ({"images": only_small, "out": out}, f"Nothing in {only_small} could be judged (small.png: 100 x 100 px is smaller"),
        ({"images": images, "out": locked}, f"{locked} cannot be written"),
        ({"images": images, "out": out, "presets": "tree182"}, "Unknown preset 'tree182'; use one of"),
        ({"images": images, "out": out, "adapter": other_base}, "was trained through another base"),
        ({"images": images, "out": out, "adapter": other_dino}, "is not the 'miniature-dinov2' that was tuned with"),
        ({"images": images, "out": out, "adapter": other_run}, "is not the 'miniature-dinov2' that was tuned with"),
        ({"images": images, "out": out, "towers": towers[:1]}, "looks through 'miniature-dinov2', which is not among the towers"),
        ({"images": images, "out": out, "adapter": editor}, "'edit_decoder' where 'adapter' is needed"),
        ({"edits": edits, "out": out}, "Edits need --editor: give its file"),
        ({"edits": edits, "out": out, "editor": editor}, "Edits need --text: give its file"),
        ({"edits": images, "out": out, "editor": editor, "text": text}, "holds pictures without instructions"),
        ({"edits": edits, "out": out, "editor": other_adapter, "text": text}, "was trained on another adapter"),
        ({"edits": silent, "out": out, "editor": editor, "text": text}, "it has no instruction"),
        ({"images": images, "out": out, "limit": -1}, "--limit must be at least 0"),
        ({"images": images, "out": out, "lpips": text}, "is not a backbone of LPIPS"),
        ({"images": images, "out": out, "dino": tmp_path / "none"}, "There is no encoder at"),
    ]
    for given, said in cases:
        assert cli.main(flags(miniature_files, **given)) == 1, said
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert said in error and error.startswith("sda: "), error
