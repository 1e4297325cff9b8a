"""The loop without an adapter, by the commands of FLUX.1: edits are inverted, and a decoder learns from the fits alone."""
from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[training]'")
pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[training]'")

from semantic_diffusion_adapter.kernels import checkpoint, embedding_file  # noqa: E402
from semantic_diffusion_adapter.kernels.edit_decoder import read_edit_decoder  # noqa: E402
from semantic_diffusion_adapter.training import cli  # noqa: E402
from semantic_diffusion_adapter.training.config import RunConfig, write_toml  # noqa: E402
from semantic_diffusion_adapter.training.data.index import CorruptSample, Index  # noqa: E402
from semantic_diffusion_adapter.training.engine import Step  # noqa: E402
from semantic_diffusion_adapter.training.objectives.edit_flow import FlowTraining  # noqa: E402
from semantic_diffusion_adapter.training.stages import editor, invert_settings  # noqa: E402
from semantic_diffusion_adapter.training.stages.editor_settings import Config, Decoder, Flux, Text, Validation  # noqa: E402
from semantic_diffusion_adapter.training.stages.fits import Fits, file_of  # noqa: E402
from semantic_diffusion_adapter.training.stages.settings import Data  # noqa: E402

CPU = torch.device("cpu")


def invert(toy_assets: Path, source: Path, out: Path, *flags: str) -> int:
    base = invert_settings.Base(toy_assets / "diffusion_models" / "miniature_flux.safetensors",
                                toy_assets / "vae" / "miniature_vae.safetensors",
                                toy_assets / "semantic_adapters" / "miniature_tree128.safetensors", "fp32")
    toml = out.with_suffix(".toml")
    write_toml(invert_settings.Config(str(source), out, base, preset="global16", resolution=128, steps=3, edited_steps=1,
                                      edited_rate=1e-4, batch=8, device="cpu"), toml)
    return cli.main(["invert", "--config", str(toml), *flags])


@pytest.fixture(scope="module")
def fitted(toy_assets, edits, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("fitted") / "fits"
    assert invert(toy_assets, edits, out) == 0
    return out


@pytest.fixture
def config(toy_assets, edits, fitted, tmp_path, monkeypatch) -> Config:
    monkeypatch.setattr(editor, "MEASURED", 16)
    run = RunConfig(tmp_path / "toy", max_steps=2, batch=4, lr=1e-2, warmup=1, precision="fp32", validate_every=2, save_every=2)
    return Config(run, Text(toy_assets / "text_encoders" / "miniature_t5.safetensors"),
                  Data(str(edits), resolutions=((1.0, 128),), held_out=5), fits=fitted, presets=("global16",),
                  decoder=Decoder(width=32, heads=2, layers=1),
                  validation=Validation("global16", resolution=128, pictures=2, steps=2))


def test_edited_pictures_go_on_from_their_sources(toy_assets, edits, fitted, capsys):
    index = Index.read(str(edits))
    sources = {file_of(index[row]) for row in range(len(index))}
    targets = {file_of(index[row], "target") for row in range(len(index))}
    assert len(sources) == 15 and {path.name for path in fitted.glob("*.safetensors")} == sources | targets
    told = json.loads((fitted / "report.json").read_text())
    assert told["fitted"] == len(sources | targets) and told["left_out"] == []
    tokens = {path.name: embedding_file.load(path)[0].tokens for path in fitted.glob("*.safetensors")}
    for row in range(4):
        own, other = tokens[file_of(index[row])], tokens[file_of(index[(row + 2) % 4])]
        edited = tokens[file_of(index[row], "target")]
        # A single step of the smallest rate: still where its source's fit was.
        assert 0 < (edited - own).abs().max() < 0.01 < (other - own).abs().max()
    assert invert(toy_assets, edits, fitted, "--edited-steps", "2") == 1
    assert "was made with other settings" in capsys.readouterr().err
    assert invert(toy_assets, edits, fitted) == 0
    assert f"0 pictures fitted, {len(tokens)} were there, 0 left out" in capsys.readouterr().out


def test_without_its_source_an_edited_picture_is_left_out(toy_assets, edits, tmp_path, capsys):
    """And what cannot be read is named, and ends nothing."""
    broken = tmp_path / "broken"
    shutil.copytree(edits, broken)
    index = Index.read(str(broken))
    shard = broken / "shards" / "000000.tar"
    data = bytearray(shard.read_bytes())
    data[index[0]["offset"] + 50] ^= 255
    data[index[1]["offset"] + 50] ^= 255
    shard.write_bytes(data)
    assert invert(toy_assets, broken, tmp_path / "fits", "--steps", "1") == 0
    left = json.loads((tmp_path / "fits" / "report.json").read_text())["left_out"]
    assert [(it["picture"], it["reason"]) for it in left] == [
        ("000000000", "broken"), ("000000001", "broken"), ("000000000.target", "no source"), ("000000001.target", "no source")]


def test_a_decoder_learns_from_fits_alone(config, toy_assets, tmp_path, capsys):
    assert editor.run(config) is True
    path = config.run.out / "export" / "edit_decoders" / "toy.safetensors"
    decoder, record = read_edit_decoder(path)
    assert record["fitted"] is True and not {"adapter_sha256", "towers"} & record.keys()
    assert record["base_sha256"] == Fits(config.fits).base_sha256
    assert [*map(list, decoder.config.hierarchy)] == [[1, 1, 16]]
    write_toml(config, tmp_path / "toy.toml")
    assert cli.main(["export", str(config.run.out), "--to", str(tmp_path / "models")]) == 0
    again, said = checkpoint.load(tmp_path / "models" / "edit_decoders" / "toy.safetensors", "edit_decoder")
    assert said == record and again.keys() == checkpoint.load(path, "edit_decoder")[0].keys()


def test_through_flux_as_with_an_adapter(config, toy_assets):
    base = Flux(toy_assets / "diffusion_models" / "miniature_flux.safetensors", toy_assets / "vae" / "miniature_vae.safetensors", "fp32")
    stage = editor.EditorStage(replace(config, base=base, flow=FlowTraining(weight=0.5)), CPU)
    torch.nn.init.normal_(stage.decoder.out.weight, std=0.1)
    total, parts = stage.loss(Step(0, 10, 0, "editor", CPU, range(4), 4))
    assert torch.isfinite(total) and parts["flow"] > 0
    assert stage.pictures()["edits"].shape == (2 * 128, 4 * 128, 3)
    other = replace(base, flux=toy_assets / "vae" / "miniature_vae.safetensors")
    with pytest.raises(ValueError):
        editor.EditorStage(replace(config, base=other, flow=FlowTraining(weight=0.5)), CPU)


def test_edits_without_both_fits_are_left_out_and_said(config, fitted, tmp_path):
    some = tmp_path / "some"
    shutil.copytree(fitted, some)
    index = Index.read(config.data.index)
    (some / file_of(index[0], "target")).unlink()
    (some / file_of(index[2])).unlink()
    stage = editor.EditorStage(replace(config, fits=some), CPU)
    assert "3 left out because they are not fitted" in stage.report()
    torn = some / file_of(index[4])
    torn.write_bytes(torn.read_bytes()[:-10])
    with pytest.raises(CorruptSample, match="its fit cannot be read"):
        Fits(some).read(index, 4)


@pytest.mark.parametrize("change, words", [
    ({"presets": ("tree64",), "validation": Validation("tree64")}, "are of the preset global16; give it as presets"),
    ({"presets": ("global16", "tree64")}, "Fitted embeddings have one preset"),
    ({"adapter": Path("a.safetensors")}, "Give either an adapter or a folder of fits"),
    ({"fits": None}, "Give either an adapter or a folder of fits"),
    ({"fits": Path("nowhere")}, "there is no nowhere"),
])
def test_what_does_not_fit_is_one_sentence(config, change, words):
    with pytest.raises(ValueError, match=words):
        editor.EditorStage(replace(config, **change), CPU)


def test_a_folder_of_anything_else_is_no_folder_of_fits(tmp_path):
    with pytest.raises(ValueError, match="holds no fitted embeddings of a prepared set; make them with `sda invert`"):
        Fits(tmp_path)
