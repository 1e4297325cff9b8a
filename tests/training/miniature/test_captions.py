"""The language against an independent reader of it."""
from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[training]'")

from semantic_diffusion_adapter.training.miniature.base import inverse_instruction, training_text  # noqa: E402
from semantic_diffusion_adapter.training.miniature.captions import (  # noqa: E402
    LENGTH,
    OPERATIONS,
    VOCABULARY,
    caption,
    edit,
    tokenize,
)
from semantic_diffusion_adapter.training.miniature.editor import change_of  # noqa: E402
from semantic_diffusion_adapter.training.miniature.scenes import (  # noqa: E402
    RADII,
    Scene,
    Thing,
    place_centre,
    scene,
)
from semantic_diffusion_adapter.training.miniature.score import distance  # noqa: E402


def spot(words: str, size: str) -> tuple[float, float]:
    """What "the top left" or "20 40" says about the place of a thing of this size."""
    if re.fullmatch(r"\d+ \d+", words):
        x, y = words.split()
        return float(x), float(y)
    return place_centre(words.removeprefix("the "), RADII[size])


def obey(text: str, source: Scene) -> Scene:
    """Apply an instruction to a scene by reading the sentence."""
    by_name = {t.name: t for t in source.things}

    def swapped(old, new):
        return replace(source, things=tuple(n for n in (new if t == old else t for t in source.things) if n))

    if m := re.fullmatch(r"remove the (\w+ \w+)", text):
        return swapped(by_name[m[1]], None)
    if m := re.fullmatch(r"add a (\w+) (\w+) (\w+) at (.+)", text):
        thing = Thing(m[3], m[2], m[1], *spot(m[4], m[1]))
        return replace(source, things=(*source.things, thing))
    if m := re.fullmatch(r"make the (\w+ \w+) (\w+)", text):
        return swapped(by_name[m[1]], replace(by_name[m[1]], colour=m[2]))
    if m := re.fullmatch(r"move the (\w+ \w+) to (.+)", text):
        x, y = spot(m[2], by_name[m[1]].size)
        return swapped(by_name[m[1]], replace(by_name[m[1]], x=x, y=y))
    m = re.fullmatch(r"replace the (\w+ \w+) with a (\w+) (\w+)", text)
    return swapped(by_name[m[1]], replace(by_name[m[1]], colour=m[2], shape=m[3]))


def agree(a: Scene, b: Scene, slack: float = 1.5) -> bool:
    """Equal but for the rounding of coordinate words (1 px in x and in y, the last word is 126) and the order."""
    def key(thing):
        return thing.colour, thing.shape, thing.size

    left, right = sorted(a.things, key=key), sorted(b.things, key=key)
    return a.ground == b.ground and [key(t) for t in left] == [key(t) for t in right] \
        and all(distance(s, t) <= slack for s, t in zip(left, right))


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("fine", [False, True])
def test_obeying_the_instruction_gives_the_target(operation, fine):
    done = 0
    for index in range(60):
        source = scene("train", index)
        change = edit(source, np.random.default_rng(index), operation, fine)
        assert change.source == source and change.target != source
        assert change.operation in (operation, "recolour")
        assert agree(obey(change.instruction, source), change.target), change.instruction
        things, kept = set(source.things), set(change.target.things)
        assert things - kept == ({change.subject} if change.subject else set())
        assert kept - things == ({change.result} if change.result else set())
        assert len({t.name for t in change.target.things}) == len(change.target.things), "names stay unambiguous"
        done += change.operation == operation
    assert done >= 20, "an operation must be possible on many scenes"


def test_the_inverse_of_an_edit_leads_back():
    said = 0
    for index in range(120):
        rng = np.random.default_rng(index)
        change = edit(scene("train", index), rng, OPERATIONS[index % 5], fine=True)
        words = inverse_instruction(change, fine=True)
        said += 1
        assert agree(obey(words, change.target), change.source), words
        if change.operation in ("remove", "move"):
            assert inverse_instruction(change, fine=False) is None
    assert said == 120


def test_a_change_is_a_pure_function_and_its_operation_can_be_asked_for():
    assert change_of("test", 4) == change_of("test", 4) != change_of("test", 5)
    assert change_of("test", 4, seed=1).source == scene("test", 4, 1)
    assert change_of("test", 4, operation="remove").operation == "remove"


def test_captions_name_everything():
    truth = Scene("grey", (Thing("circle", "red", "small", 20.9, 41.2), Thing("cross", "cyan", "large", 64, 100)))
    assert caption(truth) == "a small red circle at the top left, a large cyan cross at the bottom, on a grey ground"
    assert caption(truth, fine=True) == "a small red circle at 20 42, a large cyan cross at 64 100, on a grey ground"
    orders = {caption(truth, np.random.default_rng(i)) for i in range(8)}
    assert len(orders) == 2 and all(text.endswith("on a grey ground") for text in orders)
    assert caption(Scene("black", ())) == "on a black ground"


def test_every_text_of_training_fits_the_tokenizer():
    for index in range(300):
        for share in (0.0, 1.0):
            ids = tokenize(training_text(scene("train", index), np.random.default_rng(index), share))
            assert len(ids) == LENGTH and 2 not in ids
            assert ids.count(1) == 1 and set(ids[ids.index(1) + 1:]) <= {0}
        assert 2 not in tokenize(change_of("train", index).instruction)


def test_the_tokenizer():
    assert len(set(VOCABULARY)) == len(VOCABULARY)
    ids = tokenize("Remove the RED, circle! zebra 20")
    words = [VOCABULARY[i] for i in ids if i]
    assert words == ["remove", "the", "red", "circle", "<unk>", "20", "</s>"] and len(ids) == LENGTH
    assert tokenize("") == [1] + [0] * (LENGTH - 1)
    long = tokenize("red " * 100)
    assert len(long) == LENGTH and long[-1] == 1 and set(long[:-1]) == {VOCABULARY.index("red")}
