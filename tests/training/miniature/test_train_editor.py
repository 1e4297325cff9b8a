"""`sda train editor` on a prepared set of the miniature's edits, with the miniature's networks at random weights."""
from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[training]'")
pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[training]'")

from semantic_diffusion_adapter.kernels import checkpoint, weights  # noqa: E402
from semantic_diffusion_adapter.kernels.edit_decoder import build_edit_decoder, read_config  # noqa: E402
from semantic_diffusion_adapter.training import cli  # noqa: E402
from semantic_diffusion_adapter.training.config import RunConfig, write_toml  # noqa: E402
from semantic_diffusion_adapter.training.data import index as index_module  # noqa: E402
from semantic_diffusion_adapter.training.data.decode import CorruptSample  # noqa: E402
from semantic_diffusion_adapter.training.engine import Step  # noqa: E402
from semantic_diffusion_adapter.training.frozen.base import base_sha256  # noqa: E402
from semantic_diffusion_adapter.training.objectives.augmentation import Augmentation  # noqa: E402
from semantic_diffusion_adapter.training.objectives.edit_flow import FlowTraining  # noqa: E402
from semantic_diffusion_adapter.training.stages import editor  # noqa: E402
from semantic_diffusion_adapter.training.stages.editor_settings import Config, Decoder, Flux, Text, Validation  # noqa: E402
from semantic_diffusion_adapter.training.stages.settings import Data, Vision  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def llm(tmp_path_factory) -> Path:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("llm")
    Qwen3ForCausalLM(Qwen3Config(vocab_size=20, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                                 num_key_value_heads=1, head_dim=16)).save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def few_pictures_measured(monkeypatch) -> None:
    monkeypatch.setattr(editor, "MEASURED", 16)


@pytest.fixture
def config(toy_assets, edits, tmp_path) -> Config:
    def file(name: str) -> Path:
        return toy_assets / f"{name}.safetensors"

    run = RunConfig(tmp_path / "toy", max_steps=2, batch=4, lr=1e-2, warmup=1, precision="fp32", validate_every=2, save_every=2)
    return Config(run, Text(file("text_encoders/miniature_t5")), Data(str(edits), resolutions=((1.0, 128),), held_out=5),
                  file("semantic_adapters/miniature_tree128"),
                  Vision((file("clip_vision/miniature_clip"), file("clip_vision/miniature_dinov2"))),
                  decoder=Decoder(width=32, heads=2, layers=1), validation=Validation(resolution=128, pictures=3, steps=2))


@pytest.fixture
def with_llm(config, llm) -> Config:
    return replace(config, decoder=Decoder("causal_lm", llm=llm, lora_rank=2, checkpointing=True))


@pytest.fixture
def through_flux(config, toy_assets) -> Config:
    base = Flux(toy_assets / "diffusion_models" / "miniature_flux.safetensors", toy_assets / "vae" / "miniature_vae.safetensors", "fp32")
    return replace(config, base=base, flow=FlowTraining(weight=0.5), presets=("global16",))


def step(batch: int = 4, number: int = 0) -> Step:
    return Step(number, 10, 0, "editor", CPU, range(batch), batch)


@pytest.mark.parametrize("kind", ["config", "with_llm"])
def test_a_run_ends_with_a_file_that_the_nodes_load(kind, request, tmp_path, capsys):
    """And goes on where it was; what is exported is the averaged weights, the LLM's LoRA worked in."""
    settings = request.getfixturevalue(kind)
    assert editor.run(settings) is True
    further = replace(settings, run=replace(settings.run, max_steps=4))
    write_toml(settings, tmp_path / "toy.toml")
    assert cli.main(["train", "editor", "--config", str(tmp_path / "toy.toml"), "--max-steps", "4"]) == 0
    assert "resumed editor at step 2" in capsys.readouterr().out
    lines = [json.loads(line) for line in (settings.run.out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)

    path = exported(settings)
    tensors, record = checkpoint.load(path, "edit_decoder")
    decoder = build_edit_decoder(read_config(record["config"])).eval()
    weights.fill(decoder, tensors, path)
    assert record["step"] == 4 and record["text_encoder_sha256"] and record["base_sha256"]
    averaged = editor.EditorStage(further, CPU)
    held = checkpoint_average(settings.run.out)
    with torch.no_grad():
        for name, parameter in averaged.trainables.named_parameters():
            parameter.copy_(held[name])
    # The statistics of the space are the same in every process: they come from the samples of the first batches.
    arguments = torch.randn(1, 16, decoder.config.dim), decoder.places.table.boxes()[:16], decoder.places.table.level_ids()[:16]
    words = averaged.text(["remove the red circle"])
    with torch.no_grad():
        written, expected = decoder(*arguments, words), averaged.decoder.eval()(*arguments, words)
    learnt = (expected - arguments[0]).abs().mean()  # an untrained decoder copies
    assert (written - expected).abs().mean() < 0.2 * learnt and learnt > 1e-3, "equal but for the rounding of the file to bf16"

    assert cli.main(["export", str(settings.run.out), "--to", str(tmp_path / "models")]) == 0
    again, said = checkpoint.load(tmp_path / "models" / "edit_decoders" / "toy.safetensors", "edit_decoder")
    assert said == record and again.keys() == tensors.keys() and all(torch.equal(again[k], v) for k, v in tensors.items())


def exported(settings: Config) -> Path:
    return settings.run.out / "export" / "edit_decoders" / "toy.safetensors"


def checkpoint_average(out: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(sorted(out.glob("checkpoints/step_*"))[-1] / "average.safetensors")


def test_only_lora_and_projections_are_trained_and_saved(with_llm):
    stage = editor.EditorStage(with_llm, CPU)
    names = {name.replace("/", ".") for name, _ in stage.trainables["decoder"].named_parameters()}
    assert names == {n for n, _ in stage.decoder.named_parameters() if not n.startswith("llm.") or ".lora_" in n}
    stage.loss(step())[0].backward()
    assert all(p.grad is None for n, p in stage.decoder.named_parameters() if n not in names)
    assert stage.decoder.out.weight.grad.abs().sum() > 0
    assert "llm" in stage.frozen and "begun_from" in stage.identity


@pytest.mark.parametrize("kind", ["config", "with_llm"])
def test_recomputing_gives_the_gradients_of_keeping(kind, request):
    settings = request.getfixturevalue(kind)
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        stage = editor.EditorStage(replace(settings, decoder=replace(settings.decoder, checkpointing=checkpointing)), CPU)
        torch.nn.init.normal_(stage.decoder.out.weight, std=0.1)
        stage.loss(step())[0].backward()
        gradients.append({n: p.grad for n, p in stage.decoder.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 10
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_the_flow_loss_reaches_the_decoder_through_a_frozen_flux(through_flux):
    stage = editor.EditorStage(through_flux, CPU)
    torch.nn.init.normal_(stage.decoder.out.weight, std=0.1)
    before = {k: v.clone() for k, v in stage.flow.flux.state_dict().items()}
    total, parts = stage.loss(step())
    tokens = parts["parallel"].item() + parts["autoregressive"].item()
    assert total.item() == pytest.approx(tokens + 0.5 * parts["flow"].item(), rel=1e-5)
    gradient = torch.autograd.grad(parts["flow"], stage.decoder.out.weight, retain_graph=True)[0]
    assert gradient.abs().sum() > 0
    total.backward()
    assert all(p.grad is None for p in stage.flow.flux.parameters())
    assert all(torch.equal(v, before[k]) for k, v in stage.flow.flux.state_dict().items())
    assert stage.pictures()["edits"].shape == (3 * 128, 4 * 128, 3)
    assert set(stage.validate()) == {"parallel", "autoregressive", "copy", "flow"}


@pytest.mark.parametrize("kind", ["config", "with_llm"])
def test_a_further_run_starts_from_the_file_of_the_first(kind, request, tmp_path):
    """As fine-tuning through Flux does: with the first run's weights and its statistics of the space, the LLM's LoRA anew."""
    settings = request.getfixturevalue(kind)
    first = editor.EditorStage(settings, CPU)
    torch.nn.init.normal_(first.decoder.out.weight, std=0.2)
    first.decoder.set_token_statistics(first.decoder.token_mean + 1, first.decoder.token_std * 2)
    first.export(7)
    again = replace(settings.decoder, llm=None, start=exported(settings))
    second = editor.EditorStage(replace(settings, decoder=again), CPU)
    arguments = torch.randn(1, 128, 48), second.decoder.places.table.boxes(), second.decoder.places.table.level_ids(), torch.randn(1, 5, 48)
    torch.testing.assert_close(second.decoder(*arguments), first.decoder(*arguments), rtol=0.05, atol=0.05)  # the file is in bf16
    assert second.decoder.token_mean.mean() > 0.5
    assert {n for n, p in second.decoder.named_parameters() if p.requires_grad} == {
        n for n, p in first.decoder.named_parameters() if p.requires_grad}
    other = replace(again, architecture="t5" if kind == "with_llm" else "causal_lm")
    with pytest.raises(ValueError, match="decoder.architecture says .*; make them the same"):
        editor.EditorStage(replace(settings, decoder=other), CPU)


def test_another_base_than_the_adapters_is_refused(through_flux, tmp_path):
    tensors, record = checkpoint.load(through_flux.base.flux, "flux")
    checkpoint.save(tmp_path / "flux.safetensors", tensors, "flux", record["config"], step=1)
    with pytest.raises(ValueError, match="trained through another base than .*flux.safetensors; give that base"):
        editor.EditorStage(replace(through_flux, base=replace(through_flux.base, flux=tmp_path / "flux.safetensors")), CPU)


def test_another_dinov2_than_the_adapters_is_refused(config, tmp_path):
    """With a cache as without one: it would hold what the adapter has never seen."""
    clip, dinov2 = config.vision.files
    tensors, record = checkpoint.load(dinov2, "vision_tower")
    checkpoint.save(tmp_path / "other.safetensors", tensors, "vision_tower", record["config"], step=1)
    for cache in ("", str(tmp_path)):
        with pytest.raises(ValueError, match="other.safetensors is not the 'miniature-dinov2' that was tuned with .*tree128.safetensors"):
            editor.EditorStage(replace(config, vision=Vision((clip, tmp_path / "other.safetensors")),
                                       data=replace(config.data, cache=cache)), CPU)
    with pytest.raises(ValueError, match="looks through 'miniature-dinov2', which is not among the towers"):
        editor.EditorStage(replace(config, vision=Vision((clip,))), CPU)


def test_a_step_is_the_same_however_it_is_cut(config):
    """The samples, their augmentation and their loss depend on the position in the batch alone."""
    stage = editor.EditorStage(replace(config, augmentation=Augmentation(0.3, 0.4)), CPU)
    whole = stage.loss(step())[1]
    halves = [stage.loss(replace(step(), positions=range(first, first + 2)))[1] for first in (0, 2)]
    for name, value in whole.items():
        assert value.item() == pytest.approx(sum(half[name].item() for half in halves) / 2, rel=1e-5)


@pytest.mark.skipif(sys.platform == "win32", reason="forks processes")
def test_two_processes_train_as_one(with_llm, tmp_path):
    """The gradients of what learns are shared although it lies inside a frozen LLM; each process takes its half of a batch."""
    settings = replace(with_llm, run=replace(with_llm.run, micro=2, device="cpu"), decoder=replace(with_llm.decoder, checkpointing=False))
    write_toml(settings, tmp_path / "toy.toml")
    script = Path(__file__).with_name("editor_ranks.py")
    subprocess.run([sys.executable, str(script), str(tmp_path / "toy.toml"), str(tmp_path)], check=True, timeout=300)
    curves, weights = [], []
    for size in ("1", "2"):
        lines = [json.loads(line) for line in (tmp_path / size / "metrics.jsonl").read_text().splitlines()]
        curves.append([(line["step"], line["loss"], line["gradient_norm"]) for line in lines if "loss" in line])
        weights.append(checkpoint_average(tmp_path / size))
    assert np.array(curves[0]).shape == (2, 3)
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-6)
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-5, atol=1e-7)


def test_whole_pictures_are_held_out_with_all_their_edits(config):
    stage = editor.EditorStage(config, CPU)
    rest, kept = stage.plan.index, stage.held
    assert len(kept) == 6 and len(rest) == 24, "the fifth picture's other edit as well"
    assert not set(rest.table["sha256"].to_pylist()) & set(kept.table["sha256"].to_pylist())
    assert sum(len(share.rows) for share in stage.validation.batches(6, 16)) == 6
    assert stage.validate() == stage.validate()


def test_a_corrupt_sample_stops_the_run_or_gives_its_place_to_another(config, edits, tmp_path, capsys):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(edits, broken)
    stage = editor.EditorStage(replace(config, data=replace(config.data, index=str(broken), ahead=1)), CPU)
    row = stage.plan.at("0", 1)[2][1]
    shard = broken / "shards" / "000000.tar"
    data = bytearray(shard.read_bytes())
    data[stage.plan.index[row]["target_offset"] + 50] ^= 255
    shard.write_bytes(data)
    key = stage.plan.index[row]["key"]
    with pytest.raises(CorruptSample, match=f"'{key}'.*000000.tar.*have changed"):
        stage.loss(step(number=1))
    stage.feed.on_corrupt = "skip"
    assert torch.isfinite(stage.loss(step(number=1))[0])
    assert "Another picture takes its place" in capsys.readouterr().out
    assert key in stage.describe(step(number=1))[1]


def test_a_corrupt_held_out_edit_stops_the_validation_or_is_left_out(through_flux, edits, tmp_path, capsys):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(edits, broken)
    data = replace(through_flux.data, index=str(broken))
    stage = editor.EditorStage(replace(through_flux, data=data), CPU)
    shard = broken / "shards" / "000000.tar"
    spoiled = bytearray(shard.read_bytes())
    spoiled[stage.held[0]["target_offset"] + 50] ^= 255
    shard.write_bytes(spoiled)
    key = stage.held[0]["key"]
    with pytest.raises(CorruptSample, match=f"'{key}'.*have changed"):
        stage.validate()
    stage.validation.on_corrupt = "skip"
    first = stage.validate()
    assert stage.validate() == first and np.isfinite(list(first.values())).all()
    assert stage.pictures()["edits"].shape == (2 * 128, 4 * 128, 3), "of the first three"
    said = capsys.readouterr().out
    assert said.count(f"'{key}'") == said.count("The validation goes on without it.") == 1
    # The average is over the five that were read: `copy` of the whole is the mean of theirs.
    copies = []
    for batch in list(stage.validation.batches(6, 1)):
        stage.validation.batches = lambda count, most, batch=batch: iter([batch])
        copies.append(stage.validate()["copy"])
    assert len(copies) == 5 and first["copy"] == pytest.approx(np.mean(copies), rel=1e-5)


@pytest.mark.parametrize("changes, message", [
    ({"decoder": Decoder("causal_lm")}, "decoder.llm is missing"),
    ({"decoder": Decoder(llm=Path("llm"))}, "decoder.llm is given for a T5"),
    ({"decoder": Decoder("causal_lm", llm=Path("llm"), start=Path("file"))}, "decoder.start has an LLM of its own"),
    ({"flow": FlowTraining(weight=1.0)}, "give base.flux and base.vae"),
    ({"presets": ()}, "presets is empty"),
    ({"data": Data("edits", resolutions=((0.5, 128),))}, "data.resolutions is a list of"),
    ({"data": Data("edits", resolutions=((1.0, 128),), held_out=0)}, "held_out must be at least 1"),
    ({"presets": ("tree99",)}, "Unknown preset 'tree99'"),
    ({"decoder": Decoder(width=30, heads=4)}, "use a divisor of the width"),
    ({"decoder": Decoder("causal_lm", llm=Path("absent"))}, "decoder.llm: there is no absent"),
    ({"text": Text(Path("absent"))}, "text.path: there is no absent"),
])  # fmt: skip
def test_what_cannot_work_is_refused_in_one_sentence(config, changes, message):
    with pytest.raises(ValueError, match=message):
        editor.EditorStage(replace(config, **changes), CPU)


def test_cached_features_take_the_towers_place(config, edits, tmp_path):
    """The loss is that of looking anew but for the rounding to float16; the towers are not even loaded."""
    from semantic_diffusion_adapter.training.data.decode import decode, send
    from semantic_diffusion_adapter.training.data.read_cache import ENTRIES, Part

    online = editor.EditorStage(config, CPU)
    index = index_module.Index.read(str(edits))
    for path, (name, tower) in zip(config.vision.files, online.space.towers.items()):
        folder = tmp_path / "cache" / Part(name, base_sha256(path)).folder
        (folder / "shards").mkdir(parents=True)
        keys, images = {}, []
        for row in range(len(index)):
            for member in ("", "target"):
                key = index[row][f"{member}_sha256" if member else "sha256"] + np.array([128, 128], "<i2").tobytes()
                if key not in keys:
                    keys[key] = len(images)
                    images.append(decode(index, row, (128, 128), member))
        save_file({"features": tower(send(images, CPU)).half()}, folder / "shards" / "0.safetensors")
        size = (folder / "shards" / "0.safetensors").stat().st_size
        rows = {"key": list(keys), "shard": ["0.safetensors"] * len(keys), "place": list(keys.values()), "size": [size] * len(keys)}
        pq.write_table(pa.table([pa.array(rows[f.name], f.type) for f in ENTRIES], schema=ENTRIES), folder / "index.parquet")

    cached = editor.EditorStage(replace(config, data=replace(config.data, cache=str(tmp_path / "cache"))), CPU)
    assert not cached.space.towers and cached.identity["towers"] == online.identity["towers"]
    cached.decoder.load_state_dict(online.decoder.state_dict())
    for stage in (online, cached):
        torch.nn.init.constant_(stage.decoder.out.weight, 0.01)
    expected, found = online.loss(step())[1], cached.loss(step())[1]
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=0.01), name
    assert cached.validate()["copy"] == pytest.approx(online.validate()["copy"], rel=0.01)
    with pytest.raises(ValueError, match="holds nothing of miniature-clip with these weights"):
        editor.EditorStage(replace(config, data=replace(config.data, cache=str(tmp_path / "absent"))), CPU)
