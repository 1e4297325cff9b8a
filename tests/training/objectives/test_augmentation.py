from __future__ import annotations

import pytest
import torch
from semantic_diffusion_adapter.training.objectives.augmentation import NOTHING, Augmentation, augmented, reverse_instruction

BOTH_WAYS = [
    ("add a red car", "remove the red car"),
    ("add an owl on the branch", "remove the owl on the branch"),
    ("remove the old umbrella", "add an old umbrella"),
    ("add clouds to the sky", "remove the clouds from the sky"),
    ("remove the people on the left", "add people on the left"),
    ("replace the dog with a cat", "replace the cat with a dog"),
    ("turn the apple into a pear", "turn the pear into an apple"),
]


@pytest.mark.parametrize("there, back", BOTH_WAYS)
def test_an_instruction_and_its_way_back(there, back):
    assert reverse_instruction(there) == back
    assert reverse_instruction(back) == there


def test_other_words_for_the_same():
    assert reverse_instruction("  Please DELETE the   bus. ") == "add a bus"
    assert reverse_instruction("get rid of the wires") == "add wires"
    assert reverse_instruction("Insert one more lamp!") == "remove the lamp"
    assert reverse_instruction("swap the apples for oranges") == "replace the oranges with apples"


@pytest.mark.parametrize("text", [
    "make the car red", "change the sky", "add a cat and a dog", "remove the hat, then add a scarf", "add it", "remove her hat",
    "make it night", "turn it into a painting", "what if it snowed", "", "remove", "addition of light", *NOTHING,
])  # fmt: skip
def test_what_no_rule_can_reverse_stays(text):
    assert reverse_instruction(text) is None


def test_shares_of_the_samples():
    shares = Augmentation(identity=0.1, reversed=0.25)
    kinds = [shares.kind(i / 1000) for i in range(1000)]
    assert (kinds.count("identity"), kinds.count("reversed"), kinds.count("plain")) == (100, 250, 650)
    assert {Augmentation().kind(i / 100) for i in range(100)} == {"plain"}
    for wrong in ({"identity": -0.1}, {"identity": 0.6, "reversed": 0.5}):
        with pytest.raises(ValueError, match="shares of the samples"):
            Augmentation(**wrong)


def test_a_sample_is_turned_round_only_where_its_instruction_can_be():
    source, target = torch.zeros(3, 4, 4), torch.ones(3, 4, 4)
    shares = Augmentation(identity=0.25, reversed=0.25)
    added = source, target, "add a dog"
    assert augmented(added, 0.9, 0.0, shares) is added
    back = augmented(added, 0.3, 0.0, shares)
    assert back[0] is target and back[1] is source and back[2] == "remove the dog"
    vague = source, target, "make it night"
    assert augmented(vague, 0.3, 0.0, shares) is vague
    said = {augmented(added, 0.1, i / 100, shares)[2] for i in range(100)}
    assert said == set(NOTHING)
    assert augmented(added, 0.1, 0.5, shares)[:2] == (source, source)
