from __future__ import annotations

import pytest
from semantic_diffusion_adapter.kernels import blocks


def test_the_text_form_of_blocks():
    assert blocks.parse_blocks("all", 19, 38) is blocks.parse_blocks("", 19, 38) is blocks.parse_blocks("single, double", 19, 38) is None
    assert blocks.parse_blocks("double 0-9, single 20-37", 19, 38) == {("double", i) for i in range(10)} | {
        ("single", i) for i in range(20, 38)
    }
    assert blocks.parse_blocks("double 3", 19, 38) == {("double", 3)}
    for text, message in (
        ("double 19", "no double block 19: this model has 19"),
        ("single 3-99", "no single block 99: this model has 38"),
        ("single 9-3", "run backwards"),
        ("triple", "'triple' are not understood"),
        ("double 0-", "are not understood"),
        ("0-9", "are not understood"),
        ("double,,single", "are not understood"),
        ("all, double", "are not understood"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            blocks.parse_blocks(text, 19, 38)
        assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
