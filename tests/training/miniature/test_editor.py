"""The miniature's edit decoder stage: its augmentation, and the two decoders that it trains on the same samples."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[training]'")

from semantic_diffusion_adapter.kernels import checkpoint, weights  # noqa: E402
from semantic_diffusion_adapter.kernels.edit_decoder import build_edit_decoder, read_config  # noqa: E402
from semantic_diffusion_adapter.training import cli  # noqa: E402
from semantic_diffusion_adapter.training.config import RunConfig, from_toml  # noqa: E402
from semantic_diffusion_adapter.training.engine import Step  # noqa: E402
from semantic_diffusion_adapter.training.miniature import editor  # noqa: E402
from semantic_diffusion_adapter.training.miniature.captions import LENGTH, OPERATIONS, tokenize  # noqa: E402
from semantic_diffusion_adapter.training.miniature.evaluation.editing import fulfilled  # noqa: E402
from semantic_diffusion_adapter.training.miniature.stored import training_scenes  # noqa: E402
from semantic_diffusion_adapter.training.objectives.augmentation import Augmentation  # noqa: E402

CPU = torch.device("cpu")


def config(assets: Path, out: Path, **changes) -> editor.Config:
    towers = tuple(assets / "clip_vision" / f"miniature_{name}.safetensors" for name in ("clip", "dinov2"))
    given = editor.Config(RunConfig(out, max_steps=2, batch=4, precision="fp32"), assets / "text_encoders" / "miniature_t5.safetensors",
                          assets / "semantic_adapters" / "miniature_tree128.safetensors", towers, out / "editor.safetensors", out / "cache",
                          width=32, heads=2, layers=1, scenes=64)
    return replace(given, **changes)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_way_back_is_an_edit_that_can_be_judged(operation):
    """Its instruction names what the target scene has, its result is fulfilled by the source scene and not without it."""
    for index in range(20):
        change = editor.change_of("train", index, operation=operation)
        back = editor.augmented(change, "reversed", np.random.default_rng(0))
        assert (back.source, back.target) == (change.target, change.source)
        assert fulfilled(replace(back, operation=inverse(change.operation)), back.target)
        assert not fulfilled(replace(back, operation=inverse(change.operation)), back.source)
        words = tokenize(back.instruction)
        assert 2 not in words and words[-1] == 0, "every word is known and the text is not cut"
        assert 1 < words.index(1) < LENGTH


def inverse(operation: str) -> str:
    return {"add": "remove", "remove": "add"}.get(operation, operation)


def test_nothing_to_do_means_nothing():
    said = set()
    for index in range(60):
        change = editor.change_of("train", index)
        same = editor.augmented(change, "identity", np.random.default_rng(index))
        assert same.source == same.target == change.source
        said.add(same.instruction.split(" ")[0])
        names = {thing.name: thing for thing in same.source.things}
        verb, _, rest = same.instruction.partition(" the ")
        if verb == "make":
            shape_name, colour = rest.rsplit(" ", 1)
            assert names[shape_name].colour == colour
        if verb == "remove":
            assert rest not in names
    assert said == {"", "make", "remove"}
    change = editor.change_of("train", 3)
    assert editor.augmented(change, "plain", np.random.default_rng(0)) is change


@pytest.mark.parametrize(("stack", "modes"), [("t5", {"parallel", "autoregressive"}), ("qwen3", {"parallel"})])
def test_either_decoder_learns_on_the_same_samples(toy_assets, tmp_path, stack, modes):
    stage = editor.EditorStage(config(toy_assets, tmp_path, stack=stack, feed_forward=48,
                                      augmentation=Augmentation(identity=0.2, reversed=0.3)), CPU)
    total, parts = stage.loss(Step(3, 10, 0, stage.name, CPU, range(4), 4))
    assert set(parts) == modes | {"copy"} and total.item() == pytest.approx(sum(parts[mode].item() for mode in modes), rel=1e-5)
    total.backward()
    assert stage.decoder.out.weight.grad.abs().sum() > 0
    stage.export(2)
    tensors, record = checkpoint.load(tmp_path / "editor.safetensors", "edit_decoder")
    again = build_edit_decoder(read_config(record["config"]))
    weights.fill(again, tensors, tmp_path)
    assert again.config == stage.decoder.config and record["adapter_sha256"] == stage.identity["adapter"]


def test_twins_and_chains_are_drawn_on_purpose(toy_assets, tmp_path):
    step, scenes = Step(0, 10, 0, "editor", CPU, range(40), 40), training_scenes(64, 0, tmp_path, CPU)
    paired = editor.with_twins(scenes)
    assert 0 < len(paired) < 64
    assert all(any(editor.has_twin(editor.twin_edit(scenes[n], np.random.default_rng(k))) for k in range(3)) for n in paired)
    assert not any(editor.has_twin(editor.twin_edit(scenes[n], np.random.default_rng(0))) for n in set(range(64)) - {*paired})
    plain = editor.prepare(config(toy_assets, tmp_path), scenes, paired, step)
    things = plain["things"].unflatten(0, (3, 40))
    assert torch.equal(things[0], things[1]) and torch.equal(*plain["ids"].unflatten(0, (2, 40)))
    chained = editor.prepare(config(toy_assets, tmp_path, chained=0.25, twins=1.0), scenes, paired, step)
    before, source, target = chained["things"].unflatten(0, (3, 40))
    moved = [not torch.equal(a, b) for a, b in zip(before, source)]
    assert any(moved[:10]) and not any(moved[10:])
    assert all(not torch.equal(a, b) for a, b in zip(source, target))


def test_a_chained_sample_starts_from_what_the_decoder_wrote(toy_assets, tmp_path):
    stage = editor.EditorStage(config(toy_assets, tmp_path, chained=0.5), CPU)
    step = Step(3, 10, 0, stage.name, CPU, range(4), 4)
    _, parts = stage.loss(step)
    plain = stage.losses(stage.ahead(step), "tree128", step)[1]
    assert parts["copy"].isfinite() and not torch.equal(parts["copy"], plain["copy"])


def test_both_recipes_ask_for_the_same_but_for_the_decoder():
    """As many parameters to a percent, the same samples, steps and loss; the LLM is beside what `all` makes."""
    t5, llm = (from_toml(editor.Config, cli.CONFIGS / name) for name in ("editor.toml", "editor_llm.toml"))
    assert llm == replace(t5, stack="qwen3", layers=llm.layers, feed_forward=llm.feed_forward, export=llm.export,
                          run=replace(t5.run, out=llm.run.out))
    table = ((1, 1, 32), (2, 2, 8), (4, 4, 4))
    sizes = [sum(p.numel() for p in build_edit_decoder(c.decoder(192, table)).parameters()) for c in (t5, llm)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)
    assert cli.plan_of(["miniature", "editor-llm"]) == [
        ("miniature.editor", [], "sda miniature editor-llm", cli.CONFIGS / "editor_llm.toml")]
    assert "editor_llm.toml" not in {call[3].name for call in cli.plan_of(["miniature", "all"])}
