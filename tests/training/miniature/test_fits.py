"""Pairs of fitted embeddings and the edit decoder that learns from them, on a miniature of random weights."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[training]'")

from semantic_diffusion_adapter.training import cli  # noqa: E402
from semantic_diffusion_adapter.training.config import RunConfig, from_toml  # noqa: E402
from semantic_diffusion_adapter.training.engine import Step  # noqa: E402
from semantic_diffusion_adapter.training.miniature import editor_fits, fits  # noqa: E402
from semantic_diffusion_adapter.training.objectives.edit import load_editor  # noqa: E402

CPU = torch.device("cpu")


def config(assets: Path, out: Path) -> fits.Config:
    return fits.Config(assets / "diffusion_models/miniature_flux.safetensors", assets / "text_encoders/miniature_t5.safetensors",
                       assets / "vae/miniature_vae.safetensors", assets / "semantic_adapters/miniature_tree128.safetensors", out,
                       sources=4, edits=2, part=2, steps=3, edited_steps=2, device="cpu")


def editor_config(assets: Path, folder: Path, out: Path) -> editor_fits.Config:
    return editor_fits.Config(RunConfig(out, max_steps=2, batch=4, precision="fp32", device="cpu"),
                              assets / "text_encoders/miniature_t5.safetensors", folder, out / "decoder.safetensors",
                              width=32, heads=2, layers=1)


@pytest.fixture(scope="module")
def made(toy_assets, tmp_path_factory) -> fits.Config:
    chosen = config(toy_assets, tmp_path_factory.mktemp("fits"))
    fits.run(chosen)
    return chosen


def test_a_part_holds_sources_their_edits_and_the_way_back(made):
    tokens, pairs, instructions, identity = fits.read_part(made.out / "fits_00000.safetensors")
    changes = [change for index in range(2) for change in fits.edits_of(index, 2)]
    assert tokens.shape[:2] == (2 + len(changes), 64) and tokens.dtype == torch.float16 and identity["steps"] == 3
    assert instructions[::2] == [change.instruction for change in changes]
    assert torch.equal(pairs[::2], pairs[1::2].flip(1)), "every pair is there in reverse as well"
    assert all(row < 2 <= place for row, place in pairs[::2].tolist())
    far = [(tokens[a] - tokens[b]).float().abs().mean() for a, b in pairs[::2].tolist()]
    assert max(far) < (tokens[0] - tokens[1]).float().abs().mean() * 2 and min(far) > 0


def test_what_was_stopped_goes_on_and_gives_the_same(made, capsys):
    second = made.out / "fits_00001.safetensors"
    known, time = fits.read_part(second), (made.out / "fits_00000.safetensors").stat().st_mtime_ns
    second.unlink()
    fits.run(replace(made, first=0, stride=2))
    assert not second.exists() and capsys.readouterr().out == ""
    fits.run(replace(made, first=1, stride=2))
    again = fits.read_part(second)
    assert torch.equal(again[0], known[0]) and torch.equal(again[1], known[1]) and again[2:] == known[2:]
    assert (made.out / "fits_00000.safetensors").stat().st_mtime_ns == time


def test_what_does_not_fit_is_refused_in_one_sentence(made, toy_assets, tmp_path):
    with pytest.raises(ValueError, match="fitted by other settings or weights: give another folder"):
        fits.run(replace(made, steps=4))
    save_file({"tokens": torch.zeros(1, 2, 3)}, tmp_path / "fits_00000.safetensors")
    with pytest.raises(ValueError, match="no part of fitted pairs: delete it"):
        fits.read_part(tmp_path / "fits_00000.safetensors")
    save_file({"tokens": torch.zeros(1, 2, 3), "pairs": torch.tensor([[0, 1]])}, tmp_path / "fits_00000.safetensors",
              {"instructions": '["a"]', "identity": "{}"})
    with pytest.raises(ValueError, match="pairs of .* do not fit its tokens"):
        fits.read_part(tmp_path / "fits_00000.safetensors")
    with pytest.raises(ValueError, match="has 0 parts of fitted pairs, of which 1 are held out"):
        editor_fits.read_fits(tmp_path / "none", 1)


def test_the_decoder_learns_from_the_pairs_alone(made, toy_assets, tmp_path):
    chosen = editor_config(toy_assets, made.out, tmp_path)
    assert editor_fits.run(chosen)
    decoder, record = load_editor(chosen.export, CPU)
    assert record["base_sha256"] == fits.identity_of(made)["flux"] and "adapter_sha256" not in record
    assert decoder.config.dim == fits.read_part(made.out / "fits_00000.safetensors")[0].shape[-1]


def test_held_out_pairs_are_of_other_scenes_and_a_batch_in_halves_has_the_same_loss(made, toy_assets, tmp_path):
    stage = editor_fits.EditorFromFits(editor_config(toy_assets, made.out, tmp_path), CPU)
    assert stage.held.instructions == fits.read_part(made.out / "fits_00001.safetensors")[2]
    with torch.no_grad():
        torch.nn.init.normal_(stage.decoder.out.weight, std=0.1)
        whole, a, b = (stage.loss(Step(3, 10, 0, stage.name, CPU, part, 4))[0] for part in (range(4), range(2), range(2, 4)))
    torch.testing.assert_close((a + b) / 2, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "kind"), [("fits", fits.Config), ("editor_fits", editor_fits.Config)])
def test_the_recipe_is_read_and_the_command_is_there(name, kind):
    assert from_toml(kind, cli.CONFIGS / f"{name}.toml")
    assert cli.ASIDE["editor-from-fits" if name == "editor_fits" else name] == (name, name)
