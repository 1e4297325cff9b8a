"""The page: whole without anything beside it, true to the results, and safe whatever files are called."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from semantic_diffusion_adapter.training.judge import page, published
from semantic_diffusion_adapter.training.judge.measures import EDITS, MEASURES, RECONSTRUCTION
from semantic_diffusion_adapter.training.judge.metrics import summary

NASTY = "<script>alert('x')</script> & \"quotes\" 'too'.png"


def results_of(values: list[dict], folder, **task) -> dict:
    """Results of one task with these values for each sample; their pictures lie in `folder`."""
    samples = []
    for place, each in enumerate(values):
        own = folder / "pictures" / "reconstruction" / f"{place:016d}"
        own.mkdir(parents=True)
        for name in ("source", *each):
            Image.fromarray(np.full((64, 96, 3), 40 * place, np.uint8)).save(own / f"{name}.png")
        samples.append({"key": own.name, "name": f"{place} {NASTY}", "size": [64, 96], "values": each})
    means = {name: {m: summary([v[name][m] for v in values]) for m in values[0][name]} for name in values[0]}
    body = {"set": {"place": "here"}, "count": len(values), "missing": [], "skipped": [], "means": means, "samples": samples} | task
    return {"made": "2026-01-01", "protocol": {"seed": 0, "adapter": "a.safetensors, sha256 00"}, "measures": {}, "device": "cpu",
            "software": {"torch": "2"}, "tasks": {"reconstruction": body}}


class Reader(HTMLParser):
    """Every tag with its attributes, and what it found out of place."""

    VOID = {"img", "input", "meta", "br"}

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.open, self.wrong = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


@pytest.fixture
def made(tmp_path) -> tuple[dict, str]:
    values = [{"vae": {"psnr": 30.0, "ssim": 0.9}, "tree128": {"psnr": 10.0 + place, "ssim": 0.5}} for place in range(3)]
    values[1]["vae"]["psnr"] = math.inf
    missing = [{"measure": "LPIPS", "key": "lpips", "needs": "a backbone"}]
    results = results_of(values, tmp_path, missing=missing, skipped=[{"name": NASTY, "reason": "unreadable"}])
    return results, page.page(results, tmp_path)


def test_nothing_is_fetched_and_nothing_is_injected(made):
    _, text = made
    reader = Reader(text)
    assert not reader.wrong and not reader.open, "every tag is closed where it was opened"
    assert not re.search(r"(src|href|url)\s*[=(]\s*['\"]?(?!data:)[a-z]+:", text), "no address but data:"
    policy = next(attrs["content"] for tag, attrs in reader.tags if attrs.get("http-equiv"))
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert [tag for tag, _ in reader.tags].count("script") == 1, "a file's name stays a name"
    assert {tag for tag, attrs in reader.tags for key in attrs if key.startswith("on")} == set()
    pictures = [attrs for tag, attrs in reader.tags if tag == "img" and "src" in attrs]
    assert len(pictures) == 3 * 3 and all(attrs["src"].startswith("data:image/jpeg;base64,") and attrs["alt"] for attrs in pictures)


def test_means_and_what_was_left_out_are_said(made):
    _, text = made
    assert "11.00 <small>&plusmn; 0.577</small>" in text  # 10, 11, 12
    assert "30.00 <small>&plusmn; 0.000" in text.replace("0.0000", "0.000") and "and 1 equal" in text
    assert "<b>LPIPS</b>: give <code>--lpips</code> a backbone" in text and "unreadable" in text


def test_cards_carry_the_values_that_they_are_sorted_by(made):
    _, text = made
    reader = Reader(text)
    cards = [attrs for tag, attrs in reader.tags if tag == "article"]
    assert [card["data-tree128psnr"] for card in cards] == ["10.0", "11.0", "12.0"]
    assert [("data-vaepsnr" in card) for card in cards] == [True, False, True], "what is infinite is sorted last"
    options = {attrs["value"] for tag, attrs in reader.tags if tag == "option"}
    assert options == {"", "vaepsnr", "vaessim", "tree128psnr", "tree128ssim"}
    assert NASTY.lower() in cards[0]["data-words"]


def test_published_figures_stand_beside_ours_and_are_marked(made):
    _, text = made
    assert text.count("another protocol</span>") == 2, "only tables that share a measure, and every one is marked"
    part = text[text.index("Reconstruction by inversion"):]
    assert part.index("tree128") < part.index("RF-Solver") and "<td>20.05</td>" in part and "<td>16.57</td>" in part
    assert "Likeness to a subject" not in text and "MagicBrush" not in text


def test_a_page_shows_no_more_pictures_than_it_can_carry(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "SHOWN", 2)
    text = page.page(results_of([{"vae": {"psnr": 1.0}}] * 3, tmp_path), tmp_path)
    assert text.count("<article") == 2 and "the first 2 of 3" in text


def test_published_tables_use_measures_that_we_take():
    known = {"reconstruction": set(RECONSTRUCTION), "edits": set(EDITS)}
    for table in published.TABLES:
        for row in table.rows:
            assert row.values.keys() <= known[table.task] and row.source and row.read in ("primary", "secondary")
            assert all(0 < value < (50 if name == "psnr" else 1) for name, value in row.values.items())
    assert set(RECONSTRUCTION) | set(EDITS) == MEASURES.keys()


def test_the_terminal_gets_the_same_means(made):
    results, _ = made
    lines = page.table(results).splitlines()
    assert lines[0].split() == ["Reconstructions", "(3)", "SSIM", "PSNR,", "dB"]
    assert lines[2].split() == ["tree128", "0.500", "11.00"] and "give --lpips a backbone" in lines[3]
