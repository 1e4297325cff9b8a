"""The benchmarks of training: the plan's FLOPs on the shipped miniature, the data's and the big one at toy size."""
from __future__ import annotations

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[training]'")

from semantic_diffusion_adapter.benchmarks import attention as bench_attention  # noqa: E402
from semantic_diffusion_adapter.benchmarks import data as bench_data  # noqa: E402
from semantic_diffusion_adapter.benchmarks import plan as bench_plan  # noqa: E402
from semantic_diffusion_adapter.benchmarks import redux as bench_redux  # noqa: E402
from semantic_diffusion_adapter.benchmarks import training as bench_training  # noqa: E402
from semantic_diffusion_adapter.kernels.precision import resolve  # noqa: E402
from semantic_diffusion_adapter.training.engine import Step  # noqa: E402
from semantic_diffusion_adapter.training.frozen.random_base import random_flux  # noqa: E402
from semantic_diffusion_adapter.training.objectives.reconstruct import AdapterObjective, AdapterTraining, Batch  # noqa: E402


def test_the_plan_counts_the_flops_of_the_miniatures_step(miniature):
    """Flux and adapter together, forward and backward, as PyTorch counts them."""
    made = bench_plan.Miniature()
    objective = AdapterObjective(made.flux, made.attention, made.adapter, {}, AdapterTraining(growth=((1.0, "tree128"),)))
    features = {t.id: torch.randn(1, t.grid[0] * t.grid[1], t.width) for t in made.adapter.config.towers}
    batch = Batch(torch.randn(1, 8, 16, 16), None, features=features)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        objective.loss(batch, Step(0, 1, 0, "bench", torch.device("cpu"), range(1), 1))[0].backward()
    assert made.flops("tree128", 16, 1, False) == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_the_benchmark_of_training_runs_at_toy_size(capsys):
    pytest.importorskip("bitsandbytes")
    assert bench_training.main(["--device", "cpu", "--sizes", "64", "--steps", "1", "--json"]) == 0
    out = capsys.readouterr().out
    results = json.loads(out.splitlines()[-1])
    assert [(r["recipe"], r["precision"]) for r in results] == [("flux1_dev_24gb", "nf4"), ("flux1_dev_80gb", resolve("auto", "cpu"))]
    assert all(r["finite"] and r["samples_per_second"] > 0 and r["mfu"] is None for r in results) and "A toy shape" in out


def test_the_benchmark_of_data_runs(capsys, monkeypatch):
    monkeypatch.setattr(bench_data, "SIZES", ((1024, 1024),))
    assert bench_data.main(["--pictures", "1", "--rounds", "1", "--json"]) == 0
    result, = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["bucket"] == [1024, 1024] and min(result["bare"], result["prepare"], result["loader"]) > 0


@pytest.mark.parametrize("own", bench_redux.OWN)
def test_pooling_after_the_projection_is_no_worse_than_before(own):
    """By which `kernels.redux.embed` pools after it: nearest token, direction of the part, length."""
    found = bench_redux.measure(bench_redux.WIDTHS["toy"], 27, own, 2)
    after, before = found["after"], found["before"]
    assert after["nearest"] > before["nearest"] - 2e-3 and after["nearest"] > found["not pooled"]["nearest"]
    assert after["direction"] > before["direction"] and after["length"] == pytest.approx(1)
    assert found["bare after"]["length"] < 0.96, "which is why the length is restored"


def test_the_benchmark_of_redux_runs(capsys, monkeypatch):
    monkeypatch.setattr(bench_redux, "WIDTHS", {"toy": (12, 16)})
    monkeypatch.setattr(bench_redux, "GRIDS", (8,))
    assert bench_redux.main(["--pictures", "1", "--json"]) == 0
    assert [result["own"] for result in json.loads(capsys.readouterr().out.splitlines()[-1])] == list(bench_redux.OWN)


@torch.inference_mode()
def test_whatever_the_benchmark_of_attention_times_is_near_float64():
    case = bench_attention.Case(64, "cpu")
    found = {name: case.error(name, case.call(name)) for name in bench_attention.NAMES if not bench_attention.unavailable(name, "cpu")}
    assert len(found) >= 8 and all(error < 0.02 for error in found.values()), found


@pytest.mark.gpu
def test_the_full_shape_trains_on_a_gpu():
    result = bench_training.measure("flux1_dev_24gb", 512, torch.device("cuda"), 1, toy=False)
    assert result["finite"] and result["peak_gb"] < 24


@pytest.mark.parametrize("precision", ["bf16", "int8", "nf4"])
def test_a_random_base_keeps_the_variance_of_what_passes(precision):
    if precision != "bf16":
        pytest.importorskip({"int8": "torchao", "nf4": "bitsandbytes"}[precision])
    flux = random_flux(bench_training.TOY, precision, torch.device("cpu"))
    layer = flux.transformer_blocks[1].attn.to_q
    out = layer(torch.randn(64, 256, dtype=flux.x_embedder.weight.dtype)).float()
    assert 0.9 < float(out.std()) < 1.1 and not any(p.requires_grad for p in flux.parameters())
    assert (type(layer) is torch.nn.Linear) == (precision != "nf4") and all(p.device.type == "cpu" for p in flux.parameters())
