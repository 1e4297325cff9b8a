"""training/README.md shows one step by lines that the sources have."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def shown() -> list[tuple[str, str]]:
    """(file, line of code without its note) of every line that the page shows of a step."""
    page = (ROOT / "training" / "README.md").read_text(encoding="utf-8")
    block = re.search(r"^## One step.*?^```python\n(.*?)^```", page, re.M | re.S)[1]
    found, file = [], ""
    for line in block.splitlines():
        if line.startswith("# "):
            file = line[2:]
        elif line:
            found.append((file, re.split(r"  +# ", line)[0].strip()))
    return found


def test_the_step_that_the_page_shows_is_that_of_the_sources():
    lines = shown()
    assert 20 < len(lines) < 45
    sources = {file: {line.strip() for line in (ROOT / file).read_text(encoding="utf-8").splitlines()} for file, _ in lines}
    assert [f"{file} has no line: {line}" for file, line in lines if line not in sources[file]] == []
