"""The methods section and its bibliography."""

from __future__ import annotations

import importlib
import pkgutil
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import dsiprep.stages
from dsiprep.data.gradient_coil import GradientCoil, GradientNonlinearity, ScannerCorrections
from dsiprep.data.results import UnitResults
from dsiprep.report.boilerplate import (
    BIBLIOGRAPHY,
    bibliography,
    citation_keys,
    methods_html,
    methods_text,
    write_boilerplate,
)
from dsiprep.report.nonlinearity_facts import nonlinearity_facts


def test_citations_of_all_stages_are_in_the_bibliography() -> None:
    keys: set[str] = set()
    for module in pkgutil.iter_modules(dsiprep.stages.__path__):
        methods: dict[str, str] = getattr(importlib.import_module(f"dsiprep.stages.{module.name}"), "METHODS", {})
        for text in methods.values():
            cited = citation_keys(text)
            assert len(cited) == len(set(re.findall(r"@([A-Za-z][\w-]*)", text))), f"{module.name}: malformed citation"
            keys |= set(cited)
    assert keys
    assert keys <= set(bibliography()), f"missing: {sorted(keys - set(bibliography()))}"


def test_references_are_complete() -> None:
    assert len(bibliography()) == (BIBLIOGRAPHY.read_text().count("\n@") + 1)
    for reference in bibliography().values():
        assert reference.fields.get("title")
        assert re.fullmatch(r"\d{4}", reference.fields["year"])
        assert reference.text.count("{") == reference.text.count("}")
        if "doi" in reference.fields:
            assert re.fullmatch(r"10\.\d{4,5}/\S+", reference.fields["doi"]), reference.key
    assert bibliography()["cieslak2021"].short == "Cieslak et al. 2021"
    assert bibliography()["unser1999"].short == "Unser 1999"
    assert bibliography()["changfitzpatrick1992"].short == "Chang and Fitzpatrick 1992"


def test_methods_describe_only_applied_steps(subject: UnitResults) -> None:
    text = methods_text(subject)
    assert "[@veraart2016" in text
    assert "[@irfanoglu2015]" in text
    assert set(citation_keys(text)) <= set(bibliography())
    without_distortion_and_template = methods_text(
        replace(
            subject,
            distortion=None,
            distortion_reason="Distortion is not corrected: it was switched off.",
            anatomy=replace(subject.anatomy, acpc_to_template=None, template_to_acpc=None),
        )
    )
    assert "mean diffusion-weighted images" not in text
    assert subject.distortion is not None
    with_diffusion = replace(subject, distortion=replace(subject.distortion, diffusion=True))
    assert "mean diffusion-weighted images" in methods_text(with_diffusion)
    assert "irfanoglu2015" not in without_distortion_and_template
    assert "fonov2011" not in without_distortion_and_template
    warped = replace(subject.anatomy, template_origin="MNI152NLin2009aSym of nilearn, warped")
    assert "(source: MNI152NLin2009aSym of nilearn, warped)" in methods_text(replace(subject, anatomy=warped))
    assert "it was switched off" in without_distortion_and_template


def test_methods_name_the_third_party_programs_used(subject: UnitResults) -> None:
    assert not {"hoopes2022", "hoffmann2022", "esteban2019"} & set(citation_keys(methods_text(subject)))
    settings = replace(subject.settings.anatomy, engine="freesurfer", normalization="auto")
    labelled = replace(subject.anatomy, labels=subject.anatomy.mask)
    third_party = replace(
        subject, anatomy=labelled, settings=replace(subject.settings, anatomy=settings),
        distortion=replace(subject.distortion, method="tortoise"),
    )  # fmt: skip
    text = methods_text(third_party)
    assert (
        {"hoopes2022", "billot2023", "hoffmann2022", "irfanoglu2015"} <= set(citation_keys(text)) <= set(bibliography())
    )
    assert "in the T1w image by the deepbet" not in text
    assert "DRBUDDI [@irfanoglu2015] of TORTOISE" in text
    settings = replace(subject.settings.anatomy, normalization="ants")
    text = methods_text(replace(subject, settings=replace(subject.settings, anatomy=settings)))
    assert "esteban2019" in citation_keys(text)
    assert "deepbet" in text
    assert "greedy" not in text
    assert set(citation_keys(text)) <= set(bibliography())


def test_units_with_different_processing_have_separate_texts(subject: UnitResults) -> None:
    same_processing = replace(subject, unit=replace(subject.unit, name="sub-01_ses-2"))
    assert methods_text([subject, same_processing]).count("# Methods") == 1
    other = replace(same_processing, distortion=None, distortion_reason="No reversed images.")
    text = methods_text([subject, other])
    assert "## sub-01_acq-dsi" in text
    assert "## sub-01_ses-2" in text


def test_boilerplate_files_are_consistent(subject: UnitResults, tmp_path: Path) -> None:
    path = write_boilerplate([subject], tmp_path)
    assert path == tmp_path / "logs" / "CITATION.md"
    keys = set(citation_keys(methods_text(subject)))
    bib = (tmp_path / "logs" / "CITATION.bib").read_text(encoding="utf-8")
    tex = (tmp_path / "logs" / "CITATION.tex").read_text(encoding="utf-8")
    assert set(re.findall(r"@\w+\{([^,]+),", bib)) == keys
    assert {key for group in re.findall(r"\\citep\{([^}]+)\}", tex) for key in group.split(",")} == keys
    assert not re.search(r"(?<!\\)[%&#]|\[@", tex)
    assert tex.count("{") == tex.count("}")
    fragment = methods_html(subject)
    assert {f'id="ref-{key}"' for key in keys} <= set(re.findall(r'id="ref-[^"]+"', fragment))
    assert "[@" not in (tmp_path / "logs" / "CITATION.html").read_text(encoding="utf-8")


def test_ringing_and_complex_data_are_described(subject: UnitResults) -> None:
    assert "@kellner2016" in methods_text(subject)
    assert "complex" not in methods_text(subject)
    dwi = replace(subject.denoised.dwi, signed=True)
    unringed = replace(subject.unringed, methods=("rpg", "rpg"))
    text = methods_text(replace(subject, denoised=replace(subject.denoised, dwi=dwi), unringed=unringed))
    assert "@lee2021" in text
    assert text.count("homodyne") == 1
    assert "the real part was kept" in text


@pytest.mark.parametrize(
    ("done", "said"), [("none", "in three dimensions had been removed"), ("2d", "across the slices")]
)
def test_gradient_nonlinearity_is_described(subject: UnitResults, done: str, said: str) -> None:
    fields = GradientCoil(250.0, np.zeros((3, 4, 4)), np.zeros((3, 4, 4)))
    fields.cosine[2, 3, 0] = -0.1
    known = GradientNonlinearity(fields, ScannerCorrections(done))
    text = " ".join(methods_text(replace(subject, nonlinearity=known)).split())
    assert said in text
    assert "[@bammer2003]" in text
    assert "[@bammer2003]" not in methods_text(subject)
    scanner = replace(known, corrections=ScannerCorrections("3d"))
    assert "in three dimensions by the scanner" in methods_text(replace(subject, nonlinearity=scanner))


def test_report_gives_the_size_of_gradient_nonlinearity(subject: UnitResults) -> None:
    """An isotropic deviation of 2 % changes b by 1.02² - 1 everywhere."""
    fields = GradientCoil(250.0, np.zeros((3, 2, 2)), np.zeros((3, 2, 2)))
    fields.cosine[2, 1, 0] = 0.02  # encodes inferior positions 2 % too far out
    deviation = (0.02 * torch.eye(3)).reshape(9, 1, 1, 1).expand(9, *subject.preprocessed.dwi.grid.shape)
    known = GradientNonlinearity(fields, ScannerCorrections("2d"))
    assert nonlinearity_facts(subject) == ()
    preprocessed = replace(subject.preprocessed, deviation=deviation)
    displacement, b = nonlinearity_facts(replace(subject, nonlinearity=known, preprocessed=preprocessed))
    assert b.value == "+4.0 % to +4.0 % of the prescribed ones"
    inside = preprocessed.dwi.grid.to_world(np.argwhere(preprocessed.mask.numpy() > 0.5))
    to_scanner = subject.coregistration.dwiref_to_acpc.matrix
    height = np.abs(inside @ to_scanner[2, :3] + to_scanner[2, 3]).max()
    assert float(displacement.value.split()[2]) == pytest.approx(0.02 * height, abs=0.1)
