"""`sda invert` and its plan, through the command line: on the shipped miniature, and at toy width."""
from __future__ import annotations

import dataclasses
import io
import json
import signal
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[training]'")
pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install -e '.[training]'")
pq = pytest.importorskip("pyarrow.parquet")

from semantic_diffusion_adapter.kernels import checkpoint, embedding_file  # noqa: E402
from semantic_diffusion_adapter.kernels.adapter import Adapter, AdapterConfig  # noqa: E402
from semantic_diffusion_adapter.kernels.embedding import from_hierarchy  # noqa: E402
from semantic_diffusion_adapter.kernels.hierarchy import PRESETS  # noqa: E402
from semantic_diffusion_adapter.kernels.vision.towers import TowerConfig  # noqa: E402
from semantic_diffusion_adapter.training import cli  # noqa: E402
from semantic_diffusion_adapter.training.config import from_toml, write_toml  # noqa: E402
from semantic_diffusion_adapter.training.data.index import bucket_of  # noqa: E402
from semantic_diffusion_adapter.training.frozen.base import base_sha256, load_flux  # noqa: E402
from semantic_diffusion_adapter.training.frozen.encoders import load_towers  # noqa: E402
from semantic_diffusion_adapter.training.frozen.flux import network_time  # noqa: E402
from semantic_diffusion_adapter.training.plan import costs  # noqa: E402
from semantic_diffusion_adapter.training.stages import invert, invert_settings  # noqa: E402
from semantic_diffusion_adapter.training.stages.settings import Vision  # noqa: E402

CONFIGS = Path(cli.__file__).parent / "configs"
ROOT = CONFIGS.parents[1]
CPU = torch.device("cpu")


def jpeg(height: int, width: int, seed: int) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(coarse).resize((width, height)).save(stream, "JPEG")
    return stream.getvalue()


@pytest.fixture
def toy(parts, tmp_path):
    """toy(**keys) -> the file of an inversion through the toy base of three pictures, of which two share a bucket."""
    for name, data in (("a.jpg", jpeg(64, 64, 0)), ("sub/b.jpg", jpeg(64, 128, 1)), ("c d.jpg", jpeg(70, 66, 2))):
        (tmp_path / "pictures" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pictures" / name).write_bytes(data)

    def make(**keys) -> Path:
        base = invert_settings.Base(parts / "flux.safetensors", parts / "vae.safetensors", parts / "text.safetensors", "fp32")
        known = dict(source=str(tmp_path / "pictures"), out=tmp_path / "out", base=base, preset="tree64", resolution=64,
                     steps=3, device="cpu")
        write_toml(invert_settings.Config(**{**known, **keys}), tmp_path / "invert.toml")
        return tmp_path / "invert.toml"

    return make


def run(toml: Path, *flags: str) -> int:
    return cli.main(["invert", "--config", str(toml), *flags])


def files(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*.safetensors"))}


def report(out: Path) -> dict:
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


def test_the_miniature_is_inverted_without_an_adapter(miniature, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    flags = ("--out", str(tmp_path), "--resolution", "64", "--steps", "10", "--paint", "1")
    assert run(CONFIGS / "miniature_cpu_invert.toml", *flags) == 0
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["picture"] == "scene.png" and line["steps"] == 10 and line["loss"] < 0.7 * line["loss_before"]
    assert "scene.png: loss" in capsys.readouterr().out
    made, thumbnail = embedding_file.load(tmp_path / "scene.png.safetensors")
    assert made.hierarchy() == PRESETS["tree64"] and made.batch == 1 and made.source["pooled_width"]
    assert made.source["invert"]["picture"] == "scene.png" and made.source["fit"]["steps"] == 10
    assert Image.open(io.BytesIO(thumbnail)).size == Image.open(tmp_path / "scene.png.png").size == (64, 64)
    assert report(tmp_path)["fitted"] == 1 and not report(tmp_path)["left_out"]


def test_what_is_there_is_not_fitted_again_unless_its_picture_changed(toy, tmp_path, capsys):
    assert run(toy()) == 0
    first = files(tmp_path / "out")
    assert first.keys() == {"a.jpg.safetensors", "c d.jpg.safetensors", "sub/b.jpg.safetensors"}
    assert run(toy(batch=2)) == 0, "how many at once is free"
    assert "0 pictures fitted, 3 were there, 0 left out" in capsys.readouterr().out and files(tmp_path / "out") == first
    (tmp_path / "pictures" / "a.jpg").write_bytes(jpeg(64, 64, 9))
    (tmp_path / "out" / "c d.jpg.safetensors").unlink()
    assert run(toy()) == 0
    again = files(tmp_path / "out")
    assert {name for name, data in again.items() if data != first[name]} == {"a.jpg.safetensors"}
    assert report(tmp_path / "out")["fitted"] == 3


def test_a_batch_is_of_one_bucket(toy, tmp_path):
    assert run(toy(batch=2)) == 0
    made = {name: embedding_file.load(tmp_path / "out" / name)[0] for name in files(tmp_path / "out")}
    assert len(made) == 3 and all(it.batch == 1 for it in made.values())
    assert not torch.equal(made["a.jpg.safetensors"].tokens, made["c d.jpg.safetensors"].tokens)
    sizes = [Image.open(io.BytesIO(embedding_file.load(tmp_path / "out" / name)[1])).size for name in sorted(made)]
    assert sizes == [(64, 64), (64, 64), bucket_of(64, 128, 64)[::-1]] and sizes[2] != (64, 64)


@pytest.mark.parametrize("change", [{"steps": 4}, {"seed": 1}, {"preset": "global16"}, {"guidance": 2.0}, {"start": "embedding"}])
def test_a_folder_of_other_settings_is_refused(toy, tmp_path, capsys, change):
    (tmp_path / "out").mkdir()
    config = from_toml(invert_settings.Config, toy())
    known = embedding_of(tmp_path / "start.safetensors", "tree64")
    settings = invert_settings.identity(config, base_sha256(config.base.flux))
    source = {"invert": {"settings": settings, "picture": "x", "picture_sha256": "0"}}
    embedding_file.save(tmp_path / "out" / "x.safetensors", dataclasses.replace(known, source=source))
    if change == {"start": "embedding"}:
        change = {"start": str(tmp_path / "start.safetensors")}
    assert run(toy(**change)) == 1
    told = capsys.readouterr().err
    assert "x.safetensors was made with other settings or another base; give the settings that" in told and "another --out." in told
    assert files(tmp_path / "out").keys() == {"x.safetensors"}
    assert run(toy()) == 0


def test_a_picture_that_cannot_be_fitted_is_named_and_ends_nothing(toy, tmp_path, capsys):
    folder = tmp_path / "pictures"
    (folder / "page.jpg").write_text("<html>")
    (folder / "torn.jpg").write_bytes(jpeg(64, 64, 3)[:300])
    (folder / "tiny.jpg").write_bytes(jpeg(20, 20, 4))
    (folder / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    assert run(toy()) == 0
    told = report(tmp_path / "out")
    assert told["fitted"] == 3
    assert {it["picture"]: it["reason"] for it in told["left_out"]} == {
        "page.jpg": "not a picture", "torn.jpg": "broken", "tiny.jpg": "small", "gone.jpg": "unreadable"}
    assert run(toy(source=str(folder / "page.jpg"), out=tmp_path / "none")) == 1
    assert "No picture of" in capsys.readouterr().err and report(tmp_path / "none")["fitted"] == 0


def test_a_signal_keeps_what_is_finished_and_the_same_line_goes_on(toy, tmp_path, capsys):
    for number in range(12):
        (tmp_path / "pictures" / f"{number:02}.jpg").write_bytes(jpeg(64, 64, 10 + number))
    toml, out, ended = toy(), tmp_path / "out", threading.Event()

    def stop() -> None:
        while not (ended.is_set() or list(out.rglob("*.safetensors"))):
            time.sleep(0.002)
        signal.raise_signal(signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda number, frame: None)  # a signal that comes too late ends nothing
    watch = threading.Thread(target=stop)
    try:
        watch.start()
        code = run(toml)
        ended.set()
        watch.join()
    finally:
        signal.signal(signal.SIGTERM, before)
    kept = files(out)
    assert code == 130 and 0 < len(kept) < 15
    assert len(kept) - report(out)["fitted"] in (0, 1), "the signal may come between a file and its line"
    assert "Stopped. The same line goes on from here." in capsys.readouterr().out
    assert run(toml) == 0
    whole = files(out)
    assert len(whole) == 15 and all(whole[name] == data for name, data in kept.items())
    assert run(toml, "--out", str(tmp_path / "at once")) == 0
    assert files(tmp_path / "at once") == whole, "an interruption changes no bit"


def test_a_tar_and_its_captions_are_read(toy, tmp_path):
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for name in ("0.jpg", "1.jpg"):
            info = tarfile.TarInfo(name)
            info.size = len(jpeg(64, 64, 5))
            tar.addfile(info, io.BytesIO(jpeg(64, 64, 5)))
    assert run(toy(source=str(tmp_path / "set.tar"))) == 0
    assert files(tmp_path / "out").keys() == {"set.tar/0.jpg.safetensors", "set.tar/1.jpg.safetensors"}


def embedding_of(path: Path, preset: str, width: int = 20, pooled: bool = False):
    torch.manual_seed(1)
    made = from_hierarchy(0.1 * torch.randn(1, PRESETS[preset].token_count, width), PRESETS[preset],
                          torch.randn(1, 6) if pooled else None)
    embedding_file.save(path, made)
    return made


def test_a_start_from_an_embedding_keeps_its_hierarchy(toy, tmp_path, capsys):
    start = embedding_of(tmp_path / "start.safetensors", "quad64", pooled=True)
    assert run(toy(start=str(tmp_path / "start.safetensors"), pooled=True, rate=1e-4)) == 0
    made, _ = embedding_file.load(tmp_path / "out" / "a.jpg.safetensors")
    assert made.hierarchy() == PRESETS["quad64"]
    torch.testing.assert_close(made.tokens, start.tokens, atol=2e-3, rtol=0)
    assert 0 < (made.pooled - start.pooled).abs().max() < 0.01
    embedding_of(tmp_path / "wide.safetensors", "quad64", width=24)
    assert run(toy(start=str(tmp_path / "wide.safetensors"))) == 1
    assert "is of width 24 and the base reads texts of 20" in capsys.readouterr().err


def test_a_start_from_an_adapter_is_what_it_encodes(toy, parts, tmp_path, capsys):
    towers = [TowerConfig.from_json(checkpoint.read_header(parts / f"{name}.safetensors")["config"]) for name in ("clip", "dino")]
    config = AdapterConfig(PRESETS["tree128"].to_json(), tuple(towers), 32, 2, 1, 20, 6)
    torch.manual_seed(0)
    adapter = Adapter(config)
    adapter.set_text_statistics(torch.linspace(-0.1, 0.1, 20), torch.linspace(0.1, 0.3, 20))
    checkpoint.save(tmp_path / "adapter.safetensors", adapter.state_dict(), "adapter", config.to_json())
    vision = Vision((parts / "clip.safetensors", parts / "dino.safetensors"))
    assert run(toy(start=str(tmp_path / "adapter.safetensors"), vision=vision, rate=1e-4)) == 0
    a, b = (embedding_file.load(tmp_path / "out" / f"{name}.safetensors")[0] for name in ("a.jpg", "sub/b.jpg"))
    assert a.hierarchy() == PRESETS["tree64"] and a.source["adapter"] == "adapter.safetensors" and a.pooled.shape == (1, 6)
    picture = torch.from_numpy(np.array(Image.open(tmp_path / "pictures" / "a.jpg"))).permute(2, 0, 1)[None] / 255
    features = {name: tower(picture) for name, tower in load_towers(vision.files, (), CPU, torch.float32).items()}
    with torch.no_grad():
        expected = adapter.eval()(features, PRESETS["tree64"])[0]
    torch.testing.assert_close(a.tokens, expected, atol=2e-3, rtol=0)
    assert not torch.allclose(a.tokens, b.tokens, atol=2e-3)
    assert run(toy(start=str(tmp_path / "adapter.safetensors"), vision=Vision(vision.files[1:]))) == 1
    assert "looks through 'clip', which is not among the towers" in capsys.readouterr().err


def test_a_start_from_a_caption_is_the_prompt_as_the_base_s_encoder_reads_it(toy, parts, tmp_path, capsys):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    torch.manual_seed(0)
    encoder = T5EncoderModel(T5Config(vocab_size=12, d_model=20, d_kv=6, d_ff=40, num_layers=1, num_heads=2,
                                      feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1))
    encoder.save_pretrained(tmp_path / "flux" / "text_encoder_2")
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(("<pad>", "</s>", "<unk>", "a", "red", "dog"))}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>").save_pretrained(tmp_path / "flux" / "tokenizer_2")
    (tmp_path / "pictures" / "a.txt").write_text("a red dog")
    base = from_toml(invert_settings.Config, toy()).base
    toml = toy(start="caption", base=dataclasses.replace(base, text=tmp_path / "flux"), rate=1e-5)
    assert run(toml) == 0
    assert {it["picture"]: it["reason"] for it in report(tmp_path / "out")["left_out"]} == dict.fromkeys(
        ("c d.jpg", "sub/b.jpg"), "no caption")
    made, _ = embedding_file.load(tmp_path / "out" / "a.jpg.safetensors")
    ids = torch.tensor([[3, 4, 5, *[0] * 61]])
    with torch.no_grad():
        expected = encoder.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    assert torch.nn.functional.cosine_similarity(made.tokens, expected, dim=-1).min() > 0.9
    assert run(toy(start="caption")) == 1
    assert "text.safetensors holds statistics, which read no captions; give the text encoder itself" in capsys.readouterr().err


@pytest.mark.parametrize(("keys", "words"), [
    ({"start": "nowhere.safetensors"}, "start: there is no nowhere.safetensors"),
    ({"preset": "tree65"}, "Unknown preset 'tree65'"),
    ({"pooled": True}, "has no pooled vector to fit"),
    ({"rate": 2.0}, "The rate of a fit is above 0 and at most 1"),
    ({"source": "nowhere"}, "There is no"),
    ({"resolution": 8}, "too small"),
])
def test_what_cannot_work_is_one_sentence(toy, capsys, keys, words):
    assert run(toy(**keys)) == 1
    assert words in capsys.readouterr().err


def test_a_stranger_s_table_beside_the_pictures_is_no_index_of_ours(toy, tmp_path):
    (tmp_path / "pictures" / "c d.jpg").unlink()
    (tmp_path / "pictures" / "sub" / "b.jpg").unlink()
    pq.write_table(pa.table({"picture": ["a.jpg"]}), tmp_path / "pictures" / "index.parquet")
    assert run(toy(steps=1)) == 0 and report(tmp_path / "out")["fitted"] == 1


def test_paintings_do_not_become_pictures(toy, tmp_path, capsys):
    assert run(toy(paint=1, out=tmp_path / "pictures" / "out")) == 1
    assert "what is painted there would be fitted too" in capsys.readouterr().err


def test_a_budget_of_minutes_ends_a_fit_after_a_whole_step(toy, tmp_path):
    assert run(toy(minutes=1e-9, steps=1000)) == 0
    made, _ = embedding_file.load(tmp_path / "out" / "a.jpg.safetensors")
    assert made.source["fit"]["steps"] == 1


def test_a_base_in_bf16_sees_latents_of_the_time_that_it_reads(toy, parts, tmp_path, monkeypatch):
    """bf16 has eight bits for the time; the noise that is there must be that of the rounded one."""
    config = from_toml(invert_settings.Config, toy())
    made = invert.Inverter(dataclasses.replace(config, base=dataclasses.replace(config.base, precision="bf16"), steps=2), CPU)
    seen, real = [], invert.velocity

    def spied(flux, x, t, *rest):
        seen.append((x, t))
        return real(flux, x, t, *rest)

    monkeypatch.setattr(invert, "velocity", spied)
    picture = invert.Picture("a", "a", "0", "", torch.zeros(3, 64, 64, dtype=torch.uint8))
    made.fit([picture])
    latents = made.vae.moments(torch.zeros(1, 3, 64, 64))[0]
    steps = seen[len(invert.TIMES):-len(invert.TIMES)]
    assert len(steps) == 2
    noises = [(x - (1 - network_time(made.flux, t)) * latents) / network_time(made.flux, t) for x, t in steps]
    torch.testing.assert_close(noises[0], -noises[1], atol=1e-4, rtol=1e-4)  # the pair of a fit's noise


def test_the_plan_counts_the_files_that_are_there(toy, parts, capsys):
    assert cli.main(["plan", "invert", "--config", str(toy())]) == 0
    told = capsys.readouterr().out
    flux = load_flux(parts / "flux.safetensors", "fp32")
    assert f"base {costs.parameters(flux):,} frozen (fp32)" in told and "not here yet" not in told
    assert "1,280 learn for a picture (64 tokens)" in told
