"""Report pages: contents, links, accessibility, and the files they refer to."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from dsiprep.data.acquisition import PhaseEncoding
from dsiprep.data.grid import Grid
from dsiprep.data.results import UnitResults, Unringed
from dsiprep.report import html, plots, sections
from dsiprep.report.html import render_report
from dsiprep.report.wording import duration, encoding
from helpers.grids import make_grid
from helpers.report_subject import make_subject


@pytest.fixture(scope="module")
def page(subject: UnitResults, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of one unit and one failure."""
    out = tmp_path_factory.mktemp("derivatives")
    failures = [("sub-01_ses-2_acq-dsi", "MetadataError: <no> readout & time")]
    return render_report([subject], out, "1.2.3", failures, "dsiprep /data /out participant")


class Reader(HTMLParser):
    """Collects the tags of a page with their attributes."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def attributes(self, tag: str, attribute: str) -> list[str]:
        """Values of an attribute in all tags of one kind."""
        return [str(values[attribute]) for name, values in self.tags if name == tag and attribute in values]


def test_phase_encoding_is_described_in_anatomical_directions() -> None:
    las = Grid((4, 4, 4), np.diag([-2.0, 2, 2, 1]))
    psr = make_grid("PSR", (4, 4, 4), (2.0, 2.0, 2.0))
    assert encoding(PhaseEncoding(1, -1, 0.05), las) == "j- (A to P), readout 50 ms"
    assert encoding(PhaseEncoding(0, 1, None), las) == "i (R to L), readout time unknown"
    first_axis = psr.directions[:, 0]  # in world axes
    assert ("P to A" if first_axis[1] > 0 else "A to P") in encoding(PhaseEncoding(0, 1, 0.1), psr)
    assert encoding(None, las) == "unknown"


def test_duration_formats() -> None:
    assert [duration(s) for s in (3.14, 41.2, 372, 7500)] == ["3.1 s", "41 s", "6 min 12 s", "2 h 5 min"]


def test_figures_exist_with_names_sizes_and_alternative_texts(page: Path, subject: UnitResults) -> None:
    reader = Reader(page)
    sources = reader.attributes("img", "src")
    assert len(sources) == len(set(sources)) >= 25
    for source in sources:
        path = page.parent / source
        assert path.is_file()
        assert re.fullmatch(rf"{subject.unit.name}_desc-[A-Za-z0-9]+_dwi\.(png|webp|svg)", path.name)
        assert path.stat().st_size < 400_000
    assert all(len(alt) > 20 for alt in reader.attributes("img", "alt"))
    assert len(reader.attributes("img", "alt")) == len(sources)
    others = ("quality_dwi.json", "thumbnail_dwi.webp", "viewer_dwi.html")
    written = [p.name for p in (page.parent / "sub-01" / "figures").iterdir()]
    assert sorted(written) == sorted(
        [Path(source).name for source in sources] + [f"{subject.unit.name}_desc-{other}" for other in others]
    )
    assert page.stat().st_size < 150_000


def test_page_requires_no_network_and_loads_no_script(page: Path) -> None:
    reader = Reader(page)
    assert not [tag for tag, _ in reader.tags if tag in ("link", "iframe", "object")]
    assert not reader.attributes("script", "src")
    assert not re.search(r"url\(|@import", page.read_text(encoding="utf-8"))
    external = [href for href in reader.attributes("a", "href") if href.startswith("http")]
    assert all(href.startswith(("https://doi.org/", "https://papers.neurips.cc/")) for href in external)


def test_internal_links_and_accessibility(page: Path) -> None:
    reader = Reader(page)
    ids = [str(found["id"]) for _, found in reader.tags if "id" in found]
    assert len(ids) == len(set(ids))
    internal = [href[1:] for href in reader.attributes("a", "href") if href.startswith("#")]
    assert set(internal) <= set(ids)
    assert set(reader.attributes("label", "for")) <= set(ids)
    assert all(found.get("scope") in ("col", "row") for tag, found in reader.tags if tag == "th")
    assert ("html", {"lang": "en"}) in reader.tags


def test_page_contains_all_sections_failures_and_command(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for title in (
        "Verdicts",
        "Summary",
        "Acquisition",
        "Denoising",
        "Head motion",
        "q-space",
        "Susceptibility distortion",
        "Anatomy",
        "Coregistration",
        "Preprocessed series",
        "Quality metrics",
        "Methods and references",
        "About this report",
    ):
        assert f">{title}</h3>" in text
    assert "could not be rendered" not in text
    assert "&lt;no&gt; readout &amp; time" in text
    assert "dsiprep /data /out participant" in text
    assert "did not converge within four iterations" in text
    assert "1.2.3" in text


def test_page_lists_images_that_are_not_used(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "Images of the subject that are not used" in text
    assert re.search(r"sub-01_T2w\.nii\.gz.*\n?.*--anat-modality T1w", text)


def test_page_contains_values_of_the_results(page: Path, subject: UnitResults) -> None:
    text = page.read_text(encoding="utf-8")
    assert f"{subject.quality.table['mean_fd']:.4g} mm" in text
    outliers = int((np.abs(subject.quality.slice_z) > 4).sum())
    assert f"{outliers} of {subject.quality.slice_z.size}" in text
    assert subject.acquired.scheme.description in text
    assert "j- (A to P), readout 50 ms" in text


def test_frames_of_a_figure_have_the_same_size(page: Path) -> None:
    folder = page.parent / "sub-01" / "figures"
    for before in folder.glob("*Before_dwi.png"):
        after = before.with_name(before.name.replace("Before", "After"))
        with Image.open(before) as first, Image.open(after) as second:
            assert first.size == second.size
        assert before.read_bytes() != after.read_bytes()


def test_plots_are_valid_deterministic_and_adapt_to_dark_scheme(page: Path, subject: UnitResults) -> None:
    for path in (page.parent / "sub-01" / "figures").glob("*.svg"):
        ElementTree.parse(path)
        assert "prefers-color-scheme: dark" in path.read_text(encoding="utf-8")
    first, second = (plots.sampling(subject.acquired.dwi, subject.acquired.scheme) for _ in range(2))
    assert first == second


def test_rerun_removes_stale_figures_of_the_same_unit(
    subject: UnitResults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(html, "SECTIONS", (sections.acquisition, sections.distortion))
    uncorrected = replace(subject, distortion=None, distortion_reason="There is only one phase encoding.")
    render_report([subject], tmp_path, "1")
    assert list((tmp_path / "sub-01" / "figures").glob("*_desc-sdc*"))
    other = tmp_path / "sub-01" / "figures" / "sub-01_ses-9_acq-dsi_desc-means_dwi.png"
    other.write_bytes(b"figure of another unit")
    page = render_report([uncorrected], tmp_path, "1")
    names = [path.name for path in other.parent.iterdir()]
    assert not [name for name in names if "_desc-sdc" in name]
    assert other.name in names
    assert "There is only one phase encoding." in page.read_text(encoding="utf-8")
    assert not [path for path in tmp_path.rglob(".*") if path.is_file()]


def test_report_without_structural_image_and_with_single_phase_encoding(tmp_path: Path) -> None:
    subject = make_subject(blips=1)
    no_anatomy = replace(
        subject.anatomy, modality="none", tissue=None, acpc_to_template=None, template_to_acpc=None,
        template_image=None, warped=None,
    )  # fmt: skip
    quality = replace(subject.quality, cnr=None, tsnr=None, confounds={})
    denoised = replace(subject.denoised, dwi=subject.acquired.dwi, noise=None, method="The data were not denoised.")
    not_needed = replace(subject.coregistration, metric="none", score_before=np.nan, score_after=np.nan)
    unringed = Unringed(subject.denoised.dwi, ("none",), "Gibbs ringing is not removed: disabled.")
    subject = replace(subject, anatomy=no_anatomy, coregistration=not_needed, quality=quality)
    subject = replace(subject, denoised=denoised, unringed=unringed)
    text = render_report([subject], tmp_path, "1").read_text(encoding="utf-8")
    assert "could not be rendered" not in text
    assert "was itself rotated to ACPC space" in text
    assert "The data were not denoised." in text
    assert "Gibbs ringing is not removed: disabled." in text
    assert "Signal removed by unringing" not in text
    between_series = replace(
        not_needed, metric="cc", score_before=0.41, score_after=0.93, target_unit="sub-01_acq-first"
    )
    text = render_report([replace(subject, coregistration=between_series)], tmp_path, "1").read_text(encoding="utf-8")
    assert "0.41 → 0.93" in text
    assert "sub-01_acq-first" in text
    assert "was itself rotated" not in text


def test_two_sessions_in_one_report(subject: UnitResults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html, "SECTIONS", (sections.summary, sections.coregistration))
    second = replace(subject, unit=replace(subject.unit, session="2", name="sub-01_ses-2_acq-dsi"))
    page = render_report([subject, second], tmp_path, "1")
    reader = Reader(page)
    ids = [str(found["id"]) for _, found in reader.tags if "id" in found]
    assert len(ids) == len(set(ids))
    assert {"sub-01_acq-dsi-summary", "sub-01_ses-2_acq-dsi-summary"} <= set(ids)


def test_report_of_failures_only(tmp_path: Path) -> None:
    page = render_report([], tmp_path, "1", [("sub-07_ses-1", "InputError: truncated")])
    assert page.name == "sub-07.html"
    assert "InputError: truncated" in page.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="one subject"):
        render_report([], tmp_path, "1")


def test_failing_section_does_not_affect_the_others(
    subject: UnitResults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(results: UnitResults, figures: object) -> object:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(html, "SECTIONS", (sections.summary, failing, sections.quality))
    text = render_report([subject], tmp_path, "1").read_text(encoding="utf-8")
    assert "ZeroDivisionError: division by zero" in text
    assert ">Quality metrics</h3>" in text
