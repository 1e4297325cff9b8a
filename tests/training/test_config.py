from __future__ import annotations

import importlib
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[training]'")

from semantic_diffusion_adapter.training import cli  # noqa: E402
from semantic_diffusion_adapter.training.config import RunConfig, build, from_toml, to_dict, write_toml  # noqa: E402


@dataclass(frozen=True)
class Part:
    phases: tuple[tuple, ...] = ((0.5, "a"),)
    weight: float = 1.0


@dataclass(frozen=True)
class Config:
    run: RunConfig
    file: Path
    part: Part = field(default_factory=Part)


RUN = {"out": "here", "max_steps": 3}


def test_values_reach_their_types():
    config = build(Config, {"run": RUN, "file": "a/b", "part": {"phases": [[0.1, "x"], [1.0, "y", "z"]]}}, "c.toml")
    assert config.file == Path("a/b") and config.run.out == Path("here")
    assert config.part.phases == ((0.1, "x"), (1.0, "y", "z")) and config.part.weight == 1.0


@pytest.mark.parametrize("data, message", [
    ({"run": RUN, "file": "x", "fiel": 1}, "c.toml: unknown key 'fiel'; did you mean 'file'?"),
    ({"run": RUN | {"max_step": 1}, "file": "x"}, r"c.toml \[run\]: unknown key 'max_step'; did you mean 'max_steps'?"),
    ({"run": RUN, "file": "x", "qqqq": 1}, "unknown key 'qqqq'; known keys: run, file, part"),
    ({"run": RUN}, "c.toml: the key 'file' is missing"),
    ({"run": {"out": "here"}, "file": "x"}, r"c.toml \[run\]: the key 'max_steps' is missing"),
])
def test_a_wrong_key_is_named_with_its_remedy(data, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        build(Config, data, "c.toml")


@dataclass(frozen=True)
class Deep:
    run: RunConfig
    files: tuple[Path, ...] = ()
    head: Path | None = None
    outer: Config | None = None


def test_paths_in_lists_and_tables_in_tables_come_back_as_they_were(tmp_path):
    inner = Config(RunConfig(Path("there"), 5), Path("c/d"), Part(((0.5, "ä"),)))
    config = Deep(RunConfig(Path("here"), 3), (Path("a"), Path("b")), Path("h"), inner)
    write_toml(config, tmp_path / "config.toml")
    found = from_toml(Deep, tmp_path / "config.toml")
    assert found == config and found.files[1].name == "b"


@dataclass(frozen=True)
class Odd:
    run: RunConfig
    mu: float | Literal["resolution"] = 0.5
    times: tuple[float, ...] = (0.5,)


WRONG = [  # (key of [run], its value, what is wrong with it)
    ("lr", "1e-4", '"1e-4"; it must be a number, without quotes'), ("lr", math.nan, "nan; it must be a finite number"),
    ("lr", True, "true; it must be a number"), ("clip", math.inf, "inf; it must be a finite number"),
    ("lr", 0.0, "0.0; it must be greater than 0"), ("batch", 16.5, "16.5; it must be a whole number"),
    ("batch", 16.0, "16.0; it must be a whole number"), ("batch", True, "true; it must be a whole number"),
    ("max_steps", "20", '"20"; it must be a whole number, without quotes'),
    ("compile", "false", '"false"; it must be true or false, without quotes'), ("compile", 0, "0; it must be true or false"),
    ("dry_run", "yes", '"yes"; it must be true or false, without quotes'), ("out", 3, "3; it must be a text"),
    ("on_nonfinite", "ignore", "\"ignore\"; it must be 'stop' or 'skip'"), ("plan_steps", -1, "-1; it must be at least 0"),
    ("ema", 1.0, "1.0; it must be less than 1"), ("seed", [1], "a list; it must be a whole number"),
    *((key, 0, "0; it must be at least 1") for key in ("max_steps", "batch", "validate_every", "keep"))]


@pytest.mark.parametrize(("key", "value", "words"), WRONG)
def test_a_wrong_value_is_one_sentence_with_the_file_the_key_and_what_was_expected(key, value, words):
    with pytest.raises(ValueError) as error:
        build(Odd, {"run": RUN | {key: value}}, "c.toml")
    assert str(error.value) == f"c.toml [run]: '{key}' is {words}."


@pytest.mark.parametrize(("data", "words"), [
    ({"run": 5}, "c.toml: 'run' is 5; it must be a table."), ({"mu": "x"}, "'mu' is \"x\"; it must be a number or 'resolution'"),
    ({"times": [0.5, "x"]}, "c.toml: 'times[1]' is \"x\"; it must be a number, without quotes."),
    ({"times": 0.5}, "c.toml: 'times' is 0.5; it must be a list.")])
def test_tables_lists_and_what_may_be_either_are_named(data, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        build(Odd, {"run": RUN} | data, "c.toml")


@given(st.floats() | st.integers(-10, 10**6) | st.text(max_size=8) | st.booleans() | st.none())
def test_what_is_built_has_the_types_that_it_says(value):
    """Whatever stands in a file: a number that may be finite and above 0, or a sentence."""
    try:
        made = build(Odd, {"run": RUN | {"lr": value}}, "c.toml").run.lr
    except ValueError as error:
        assert "c.toml [run]: 'lr' is" in str(error)
        assert isinstance(value, (bool, str, type(None))) or not 0 < value < math.inf
    else:
        assert isinstance(made, float) and made == value and math.isfinite(made) and not isinstance(value, (bool, str))


def test_what_a_flag_says_is_held_to_the_same_bounds(tmp_path, capsys):
    file = tmp_path / "vae.toml"
    file.write_text('export = "x"\n[run]\nout = "y"\nmax_steps = 1\n', encoding="utf-8")
    for flags, words in ((["--run.lr", "nan"], "'lr' is nan; it must be a finite number"),
                         (["--run.clip", "inf"], "'clip' is inf; it must be a finite number"),
                         (["--run.batch", "0"], "'batch' is 0; it must be at least 1")):
        assert cli.main(["miniature", "vae", "--config", str(file), *flags]) == 1
        assert capsys.readouterr().err == f"sda: the command line [run]: {words}.\n"
    with pytest.raises(SystemExit):
        cli.main(["miniature", "vae", "--config", str(file), "--run.batch", "16.5"])
    assert "--run.batch" in capsys.readouterr().err


def test_a_file_that_is_no_toml_is_one_sentence(tmp_path):
    (tmp_path / "c.toml").write_text("lr = = 3", encoding="utf-8")
    with pytest.raises(ValueError, match="c.toml is no TOML file .*line 1"):
        from_toml(Config, tmp_path / "c.toml")


@pytest.mark.parametrize("flags", [["--max-steps", "7", "--out", "x", "--resume", "never", "--dry-run"],
                                   ["--run.max-steps", "7", "--run.out", "x", "--run.resume", "never", "--run.dry-run"]])
def test_flags_have_short_names_too(flags):
    tyro = pytest.importorskip("tyro", reason="tyro is not installed: pip install -e '.[training]'")
    default = build(Config, {"run": RUN, "file": "a/b"}, "c.toml")
    run = tyro.cli(Config, args=flags, default=default).run
    assert (run.max_steps, run.out, run.resume, run.dry_run) == (7, Path("x"), "never", True)


def test_what_a_run_writes_down_gives_the_same_configuration(tmp_path):
    config = build(Config, {"run": RUN | {"lr": 3e-4, "compile": True}, "file": "a/b", "part": {"weight": 0.25}}, "c.toml")
    write_toml(config, tmp_path / "config.toml")
    assert from_toml(Config, tmp_path / "config.toml") == config
    assert to_dict(config)["part"]["phases"] == [[0.5, "a"]]


@pytest.mark.parametrize("stage", cli.STAGES)
def test_every_shipped_file_fits_its_stage(stage):
    module, file = cli.STAGES[stage]
    module = importlib.import_module(f"semantic_diffusion_adapter.training.miniature.{module}")
    from_toml(module.Config, cli.CONFIGS / f"{file}.toml")


def test_the_command_says_in_one_sentence_what_is_wrong(tmp_path, capsys):
    pytest.importorskip("tyro", reason="tyro is not installed: pip install -e '.[training]'")
    (tmp_path / "vae.toml").write_text('expert = "x"\n[run]\nout = "y"\nmax_steps = 1\n', encoding="utf-8")
    assert cli.main(["miniature", "vae", "--config", str(tmp_path / "vae.toml")]) == 1
    error = capsys.readouterr().err
    assert "unknown key 'expert'; did you mean 'export'?" in error and error.count("\n") == 1
    assert cli.main(["miniature", "vea"]) == 2 and "stages" in capsys.readouterr().out
