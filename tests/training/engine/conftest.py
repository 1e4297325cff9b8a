from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # the toys beside the tests


@pytest.fixture
def straight(tmp_path) -> object:
    """The toy stage after a run of six steps in one go."""
    from toys import Toy, go, settings

    return go(Toy(), settings(tmp_path / "straight"))
