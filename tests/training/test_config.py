from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path

import pytest

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


def test_a_word_that_is_no_choice_is_named_with_those_that_are():
    with pytest.raises(ValueError, match=r"c.toml \[run\]: 'on_nonfinite' cannot be 'ignore'; use one of 'stop', 'skip'"):
        build(Config, {"run": RUN | {"on_nonfinite": "ignore"}, "file": "x"}, "c.toml")


@pytest.mark.parametrize("key", ["max_steps", "batch", "validate_every", "keep"])
def test_a_number_of_steps_or_samples_is_at_least_one(key):
    with pytest.raises(ValueError, match=f"run.{key} is 0; it must be at least 1"):
        build(Config, {"run": RUN | {key: 0}, "file": "x"}, "c.toml")


def test_the_steps_of_a_plan_are_not_negative():
    with pytest.raises(ValueError, match="run.plan_steps is -1; it must be at least 1, or 0 for all of the run"):
        build(Config, {"run": RUN | {"plan_steps": -1}, "file": "x"}, "c.toml")


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
