"""The report's sections on the b-table and on samples in q-space."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dsiprep.data.qspace import GradientCheck
from dsiprep.data.results import UnitResults
from dsiprep.report.boilerplate import methods_text
from dsiprep.report.page_parts import FigureWriter
from dsiprep.report.qspace_quality_section import gradients, qspace_quality
from dsiprep.stages.lattice import evaluate_lattice
from dsiprep.stages.qspace_quality import measure_qspace
from helpers.report_subject import make_subject

LENGTHS = (("x y z", 21.0), ("-x y z", 38.0), ("x z y", 20.0))


@pytest.fixture(scope="module")
def subject() -> UnitResults:
    made = make_subject()
    dwi, acquired = made.preprocessed.dwi, made.acquired.dwi
    nominal = acquired.bvals, acquired.bvecs
    quality = measure_qspace(dwi, made.preprocessed.mask, nominal, made.denoised.noise)
    check = GradientCheck("wrong", "", "-x y z", np.diag([-1.0, 1, 1]), LENGTHS, 21 / 38, -8.0, 0.9, (3,))
    lattice = evaluate_lattice(made.preprocessed, made.acquired, "acquired")
    return replace(made, quality=replace(made.quality, qspace=quality), gradients=check, lattice=lattice)


def writer(folder: Path) -> FigureWriter:
    return FigureWriter(folder, "sub-01", "sub-01")


def test_a_wrong_table_is_loud(subject: UnitResults, tmp_path: Path) -> None:
    section = gradients(subject, writer(tmp_path))
    assert "WRONG" in section.notes[0]
    assert "-x y z" in section.notes[0]
    assert "volumes 3" in section.notes[1]
    assert b"Mean streamline length" in next(tmp_path.rglob("*frames*.svg")).read_bytes()


def test_the_section_says_why_nothing_was_compared(subject: UnitResults, tmp_path: Path) -> None:
    undecided = GradientCheck("undecided", "too little white matter in the image", "", np.eye(3), (), 1.0, 0.0, 1.0, ())
    section = gradients(replace(subject, gradients=undecided), writer(tmp_path))
    assert not section.pictures
    assert section.facts[0].meaning == "too little white matter in the image"
    assert "disabled" in gradients(replace(subject, gradients=None), writer(tmp_path)).lead


def test_samples_and_lattice(subject: UnitResults, tmp_path: Path) -> None:
    section = qspace_quality(subject, writer(tmp_path))
    facts = {fact.name: fact.value for fact in section.facts}
    assert facts["Lattice points lost"].endswith("of 32")
    assert facts["Series on a lattice"] == "33 volumes"
    assert "Antipodal samples" in facts
    assert b"noise floor" in next(tmp_path.rglob("*qspace*.svg")).read_bytes()


def test_methods_name_what_was_done(subject: UnitResults) -> None:
    text = methods_text(subject)
    assert "@jeurissen2014" in text
    assert "evaluated on a lattice" in text
    assert "were corrected before processing" not in text
    check = subject.gradients
    assert check is not None
    corrected = replace(subject, gradients=replace(check, corrected=True))
    assert "were corrected before processing" in methods_text(corrected)
