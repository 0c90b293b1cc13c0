"""Share of a run that is done, time left, and what is printed and logged."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest
from rich.console import Console

from dsiprep.cli.progress import LiveProgress, as_time, memory_in_use, run_log
from dsiprep.cli.time_model import TimeModel
from dsiprep.data.acquisition import Unit
from dsiprep.jobs import Job, Outcome
from dsiprep.settings import Settings

EXPECTED = {"denoise": 20.0, "motion": 100.0, "anatomy": 60.0, "report": 10.0}


def run(model: TimeModel, pace: float, at: float) -> tuple[float, float]:
    """Time left as estimated `at` seconds into a run whose steps all take `pace` times as long, and as it is."""
    start = 0.0
    for step, seconds in EXPECTED.items():
        if start > at:
            break
        model.begin(step, start)
        start += pace * seconds
    return model.seconds_left(at), pace * sum(EXPECTED.values()) - at


@pytest.mark.parametrize("pace", [0.5, 1.0, 2.0, 5.0])
def test_time_left_is_within_30_percent_once_the_pace_is_known(pace: float) -> None:
    total = pace * sum(EXPECTED.values())
    for part in (0.65, 0.75, 0.85):
        left, true = run(TimeModel(EXPECTED), pace, part * total)
        assert left == pytest.approx(true, rel=0.3, abs=5)


def test_share_rises_from_0_to_1() -> None:
    model, shares = TimeModel(EXPECTED), []
    start = 0.0
    for step, seconds in EXPECTED.items():
        model.begin(step, start)
        shares += [model.share(start + part * seconds) for part in (0.1, 0.5, 0.9)]
        start += seconds
    model.end(start)
    assert shares == sorted(shares)
    assert shares[0] < 0.05
    assert model.share(start) == 1
    assert model.seconds_left(start) == 0


def test_a_step_that_takes_longer_than_expected_still_has_time_left() -> None:
    model = TimeModel(EXPECTED)
    model.begin("motion", 0.0)
    assert model.seconds_left(300.0) > sum((60.0, 10.0))


def test_steps_found_in_the_work_folder_count_as_done() -> None:
    model = TimeModel(EXPECTED)
    model.begin("report", 0.0)
    assert model.share(0.0) == pytest.approx(180 / 190, abs=0.01)
    assert model.seconds_left(0.0) == pytest.approx(10)


def test_the_report_follows_the_end_of_a_unit() -> None:
    model = TimeModel(EXPECTED)
    model.begin("anatomy", 0.0)
    model.end(60.0)
    model.begin("report", 60.0)
    assert model.seconds_left(62.0) == pytest.approx(8.0)
    assert 0.9 < model.share(62.0) < 1


@pytest.mark.parametrize(
    ("seconds", "text"), [(40.4, "40 s"), (89, "89 s"), (100, "2 min"), (3600, "60 min"), (7800, "2 h 10 min")]
)
def test_time_spans(seconds: float, text: str) -> None:
    assert as_time(seconds) == text


def test_memory_is_that_of_the_processes() -> None:
    assert 2**24 < memory_in_use() < 2**40


def test_without_a_terminal_every_stage_has_a_line_with_time_and_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stream = io.StringIO()
    units = tuple(Unit(name, None, f"sub-{name}", (), (), (), ()) for name in ("01", "02"))
    jobs = [Job(unit.subject, (unit,), Settings(), tmp_path, tmp_path) for unit in units]
    with caplog.at_level(logging.INFO, "dsiprep"), LiveProgress(Console(file=stream, width=400), jobs, 2) as progress:
        progress.on_step("sub-01", "denoise")
        progress.on_step("sub-02", "motion-up")
        progress.finish(Outcome("02", "sub-02", 7.0, "InputError: truncated"))
        progress.finish(Outcome("01", "sub-01", 65.0))
    lines = stream.getvalue().splitlines()
    assert [line.split(" ", 2)[-1].split(" (")[0] for line in lines[:2]] == ["sub-01: denoise", "sub-02: motion-up"]
    assert all("% done, about" in line and "GB in use" in line and "for all" in line for line in lines[:2])
    assert lines[2] == "FAILED sub-02: InputError: truncated"
    assert lines[3].endswith("sub-01: done in 65 s")
    assert "sub-02 failed after 7 s: InputError: truncated" in caplog.text


def test_a_terminal_gets_one_line_per_unit(tmp_path: Path) -> None:
    stream = io.StringIO()
    job = Job("01", (Unit("01", None, "sub-01", (), (), (), ()),), Settings(), tmp_path, tmp_path)
    console = Console(file=stream, width=120, force_terminal=True, color_system=None)
    with LiveProgress(console, [job]) as progress:
        progress.on_step("sub-01", "denoise")
        progress.finish(Outcome("01", "sub-01", 5.0))
    assert "100%" in stream.getvalue()
    assert "done" in stream.getvalue()


def test_a_run_leaves_a_log_and_its_settings(tmp_path: Path) -> None:
    logger = logging.getLogger("dsiprep")
    before = (logger.level, list(logger.handlers))
    with run_log(tmp_path, "[options]\n") as path:
        logger.info("stage begins")
        logger.debug("detail")
    assert (logger.level, list(logger.handlers)) == before
    assert "INFO stage begins" in path.read_text()
    assert "detail" not in path.read_text()
    assert (tmp_path / "logs" / "dsiprep.toml").read_text() == "[options]\n"
