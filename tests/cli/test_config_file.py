"""Options of a run as TOML, and taken back."""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsiprep.cli.app import build_parser, main, read_settings
from dsiprep.cli.config_file import expand_config_file, run_as_toml
from dsiprep.cli.tools import build_parser as build_tools
from dsiprep.errors import SettingsError

GIVEN = ["/bids", "/out", "participant", "--output-resolution", "2", "--participant-label", "01", "02", "--hmc-model",
         "tensor", "--no-b0-harmonization", "--skip-anat-based-spatial-normalization", "--ignore", "fieldmaps",
         "-v"]  # fmt: skip


def test_a_run_is_repeated_from_its_file(tmp_path: Path) -> None:
    parser = build_parser()
    options = parser.parse_args(GIVEN)
    chosen = read_settings(options)
    file = tmp_path / "dsiprep.toml"
    file.write_text(run_as_toml(parser, options, chosen, 'dsiprep "quoted"'))
    content = tomllib.loads(file.read_text())
    assert content["command"] == 'dsiprep "quoted"'
    assert content["versions"]["numpy"]
    again = parser.parse_args(expand_config_file(["/bids", "/out", "participant", "--config-file", str(file)]))
    assert read_settings(again) == chosen
    assert again.participant_label == ["01", "02"]
    assert again.ignore == ["fieldmaps"]


def test_options_that_are_given_take_precedence(tmp_path: Path) -> None:
    file = tmp_path / "dsiprep.toml"
    file.write_text('[options]\noutput-resolution = 2.0\nhmc-model = "tensor"\n')
    words = expand_config_file(["/b", "/o", "participant", "--output-resolution", "1.5", "--config-file", str(file)])
    chosen = read_settings(build_parser().parse_args(words))
    assert (chosen.resample.resolution, chosen.motion.model) == (1.5, "tensor")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x = [", "not a TOML file"),
        ("[workflow]\nhmc_model = 1\n", "as QSIPrep's has"),
        ("[options]\nignore = { a = 1 }\n", "give text, a number or a list"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "config.toml"
    file.write_text(content)
    with pytest.raises(SettingsError, match=message):
        expand_config_file(["/b", "/o", "participant", "--config-file", str(file)])


def test_the_command_line_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["/b", "/o", "participant", "--config-file", "/nowhere.toml"]) == 2
    assert "/nowhere.toml: No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--output-resolutoin", "2"], "did you mean --output-resolution"),
        (["--output_resolution", "2"], "did you mean --output-resolution"),
        (["--hmc-modle", "x"], "--hmc-model"),
        (["--xyz"], "there is no option --xyz; see dsiprep --help"),
        (["--use-plugin", "x"], "there is no Nipype"),
        (["--write-graph"], "there is no workflow graph"),
    ],
)
def test_unknown_options_are_answered_with_what_was_meant(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["/b", "/o", "participant", *words])
    assert expected in capsys.readouterr().err


def test_help_begins_with_what_is_required() -> None:
    text = build_parser().format_help()
    assert "(default: )" not in text
    assert text.index("--output-resolution MM\n") < text.index("--participant-label")
    assert text.splitlines()[0].endswith("--output-resolution MM [options]")


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and those of its subcommands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for tool in action.choices.values():
                yield from parsers(tool)


def test_help_of_every_command_names_every_option() -> None:
    shown = [*parsers(build_parser()), *parsers(build_tools())]
    assert len(shown) > 10
    for parser in shown:
        text = parser.format_help()
        for action in parser._actions:
            if action.help != argparse.SUPPRESS:
                assert all(flag in text for flag in action.option_strings[:1]), parser.prog


def test_names_of_qsiprep_with_underscores_are_taken() -> None:
    options = build_parser().parse_args(["/b", "/o", "participant", "--n_cpus", "3", "--mem_mb", "4000", "--notrack"])
    assert (options.nprocs, options.mem) == (3, 4000)
