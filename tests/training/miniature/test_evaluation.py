"""What each figure means, on scenes made by hand; then the whole evaluation on a miniature of random weights."""
from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[training]'")

from PIL import Image  # noqa: E402
from semantic_diffusion_adapter.kernels.algebra import select  # noqa: E402
from semantic_diffusion_adapter.kernels.embedding import from_hierarchy  # noqa: E402
from semantic_diffusion_adapter.kernels.hierarchy import PRESETS  # noqa: E402
from semantic_diffusion_adapter.kernels.precision import resolve  # noqa: E402
from semantic_diffusion_adapter.training.frozen.flux import velocity  # noqa: E402
from semantic_diffusion_adapter.training.frozen.region_attention import RegionAttention  # noqa: E402
from semantic_diffusion_adapter.training.miniature import evaluate  # noqa: E402
from semantic_diffusion_adapter.training.miniature.captions import OPERATIONS, Edit  # noqa: E402
from semantic_diffusion_adapter.training.miniature.evaluation import (  # noqa: E402
    blend,
    editing,
    kit,
    levels,
    locality,
    reconstruction,
    system,
)
from semantic_diffusion_adapter.training.miniature.parser import parse  # noqa: E402
from semantic_diffusion_adapter.training.miniature.scenes import Scene, Thing, render, scene  # noqa: E402

pytestmark = pytest.mark.usefixtures("few_steps")
RED = Thing("circle", "red", "small", 30, 30)
BLUE = Thing("square", "blue", "large", 90, 90)
TWO = Scene("white", (RED, BLUE))


def shown(*things: Thing) -> Scene:
    return Scene("white", things)


def at(thing: Thing, x: float, y: float, **changes) -> Thing:
    return replace(thing, x=x, y=y, **changes)


# Edits of TWO, and what a picture may show: (edit, pictures that obey, pictures that do not).
MOVED, NEAR, ADDED = at(RED, 30, 90), at(RED, 38, 30), Thing("cross", "cyan", "small", 90, 30)
GREEN, STAR = replace(RED, colour="green"), replace(RED, shape="cross", colour="yellow")
CASES = {
    "remove": (Edit("remove", "", TWO, shown(BLUE), RED, None),
               [shown(BLUE), shown(), shown(BLUE, at(RED, 30, 50))],
               [TWO, shown(BLUE, at(RED, 40, 30)), shown(BLUE, GREEN)]),
    "add": (Edit("add", "", TWO, shown(RED, BLUE, ADDED), None, ADDED),
            [shown(RED, BLUE, ADDED), shown(at(ADDED, 90, 42, size="large"))],
            [TWO, shown(RED, BLUE, at(ADDED, 90, 43)), shown(RED, BLUE, replace(ADDED, colour="red"))]),
    "recolour": (Edit("recolour", "", TWO, shown(GREEN, BLUE), RED, GREEN),
                 [shown(GREEN, BLUE), shown(at(GREEN, 35, 35))], [TWO, shown(BLUE), shown(replace(GREEN, shape="cross"), BLUE)]),
    "replace": (Edit("replace", "", TWO, shown(STAR, BLUE), RED, STAR),
                [shown(STAR, BLUE)], [TWO, shown(replace(STAR, shape="square"), BLUE), shown(at(STAR, 30, 50), BLUE)]),
    "move": (Edit("move", "", TWO, shown(MOVED, BLUE), RED, MOVED),
             [shown(MOVED, BLUE), shown(at(MOVED, 38, 88), BLUE)],
             [TWO, shown(BLUE), shown(MOVED, RED, BLUE), shown(at(MOVED, 30, 77), BLUE)]),
    "move by little": (Edit("move", "", TWO, shown(NEAR, BLUE), RED, NEAR),
                       [shown(NEAR, BLUE), shown(at(RED, 36, 30), BLUE)], [TWO, shown(at(RED, 33, 30), BLUE), shown(NEAR, RED, BLUE)]),
}


@pytest.mark.parametrize("case", CASES)
def test_success_is_decided_by_what_stands_where(case):
    change, good, bad = CASES[case]
    assert [editing.fulfilled(change, found) for found in good] == [True] * len(good)
    assert [editing.fulfilled(change, found) for found in bad] == [False] * len(bad)


def test_preservation_is_about_untouched_things_only():
    change = CASES["remove"][0]
    assert editing.judge(change, shown(BLUE)) == editing.Verdict(True, 1, 1, 0)
    assert editing.judge(change, TWO) == editing.Verdict(False, 1, 1, 0), "what was not removed is no loss of the rest"
    assert editing.judge(change, shown(at(BLUE, 97, 90))) == editing.Verdict(True, 0, 1, 1)
    assert editing.judge(change, shown(BLUE, ADDED)) == editing.Verdict(True, 1, 1, 1)
    move = CASES["move"][0]
    assert editing.judge(move, shown(MOVED, replace(BLUE, size="small"))) == editing.Verdict(True, 1, 1, 0)
    assert editing.judge(move, shown(at(MOVED, 30, 60), BLUE)) == editing.Verdict(False, 1, 1, 1)


def test_figures_of_edits_are_pooled():
    verdicts = [editing.Verdict(True, 2, 2, 0), editing.Verdict(False, 0, 1, 1)]
    assert editing.summary(verdicts) == {"success": 0.5, "preservation": pytest.approx(2 * 2 / (3 + 3))}
    assert editing.summary([]) == {"success": None, "preservation": None}
    changes = editing.instructions("test", 25, 0)
    figures = editing.by_operation(changes, [parse(render(c.target)) for c in changes])
    assert list(figures) == [*OPERATIONS, "all"]
    assert all(values == {"success": 1.0, "preservation": 1.0} for values in figures.values()), "the truth is perfect"
    copied = editing.by_operation(changes, [parse(render(c.source)) for c in changes])
    assert copied["all"] == {"success": 0.0, "preservation": 1.0}, "doing nothing never succeeds and harms nothing"


def test_operations_come_up_equally_often():
    changes = editing.instructions("test", 60, 3)
    counts = {name: sum(c.operation == name for c in changes) for name in OPERATIONS}
    assert sum(counts.values()) == 60 and max(counts.values()) - min(counts.values()) <= 2
    assert [c.source for c in changes] == [scene("test", i, 3) for i in range(60)]
    assert changes[:10] == editing.instructions("test", 10, 3)


def test_reconstruction_figures():
    truth, ground = [TWO, TWO], Scene("black", TWO.things)
    sources = np.stack([render(TWO)] * 2)
    perfect = reconstruction.measure(truth, truth, sources, sources)
    assert perfect == {"f1": 1, "f1_colour_position": 1, "position_px": 0, "background": 1, "iou": pytest.approx(1, abs=0.01),
                       "psnr": pytest.approx(58.92, abs=0.01)}
    # One of two scenes: the red one small for large and 5 px off, the blue one 30 px off, on black.
    wrong = Scene("black", (at(RED, 33, 34, size="large"), at(BLUE, 60, 90)))
    figures = reconstruction.measure(truth, [TWO, wrong], sources, np.stack([render(TWO), render(ground)]))
    assert (figures["f1"], figures["f1_colour_position"], figures["background"]) == (0.5, 0.75, 0.5)
    assert figures["position_px"] == pytest.approx((0 + 0 + 5 + 30) / 4)
    assert reconstruction.measure(truth, [shown(), shown()], sources, sources)["position_px"] is None
    half = np.full((4, 4, 3), 100, np.uint8)
    assert reconstruction.psnr(half, half + 10) == pytest.approx(28.13, abs=0.01)


def test_locality_counts_pixels_and_swaps_a_quadrant():
    before = np.zeros((128, 128, 3), np.uint8)
    after = before.copy()
    after[70:80, 10:20, 1] = 26  # one channel, just above a tenth
    after[0:10, 0:10] = 25
    after[5, 100] = 255
    assert locality.changed_pixels(before, after, (1, 0)) == locality.changed_pixels(before, after, (1, 0), 8) == (100, 101)
    after[60, 68] = 255  # just outside the lower left quadrant
    assert [locality.changed_pixels(before, after, (1, 0), wider)[0] for wider in (0, 4, 5)] == [100, 100, 101]
    assert locality.share([(100, 101), (0, 99)]) == 0.5 and locality.share([(0, 0)]) is None
    assert [locality.quadrant_of(i) for i in range(5)] == [(0, 0), (0, 1), (1, 0), (1, 1), (0, 0)]
    tree = PRESETS["tree128"]
    a, b = (from_hierarchy(torch.full((2, 128, 4), value), tree) for value in (0.0, 1.0))
    taken = locality.swap(a, b, (1, 0)).tokens[0, :, 0] == 1
    inside = [level > 0 and box[2] <= 0.5 and box[1] >= 0.5 for level, box in zip(tree.level_ids().tolist(), tree.boxes().tolist())]
    assert taken.tolist() == inside and int(taken.sum()) == 8 + 4 * 4


def test_evenness():
    a, b = shown(at(RED, 30, 30)), shown(at(RED, 90, 30))
    assert blend.similarity(a, a) == 1 and 0.5 < blend.similarity(a, b) < 1
    assert blend.similarity(TWO, Scene("black", TWO.things)) == pytest.approx(2 / 3)
    assert blend.similarity(shown(), shown()) == 1 and blend.similarity(shown(), shown(RED)) == 0.5

    def path(*shares):
        return [shown(at(RED, 30 + 60 * share, 30)) for share in shares]

    even = blend.evenness(a, b, path(*(k / 8 for k in range(9))))
    half = blend.evenness(a, b, path(0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1))
    jump = blend.evenness(a, b, path(0, 0, 0, 0, 0, 1, 1, 1, 1))
    assert even > 0.85 > half > 0.6 > jump and jump == pytest.approx(0, abs=1e-6)
    assert blend.evenness(a, b, [a] * 9) == 0 and blend.evenness(a, b, [b] * 8 + [a]) == 0


def test_noise_is_a_pure_function_of_split_seed_and_scene():
    shape = (8, 16, 16)
    noise = system.noise_of("test", range(6), 0, shape)
    assert noise.shape == (6, *shape) and noise.dtype is torch.float32
    assert torch.equal(system.noise_of("test", [4, 2], 0, shape), noise[[4, 2]])
    assert abs(float(noise.mean())) < 0.05 and abs(float(noise.std()) - 1) < 0.05
    for other in (system.noise_of("test", range(6), 1, shape), system.noise_of("validation", range(6), 0, shape)):
        assert (other - noise).abs().amax((1, 2, 3)).min() > 1
    flat = noise.flatten(1)
    assert (torch.corrcoef(flat) - torch.eye(6)).abs().max() < 0.15, "every scene has noise of its own"


@pytest.fixture(scope="module")
def toy(toy_assets):
    painted = []
    return system.Miniature(toy_assets, torch.device("cpu"), painted.append), painted


def test_painting_counts_and_does_not_depend_on_the_batch(toy, monkeypatch):
    miniature, painted = toy
    monkeypatch.setattr(miniature, "precision", "fp32")  # bf16 would sum in another order, to other pixels
    painted.clear()
    sources = np.stack([render(scene("test", i)) for i in range(3)])
    noise = miniature.noise("test", range(3), 0)
    embedding = miniature.embed(sources, "tree64")
    assert embedding.tokens.shape == (3, 64, 48) and embedding.hierarchy() == PRESETS["tree64"]
    whole = miniature.paint(embedding, "tree64", noise)
    assert whole.shape == sources.shape and whole.dtype == np.uint8 and painted == [3]
    monkeypatch.setattr(system, "BATCH", 2)
    parts = miniature.paint(embedding, "tree64", noise)
    assert sorted(painted) == [1, 2, 3] and abs(parts.astype(int) - whole).max() <= 1
    other = miniature.paint(embedding, "tree64", miniature.noise("test", range(3), 1))
    assert abs(other.astype(int) - whole).mean() > 5


def test_the_mask_is_on_for_masked_adapters_only(toy):
    miniature, _ = toy
    noise = miniature.noise("test", range(1), 0)
    for variant, masked in (("tree128", True), ("tree64_unmasked", False), ("global64", True)):
        miniature.paint(miniature.embed(render(scene("test", 0))[None], variant), variant, noise)
        assert (miniature.attention.regions is not None) == masked
    miniature.paint_text(["a red circle"], noise)
    assert miniature.attention.regions is None


@torch.no_grad()
def test_painting_attends_as_training_does(toy):
    """The evaluation's attention and training's own give one velocity, with and without a visibility."""
    miniature, _ = toy
    x, t = miniature.noise("test", range(2), 0), torch.tensor([0.3, 0.9])
    tokens = torch.randn(2, 128, 48, generator=torch.Generator().manual_seed(0))
    for regions in (miniature._visibility(from_hierarchy(tokens, PRESETS["tree128"]), 128), None):
        found = []
        for processor in (system.Attention(), RegionAttention()):
            processor.regions = regions
            miniature.flux.set_attn_processor(processor)
            found.append(velocity(miniature.flux, x, t, tokens, torch.zeros(2, 48)))
        miniature.flux.set_attn_processor(miniature.attention)
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_a_level_that_is_off_is_not_there(toy, monkeypatch):
    miniature, _ = toy
    monkeypatch.setattr(levels, "CHANGED", 0)  # untrained tokens change little
    own = miniature.embed(np.stack([render(scene("test", index)) for index in range(2)]), "tree128")
    noise = miniature.noise("test", range(2), 0)
    painted = miniature.paint(own, "tree128", noise)
    found = levels.run(miniature, own, noise, painted)
    for level in range(3):
        rest = miniature.paint(select(own, own.levels != level), "tree128", noise)
        expected = (rest != painted).any(-1).mean()
        assert found[str(level)]["off"] == pytest.approx(expected, abs=0.05)
        assert found[str(level)]["off"] > 0 < found[str(level)]["double"]


def test_sdedit_begins_from_the_picture(toy, monkeypatch):
    miniature, _ = toy
    monkeypatch.setattr(miniature, "precision", "fp32")  # so that only the thousandth of noise differs, and no rounding
    source, noise = render(scene("test", 1))[None], miniature.noise("test", [1], 0)
    latents = miniature.latents(source)
    little = miniature.paint_text(["a red circle"], noise, latents, start=0.001)
    assert abs(little.astype(int) - miniature.decode(latents)).max() <= 2
    full = miniature.paint_text(["a red circle"], noise, latents, start=1.0)
    assert np.array_equal(full, miniature.paint_text(["a red circle"], noise))


def test_the_whole_evaluation(toy_assets, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(editing, "STARTS", (0.5, 0.9))
    out = tmp_path / "dump"
    assert evaluate.main(["--scenes", "4", "--seed", "5", "--json", "--dump", str(out), "--assets", str(toy_assets)]) == 0
    printed, said = capsys.readouterr()
    name = resolve("auto", "cpu")
    assert f"computes in {name} on cpu\n" in said and f", {name}; " in printed, "what was chosen is said, and stands on the page"
    results = json.loads(printed.splitlines()[-1])
    assert list(results) == ["text", "reconstruction", "locality", "editing", "chain", "blend", "levels"]
    assert set(results["text"]) == {"f1_colour_place", "f1_shape"} and set(results["locality"]) == {"masked", "unmasked"}
    assert set(results["reconstruction"]) == {"vae", "caption", "global16", "global32", "tree64", "tree112", "tree128",
                                              "tree64_unmasked", "global64", "shuffled"}
    measured = {"f1", "f1_colour_position", "position_px", "background", "iou", "psnr"}
    assert all(set(v) == measured for v in results["reconstruction"].values())
    assert set(results["editing"]) == {"autoregressive", "parallel", "oracle", "copy", "sdedit"}
    for name, values in results["editing"].items():
        beside = {"twins"} if name in ("autoregressive", "parallel", "oracle") else set()
        assert set(values) == {"remove", "add", "recolour", "move", "replace", "all"} | beside
        assert all(set(v) == {"success", "preservation"} for v in values.values())
    assert 0 <= results["blend"]["evenness"] <= 1 and set(results["blend"]) == {"evenness", "whole"}
    assert set(results["chain"]) == {"success", "preservation"}
    assert {level: set(v) for level, v in results["levels"].items()} == dict.fromkeys("012", {"off", "double"})
    for line in ("## Reconstruction", "| shuffled |", "| (chance) |", "## Locality", "| sdedit |", "same colour", "## Blend", "## Levels"):
        assert line in printed

    assert len(list(out.iterdir())) == 4
    for index, change in enumerate(editing.instructions("test", 4, 5)):
        folder = out / f"{index:04d}"
        record = json.loads((folder / "scene.json").read_text(encoding="utf-8"))
        assert Scene.from_json(record["scene"]) == change.source and Scene.from_json(record["edited_scene"]) == change.target
        assert (record["instruction"], record["operation"]) == (change.instruction, change.operation)
        assert np.array_equal(np.asarray(Image.open(folder / "source.png")), render(change.source))
        names = {p.stem for p in folder.glob("*.png")}
        assert names == {"source", *(f"reconstruction_{n}" for n in results["reconstruction"]), *(f"edit_{n}" for n in results["editing"])}
    copied = [np.asarray(Image.open(out / "0002" / f"{name}.png")) for name in ("edit_copy", "reconstruction_tree128")]
    assert np.array_equal(*copied)


def test_painted_in_all_is_what_is_painted(toy, monkeypatch):
    miniature, painted = toy
    painted.clear()
    monkeypatch.setattr(editing, "STARTS", (0.9,))
    monkeypatch.setattr(locality, "PAIRS", 1)
    monkeypatch.setattr(blend, "PAIRS", 1)
    monkeypatch.setattr(system, "sample", lambda flux, contexts, weights, noise, **rest: noise)
    evaluate.run(miniature, 3, 0)
    assert sum(painted) == evaluate.painted_in_all(3)


def test_ablations_that_are_not_there_are_left_out_and_named(toy_assets, tmp_path, capsys, monkeypatch):
    own = tmp_path / "assets"
    shutil.copytree(toy_assets, own)
    (own / "ablations/semantic_adapters/miniature_global64.safetensors").unlink()
    (own / "ablations/semantic_adapters/miniature_tree64_unmasked.safetensors").unlink()
    monkeypatch.setattr(editing, "STARTS", (0.9,))
    assert evaluate.main(["--scenes", "2", "--json", "--assets", str(own)]) == 0
    printed = capsys.readouterr()
    assert "left out, since it is not there: global64 (`sda miniature adapter-global64` trains it)" in printed.err
    assert "`tree64_unmasked` is left out" in printed.out and "| global64 |" not in printed.out
    results = json.loads(printed.out.splitlines()[-1])
    assert set(results["reconstruction"]) == {"vae", "caption", "global16", "global32", "tree64", "tree112", "tree128", "shuffled"}
    assert set(results["locality"]) == {"masked"}
    assert f"{evaluate.painted_in_all(2, ('global64', 'tree64_unmasked'))}/" in printed.err, "the bar's end"


def test_the_kit(toy_assets, capsys):
    assert evaluate.main(["kit", "--scenes", "2", "--seed", "5", "--json", "--assets", str(toy_assets)]) == 0
    printed, said = capsys.readouterr()
    name = resolve("auto", "cpu")
    assert f"computes in {name} on cpu\n" in said and f", {name}; " in printed, "what was chosen is said, and stands on the page"
    results = json.loads(printed.splitlines()[-1])
    assert {part: set(values) for part, values in results.items()} == {
        "compose": {"f1"}, "regional_prompt": {"in_box"}, "keep_outside_mask": {"preservation_gain", "success_change"},
        "edit_strength": {"monotonic"}, "place": {"f1"}, "regions": {"in_region", "alone"}}
    assert all(value is None or -1 <= value <= 1 for values in results.values() for value in values.values())
    assert "| regional_prompt | in_box |" in printed and "ceiling" in printed


def test_the_kit_has_no_pictures_to_dump(tmp_path, capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["kit", "--dump", str(tmp_path / "pictures")])
    assert "--dump keeps the pictures of the system" in capsys.readouterr().err and not (tmp_path / "pictures").exists()


def test_the_kit_paints_what_its_bar_says(toy, monkeypatch):
    miniature, painted = toy
    painted.clear()
    monkeypatch.setattr(system, "sample", lambda flux, contexts, weights, noise, **rest: noise)
    evaluate.run_kit(miniature, 2, 0)
    assert sum(painted) == kit.painted(2)


def test_things_across_the_border_of_two_halves_count_for_neither():
    left = Scene("grey", (Thing("circle", "red", "small", 30, 40), Thing("square", "blue", "large", 60, 90)))
    right = Scene("grey", (Thing("cross", "cyan", "small", 100, 40), Thing("circle", "green", "small", 20, 100)))
    seen = Scene("grey", (left.things[0], Thing("square", "blue", "large", 58, 92), right.things[0]))
    truth, counted = kit.halves(left, right, seen)
    assert truth.things == (left.things[0], right.things[0]) and counted.things == (seen.things[0], seen.things[2])


def test_a_scene_that_is_truly_in_the_middle_is_found_there():
    hosts = [scene("test", 50 + number) for number in range(12)]
    guests = kit.partners(hosts, 0, ("large",))
    assert all(thing.size == "large" for guest in guests for thing in guest.things)
    pictures = np.stack([render(each) for each in hosts])
    assert kit.placed(guests, pictures) < 0.2
    for picture, guest in zip(pictures, guests):
        side = kit.HIGH - kit.LOW
        picture[kit.LOW:kit.HIGH, kit.LOW:kit.HIGH] = Image.fromarray(render(guest)).resize((side, side), Image.Resampling.BOX)
    assert kit.placed(guests, pictures) > 0.95


@pytest.mark.parametrize("file, command", [
    ("vae/miniature_vae", "sda miniature vae"),
    ("text_encoders/miniature_t5", "sda miniature base"),
    ("ablations/clip_vision/miniature_dinov2_global64", "sda miniature adapter-global64"),
    ("edit_decoders/miniature_editor", "sda miniature editor"),
])
def test_a_file_that_is_missing_or_broken_is_named_with_its_command(toy_assets, tmp_path, capsys, file, command):
    broken = tmp_path / "assets"
    shutil.copytree(toy_assets, broken)
    path = broken / f"{file}.safetensors"
    for damage in (lambda: path.write_bytes(path.read_bytes()[:2000]), path.unlink):
        damage()
        assert evaluate.main(["--scenes", "2", "--assets", str(broken)]) == 1
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("eval: ") and str(path) in last and f"`{command}`" in last and "Traceback" not in last
