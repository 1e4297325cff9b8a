"""`sda train gate` on a prepared set of the miniature's edits, with the miniature's networks at random weights."""
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[training]'")
pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[training]'")

from semantic_diffusion_adapter.kernels import checkpoint  # noqa: E402
from semantic_diffusion_adapter.training import cli  # noqa: E402
from semantic_diffusion_adapter.training.config import RunConfig, write_toml  # noqa: E402
from semantic_diffusion_adapter.training.engine import Step, World  # noqa: E402
from semantic_diffusion_adapter.training.frozen.flux import build_flux, from_bfl, velocity  # noqa: E402
from semantic_diffusion_adapter.training.frozen.gated_attention import attend_by_gate  # noqa: E402
from semantic_diffusion_adapter.training.frozen.region_attention import attend_by_region  # noqa: E402
from semantic_diffusion_adapter.training.objectives.gate import (  # noqa: E402
    GateObjective,
    GateTraining,
    changed_patches,
    lora_state,
    merge_lora,
)
from semantic_diffusion_adapter.training.objectives.reconstruct import named_hierarchy  # noqa: E402
from semantic_diffusion_adapter.training.stages import gate  # noqa: E402
from semantic_diffusion_adapter.training.stages.editor_settings import Validation  # noqa: E402
from semantic_diffusion_adapter.training.stages.gate_settings import Base, Config, check  # noqa: E402
from semantic_diffusion_adapter.training.stages.settings import Data, Vision  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture
def config(toy_assets, edits, tmp_path) -> Config:
    def file(name: str) -> Path:
        return toy_assets / f"{name}.safetensors"

    run = RunConfig(tmp_path / "toy", max_steps=2, batch=4, lr=1e-2, warmup=1, precision="fp32", validate_every=2, save_every=2)
    base = Base(file("diffusion_models/miniature_flux"), file("vae/miniature_vae"), "fp32")
    return Config(run, base, Data(str(edits), resolutions=((1.0, 128),), held_out=5), file("semantic_adapters/miniature_tree128"),
                  Vision((file("clip_vision/miniature_clip"), file("clip_vision/miniature_dinov2"))), presets=("global16",),
                  objective=GateTraining(rank=2), validation=Validation("tree64", resolution=128, pictures=3, steps=2))


def step(batch: int = 4, number: int = 0) -> Step:
    return Step(number, 10, 0, "gate", CPU, range(batch), batch)


def flux_of(toy_assets):
    state, record = checkpoint.load(toy_assets / "diffusion_models" / "miniature_flux.safetensors", "flux")
    network = build_flux(record["config"]).eval()
    network.load_state_dict({k: v.float() for k, v in from_bfl(state, record["config"]["hidden_size"]).items()})
    return network


def test_a_run_ends_with_a_lora_that_goes_into_flux(config, toy_assets, tmp_path, capsys):
    """And goes on where it was; what is exported is the averaged weights."""
    assert gate.run(config) is True
    write_toml(config, tmp_path / "toy.toml")
    assert cli.main(["train", "gate", "--config", str(tmp_path / "toy.toml"), "--max-steps", "4"]) == 0
    assert "resumed gate at step 2" in capsys.readouterr().out
    lines = [json.loads(line) for line in (config.run.out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)
    assert list(config.run.out.rglob("*.png")), "held-out edits are painted"

    path = config.run.out / "export" / "loras" / "toy.safetensors"
    tensors, record = checkpoint.load(path, "gate_lora")
    assert (record["step"], record["config"]["rank"]) == (4, 2) and record["base_sha256"] and record["adapter_sha256"]
    flux, plain = flux_of(toy_assets), flux_of(toy_assets)
    merge_lora(flux, path)
    moved = {name for name, weight in flux.named_parameters() if not torch.equal(weight, plain.get_parameter(name))}
    assert moved == {name.removeprefix("transformer.").replace("lora_A.", "") for name in tensors if ".lora_A." in name} != set()
    assert not any("add_" in name or "ff_context" in name or "norm" in name for name in moved), "the text's layers stay"

    assert cli.main(["export", str(config.run.out), "--to", str(tmp_path / "models")]) == 0
    again, said = checkpoint.load(tmp_path / "models" / "loras" / "toy.safetensors", "gate_lora")
    assert said == record and again.keys() == tensors.keys() and all(torch.equal(again[k], v) for k, v in tensors.items())


def test_only_the_lora_learns(config):
    stage = gate.GateStage(config, CPU)
    loss, parts = stage.loss(step())
    loss.backward()
    assert set(parts) == {"open", "partly", "closed"}
    learnt = {name for name, p in stage.flux.named_parameters() if p.grad is not None}
    assert learnt == {name for name, _ in stage.flux.named_parameters() if ".lora_" in name}
    assert len(lora_state(stage.flux)) == len(learnt)


@pytest.fixture
def objective(toy_assets) -> GateObjective:
    return GateObjective(flux_of(toy_assets), GateTraining())


def sample(objective: GateObjective, gates: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    x, tokens = torch.randn(2, 8, 16, 16, generator=draw), torch.randn(2, 64, 48, generator=draw)
    with torch.no_grad():
        return objective.velocity(x, torch.tensor([0.3, 0.8]), tokens, None, named_hierarchy("tree64"), reference, gates, 1.0)


def test_a_closed_gate_is_flux_without_the_reference(objective, toy_assets):
    """Every patch then computes what it computes alone: neither it nor the text reads the reference."""
    reference = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(1))
    closed = sample(objective, torch.zeros(2, 8, 8), reference)
    assert torch.equal(closed, sample(objective, torch.zeros(2, 8, 8), reference.flip(0)))
    plain = flux_of(toy_assets)
    attention = attend_by_region(plain)
    draw = torch.Generator().manual_seed(0)
    x, tokens = torch.randn(2, 8, 16, 16, generator=draw), torch.randn(2, 64, 48, generator=draw)
    from semantic_diffusion_adapter.training.objectives.reconstruct import regions_for

    attention.regions = regions_for(named_hierarchy("tree64"), (8, 8), CPU)
    with torch.no_grad():
        alone = velocity(plain, x, torch.tensor([0.3, 0.8]), tokens, tokens.new_zeros(2, 48))
    assert torch.allclose(closed, alone, atol=1e-4)
    assert not torch.allclose(sample(objective, torch.ones(2, 8, 8), reference), alone, atol=1e-2)


def test_in_its_first_block_a_closed_patch_reads_nothing_and_an_open_one_does(toy_assets):
    flux = flux_of(toy_assets)
    attention = attend_by_gate(flux)
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 10 + 64 + 64, 24, generator=draw) for _ in range(3))
    other = torch.cat([v[:, :, :74], torch.randn(1, 2, 64, 24, generator=draw)], 2)
    attention.gates = torch.zeros(1, 8, 8)
    attention.gates[0, 2, 3] = 1
    first, second = attention.attend(q, k, v), attention.attend(q, k, other)
    apart = (first - second).abs().amax((0, 1, 3))
    assert apart[10 + 2 * 8 + 3] > 0 and apart[74:].min() > 0
    apart[10 + 2 * 8 + 3] = 0
    assert apart[:74].max() == 0


def test_what_changes_is_closed_and_shares_are_kept(objective):
    source = torch.zeros(400, 3, 128, 128)
    target = source.clone()
    target[:, 1, 40, 70] = 0.5
    found = changed_patches(source[:1], target[:1], 8, 8, 0.1)
    assert found.nonzero().tolist() == [[0, 2, 4]] and changed_patches(source[:1], target[:1], 8, 8, 0.1, 1).sum() == 9
    gates, itself = objective.gates(source, target, 8, 8, step(400))
    closed, opened = (gates == 0).all((1, 2)), (gates == 1).all((1, 2))
    assert closed.float().mean() == pytest.approx(0.1, abs=0.05) and torch.equal(opened, itself)
    assert itself.float().mean() == pytest.approx(0.2, abs=0.06)
    levels = gates[~closed & ~opened][:, 2, 4]
    partly = levels > 0
    assert partly.sum().item() / 400 == pytest.approx(0.4, abs=0.07)
    assert levels[partly].mean() == pytest.approx(0.5, abs=0.1) and levels.max() < 1
    shut = gates[~closed & ~opened][~partly]
    assert set(shut.sum((1, 2)).tolist()) <= {63.0, 55.0}


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(adapter=None), "Give either an adapter or a folder of fits"),
        (dict(presets=()), "presets is empty"),
        (dict(base=dict(precision="int8")), "A LoRA is not trained through a base in int8"),
        (dict(base=dict(flux=Path("nowhere.safetensors"))), "base.flux: there is no nowhere.safetensors"),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(config, change, message):
    if "base" in change:
        change = {"base": replace(config.base, **change["base"])}
    with pytest.raises(ValueError, match=message):
        check(replace(config, **change), World(0, 1, 0, 1, CPU))


def test_a_drift_is_a_step_of_flux_where_something_is_read_and_nothing_elsewhere(objective):
    x0, noise = (torch.randn(200, 4, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    now, led = torch.full((200, 1, 1, 1), 0.4), torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    read, begun = torch.ones(200, 8, 8, dtype=torch.bool), []
    read[:, 2, 3] = False

    def paint(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        begun.append(t)
        assert torch.allclose(x, x0 + t[:, None, None, None] * (noise - x0), atol=1e-5), "it begins on the straight path"
        return led.expand_as(x)

    off = objective.drifted(paint, x0, noise, now, read, step(200))
    assert begun[0].min() >= 0.4 and begun[0].max() <= 1 and begun[0].std() > 0.1
    away = (0.4 - begun[0])[:, None, None, None] * (led - (noise - x0))
    away[:, :, 4:6, 6:8] = 0
    assert torch.allclose(off, away, atol=1e-5)


def test_without_half_open_gates_and_drift_the_draws_are_those_of_the_shipped_file(objective):
    """One chance a sample and then the times and noise: the file can be trained again."""
    objective.settings = replace(objective.settings, partly=0.0, drift=0.0)
    pictures, drawn = torch.zeros(2, 3, 128, 128), step(2)
    objective.gates(pictures, pictures, 8, 8, drawn)
    again = step(2)
    again.rand()
    assert torch.equal(drawn.randn(3), again.randn(3))


@pytest.mark.parametrize("changes", [dict(rank=0), dict(closed=0.6, itself=0.6), dict(closed=-0.1), dict(partly=0.8), dict(drift=1.5)])
def test_settings_out_of_range_are_refused(changes):
    with pytest.raises(ValueError, match="rank|share"):
        GateTraining(**changes)
