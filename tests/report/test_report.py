"""Reports: pictures against nibabel, dipy and known truth; pages against what must be in them."""

from __future__ import annotations

import importlib
import io
import pkgutil
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

import dsiprep.stages
from dsiprep.data.acquisition import PhaseEncoding
from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.results import Motion, UnitResults
from dsiprep.report import html, plots, sections
from dsiprep.report import slice_figures as figures
from dsiprep.report.boilerplate import bibliography, cited, methods_html, methods_text, write_boilerplate
from dsiprep.report.html import render_report
from dsiprep.report.slice_layout import Layout, View, display_axes, sample_at
from dsiprep.report.wording import duration, encoding
from helpers.grids import AXES, make_grid
from helpers.report_subject import WHITE, ellipsoids, fibre, make_subject, rigid, voxels


@pytest.fixture(scope="module")
def subject() -> UnitResults:
    return make_subject()


@pytest.fixture(scope="module")
def page(subject: UnitResults, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("derivatives")
    failures = [("sub-01_ses-2_acq-dsi", "MetadataError: <no> readout & time")]
    return render_report([subject], out, "1.2.3", failures, "dsiprep /data /out participant")


class Reader(HTMLParser):
    """Collects tags with their attributes."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def every(self, tag: str, attribute: str) -> list[str]:
        return [str(found[attribute]) for name, found in self.tags if name == tag and attribute in found]


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)


# --- orientation ---


@pytest.mark.parametrize("orientation", ["RAS", "LAS", "LPS", "PSR"])
def test_slices_are_those_of_nibabels_canonical_image(orientation: str) -> None:
    grid = make_grid(orientation, (9, 11, 8), (2.0, 2.0, 2.0))
    data = np.random.default_rng(0).normal(size=grid.shape).astype(np.float32)
    canonical = nib.as_closest_canonical(nib.Nifti1Image(data, grid.affine)).get_fdata()
    view = View.of(Volume(torch.ones(grid.shape), grid), 3)
    volume = Volume(torch.as_tensor(data), grid)
    low = grid.to_world(np.array([[0, 0, 0], np.asarray(grid.shape) - 1])).min(0)
    for plane, axis in (("axial", 2), ("coronal", 1), ("sagittal", 0)):
        position = float(view.positions[axis][1])
        expected = np.take(canonical, round((position - low[axis]) / 2), axis).T[::-1]
        shown = sample_at(volume, view.points(plane, position))
        np.testing.assert_allclose(shown, expected, atol=1e-5)


def test_a_mark_on_the_right_is_shown_on_the_right(orientation: str) -> None:
    grid = make_grid(orientation, (40, 44, 38), (3.0, 3.0, 3.0))
    mark = grid.centre + np.array([25.0, 30.0, 20.0])
    data = np.exp(-np.square(voxels(grid) - mark).sum(-1) / 50)
    layout = Layout.rows(View.of(Volume(torch.ones(grid.shape), grid), 9))
    canvas = layout.paint(Volume(torch.as_tensor(data.astype(np.float32)), grid))
    for group in layout.groups:
        parts = [canvas[t.y : t.y + t.height, t.x : t.x + t.width] for t in group.tiles]
        best = parts[int(np.argmax([part.max() for part in parts]))]
        row, column = np.unravel_index(int(best.argmax()), best.shape)
        assert column > best.shape[1] * 0.55, group.plane  # right, or front in a sagittal slice
        assert row < best.shape[0] * 0.45, group.plane  # front, or top
        assert int(np.argmax([part.max() for part in parts])) > 4, group.plane


def test_display_axes_are_orthonormal_and_near_the_world(orientation: str) -> None:
    axes = display_axes(make_grid(orientation, (5, 6, 7), (1.0, 2.0, 3.0)))
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-12)
    assert (np.diag(axes) > 0.8).all()


def test_pixels_are_isotropic_on_an_anisotropic_grid() -> None:
    grid = make_grid("LAS", (30, 30, 10), (2.0, 2.0, 6.0))
    layout = Layout.rows(View.of(Volume(torch.ones(grid.shape), grid), 2), ("coronal",))
    tile = layout.tiles[0]
    assert (tile.width, tile.height) == (
        30,
        28,
    )  # 58 mm and 54 mm between outer voxel centres, in steps of 2 mm


def test_phase_encoding_is_told_in_anatomical_words() -> None:
    las = Grid((4, 4, 4), np.diag([-2.0, 2, 2, 1]))
    psr = make_grid("PSR", (4, 4, 4), (2.0, 2.0, 2.0))
    assert encoding(PhaseEncoding(1, -1, 0.05), las) == "j- (A to P), readout 50 ms"
    assert encoding(PhaseEncoding(0, 1, None), las) == "i (R to L), readout time unknown"
    along = psr.directions[:, 0]  # i of this grid, in world axes
    assert ("P to A" if along[1] > 0 else "A to P") in encoding(PhaseEncoding(0, 1, 0.1), psr)
    assert encoding(None, las) == "unknown"


# --- values ---


def test_colours_follow_fibres_in_the_world(subject: UnitResults) -> None:
    content = figures.colour_fa(subject.preprocessed)
    assert content is not None
    layout = Layout.rows(View.of(subject.preprocessed.mask))
    found = figures._directions(subject.preprocessed, layout)
    assert found is not None
    fa, direction = found
    points, places = layout.points()
    white = (ellipsoids(points) == WHITE) & (layout.paint(subject.preprocessed.mask).ravel()[places] > 0.99)
    seen = direction.reshape(-1, 3)[places][white]
    assert np.abs((seen * fibre(points)[white]).sum(-1)).mean() > 0.97  # up to the sign that no tensor has
    rgb = figures._rgb(fa, direction).reshape(-1, 3)[places]
    middle = white & (np.abs(points[:, 0]) < 8)
    side = white & (np.abs(points[:, 0]) > 44)
    assert (rgb[middle].argmax(1) == 0).mean() > 0.97  # red: left-right, as the subject was made
    assert (rgb[side].argmax(1) == 2).mean() > 0.97  # blue: up-down


def test_sticks_lie_along_the_fibres(subject: UnitResults, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = {}
    monkeypatch.setattr(figures, "picture", lambda layout, rgb, **more: drawn.update(more, layout=layout) or b"")
    figures.fibre_sticks(subject.preprocessed)
    segments, layout = drawn["sticks"][0], drawn["layout"]
    tile = next(t for t in layout.tiles if t.plane == "coronal")
    centre = segments.mean(1)
    right = (centre[:, 0] > tile.x + 0.62 * tile.width) & (centre[:, 0] < tile.x + 0.75 * tile.width)
    run, fall = (segments[right, 1] - segments[right, 0]).T
    assert right.sum() > 10
    assert np.mean(run * fall) < 0  # rising to the right in the picture, where rows count downwards


def test_outlines_of_the_structural_image_reach_the_scanner_frame(subject: UnitResults) -> None:
    mask = subject.motions[0].mask
    layout = Layout.rows(View.of(mask))
    via = np.linalg.inv(subject.coregistration.dwiref_to_acpc.matrix)
    brought = figures.tissue_contour(layout, subject.anatomy, via)[0].canvas > 0.5
    own = layout.paint(mask) > 0.5
    assert 2 * (brought & own).sum() / (brought.sum() + own.sum()) > 0.93


def test_realignment_undoes_known_motion() -> None:
    grid = make_grid("oblique", (26, 28, 24), (4.0, 4.0, 4.0))
    points = voxels(grid)
    # 7 mm to the left and 7 mm to the right: the blurred mean is far from the truth.
    transforms = np.stack([rigid(np.zeros(3), np.array([dx, 0.0, 0.0])) for dx in (-7.0, 7.0)])

    def head(at: np.ndarray) -> np.ndarray:
        return np.exp(-np.square((at - grid.centre) / [16, 20, 18]).sum(-1))

    data = np.stack([head(points - t[:3, 3]) for t in transforms]).astype(np.float32)
    reference = Volume(torch.as_tensor(head(points).astype(np.float32)), grid)
    mask = Volume((reference.data > 0.2).float(), grid)
    index = np.arange(2)
    dwi = DWI(torch.as_tensor(data), grid, np.array([900.0, 900]), np.eye(3)[:2], index * 0, index * 0)
    none = np.zeros((2, 24), np.float32)
    motion = Motion(transforms, index, reference, mask, index * 1.0, index * 1.0, none, 2, [], "3dSHORE")
    frames = dict(figures.realignment(dwi, motion))
    layout = Layout.trio(View.of(mask))
    truth = figures.colour(layout.paint(reference), (0, float(layout.paint(reference).max())))
    expected = pixels(figures.picture(layout, truth))
    errors = {name: np.abs(pixels(content) - expected).mean() for name, content in frames.items()}
    assert errors["after"] < 0.35 * errors["before"]


def test_bands_hold_every_volume_once(subject: UnitResults) -> None:
    dwi = subject.acquired.dwi
    bands = figures.b_bands(dwi.bvals, dwi.is_b0)
    assert np.sum([chosen for _, chosen in bands], axis=0).tolist() == [1] * len(dwi)
    shell = np.array([0.0, *[1000.0] * 6])
    assert [name for name, _ in figures.b_bands(shell, shell == 0)] == ["b = 0", "b 1000, 6 vol."]


def test_steps_between_rounds_are_those_of_the_trace(subject: UnitResults) -> None:
    groups = plots.rounds(subject.motions[0].trace)
    assert [number for number, _ in groups] == [1, 2, 3, 4]
    assert groups[0][1].shape == (len(subject.motions[0].volumes), 6)


def test_durations_are_told_as_people_say_them() -> None:
    assert [duration(s) for s in (3.14, 41.2, 372, 7500)] == ["3.1 s", "41 s", "6 min 12 s", "2 h 5 min"]


# --- pages ---


def test_every_picture_is_there_named_light_and_described(page: Path, subject: UnitResults) -> None:
    reader = Reader(page)
    sources = reader.every("img", "src")
    assert len(sources) == len(set(sources)) >= 25
    for source in sources:
        path = page.parent / source
        assert path.is_file()
        assert re.fullmatch(rf"{subject.unit.name}_desc-[A-Za-z0-9]+_dwi\.(png|svg)", path.name)
        assert path.stat().st_size < 400_000
    assert all(len(alt) > 20 for alt in reader.every("img", "alt"))
    assert len(reader.every("img", "alt")) == len(sources)
    assert sorted(p.name for p in (page.parent / "sub-01" / "figures").iterdir()) == sorted(
        Path(source).name for source in sources
    )
    assert page.stat().st_size < 150_000


def test_page_needs_no_network_and_no_script(page: Path) -> None:
    reader = Reader(page)
    assert not [tag for tag, _ in reader.tags if tag in ("script", "link", "iframe", "object")]
    assert not re.search(r"url\(|@import", page.read_text(encoding="utf-8"))
    outside = [href for href in reader.every("a", "href") if href.startswith("http")]
    assert all(href.startswith(("https://doi.org/", "https://papers.neurips.cc/")) for href in outside)


def test_page_is_well_linked_and_accessible(page: Path) -> None:
    reader = Reader(page)
    ids = [str(found["id"]) for _, found in reader.tags if "id" in found]
    assert len(ids) == len(set(ids))
    inside = [href[1:] for href in reader.every("a", "href") if href.startswith("#")]
    assert set(inside) <= set(ids)
    assert set(reader.every("label", "for")) <= set(ids)
    assert all(found.get("scope") in ("col", "row") for tag, found in reader.tags if tag == "th")
    assert ("html", {"lang": "en"}) in reader.tags


def test_page_tells_all_sections_failures_and_command(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for title in (
        "Summary",
        "Acquisition",
        "Denoising",
        "Head motion",
        "Susceptibility distortion",
        "Anatomy",
        "Coregistration",
        "Output",
        "Quality table",
        "Methods and references",
        "This report",
    ):
        assert f">{title}</h3>" in text
    assert "could not be drawn" not in text
    assert "&lt;no&gt; readout &amp; time" in text
    assert "dsiprep /data /out participant" in text
    assert "did not settle in four rounds" in text
    assert "1.2.3" in text


def test_numbers_of_the_results_reach_the_page(page: Path, subject: UnitResults) -> None:
    text = page.read_text(encoding="utf-8")
    assert f"{subject.quality.table['mean_fd']:.4g} mm" in text
    flagged = int((np.abs(subject.quality.slice_z) > 4).sum())
    assert f"{flagged} of {subject.quality.slice_z.size}" in text
    assert subject.acquired.scheme.description in text
    assert "j- (A to P), readout 50 ms" in text


def test_frames_of_one_picture_have_one_size(page: Path) -> None:
    folder = page.parent / "sub-01" / "figures"
    for before in folder.glob("*Before_dwi.png"):
        after = before.with_name(before.name.replace("Before", "After"))
        assert Image.open(before).size == Image.open(after).size
        assert before.read_bytes() != after.read_bytes()


def test_plots_are_whole_deterministic_and_turn_dark(page: Path, subject: UnitResults) -> None:
    for path in (page.parent / "sub-01" / "figures").glob("*.svg"):
        ElementTree.parse(path)
        assert "prefers-color-scheme: dark" in path.read_text(encoding="utf-8")
    drawn = [plots.sampling(subject.acquired.dwi, subject.acquired.scheme) for _ in range(2)]
    assert drawn[0] == drawn[1]


def test_numbers_on_axes_are_not_rounded(subject: UnitResults) -> None:
    still = [row | {"shiftX": 0.0, "shiftY": 0.0, "shiftZ": 0.0} for row in subject.motions[0].trace]
    motion = replace(subject.motions[0], trace=still)
    bvals = subject.acquired.dwi.bvals[motion.volumes]
    assert b">0.0001<" in plots.convergence(motion, bvals, bvals == 0)


def test_maps_of_direction_keep_their_hue(subject: UnitResults) -> None:
    content = figures.colour_fa(subject.preprocessed)
    assert content is not None
    shown = pixels(content).reshape(-1, 3)
    bright = shown[shown.max(1) > 180]
    pure = bright[(bright[:, 0] > 180) & (np.delete(bright, 0, 1).max(1) < 60)]
    assert len(pure) > 200  # the middle of the subject's callosum is red and nothing else


def test_drawing_again_removes_what_is_no_longer_drawn(
    subject: UnitResults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(html, "SECTIONS", (sections.acquisition, sections.distortion))
    small = replace(subject, distortion=None, distortion_reason="there is only one phase encoding")
    render_report([subject], tmp_path, "1")
    assert list((tmp_path / "sub-01" / "figures").glob("*_desc-sdc*"))
    other = tmp_path / "sub-01" / "figures" / "sub-01_ses-9_acq-dsi_desc-means_dwi.png"
    other.write_bytes(b"of another unit")
    page = render_report([small], tmp_path, "1")
    names = [path.name for path in other.parent.iterdir()]
    assert not [name for name in names if "_desc-sdc" in name]
    assert other.name in names
    assert "there is only one phase encoding" in page.read_text(encoding="utf-8")
    assert not [path for path in tmp_path.rglob(".*") if path.is_file()]


def test_without_structural_image_or_second_blip(tmp_path: Path) -> None:
    subject = make_subject(blips=1)
    bare = replace(
        subject.anatomy, modality="none", tissue=None, acpc_to_template=None, template_to_acpc=None,
        template_image=None, warped=None,
    )  # fmt: skip
    quality = replace(subject.quality, cnr=None, tsnr=None, confounds={})
    denoised = replace(subject.denoised, dwi=subject.acquired.dwi, noise=None, method="The data were not denoised.")
    itself = replace(subject.coregistration, metric="none", score_before=np.nan, score_after=np.nan)
    subject = replace(subject, anatomy=bare, coregistration=itself, quality=quality, denoised=denoised)
    text = render_report([subject], tmp_path, "1").read_text(encoding="utf-8")
    assert "could not be drawn" not in text
    assert "was itself turned to ACPC space" in text
    assert "The data were not denoised." in text
    led = replace(itself, metric="cc", score_before=0.41, score_after=0.93, led_by="sub-01_acq-first")
    text = render_report([replace(subject, coregistration=led)], tmp_path, "1").read_text(encoding="utf-8")
    assert "0.41 → 0.93" in text and "sub-01_acq-first" in text and "was itself turned" not in text


def test_two_sessions_on_one_page(subject: UnitResults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html, "SECTIONS", (sections.summary, sections.coregistration))
    second = replace(subject, unit=replace(subject.unit, session="2", name="sub-01_ses-2_acq-dsi"))
    page = render_report([subject, second], tmp_path, "1")
    reader = Reader(page)
    ids = [str(found["id"]) for _, found in reader.tags if "id" in found]
    assert len(ids) == len(set(ids))
    assert {"sub-01_acq-dsi-summary", "sub-01_ses-2_acq-dsi-summary"} <= set(ids)


def test_a_page_of_failures_only(tmp_path: Path) -> None:
    page = render_report([], tmp_path, "1", [("sub-07_ses-1", "InputError: truncated")])
    assert page.name == "sub-07.html"
    assert "InputError: truncated" in page.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="one subject"):
        render_report([], tmp_path, "1")


def test_one_broken_section_costs_only_itself(
    subject: UnitResults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(results: UnitResults, album: object) -> object:
        raise ZeroDivisionError("nothing to divide")

    monkeypatch.setattr(html, "SECTIONS", (sections.summary, broken, sections.quality))
    text = render_report([subject], tmp_path, "1").read_text(encoding="utf-8")
    assert "ZeroDivisionError: nothing to divide" in text
    assert ">Quality table</h3>" in text


@pytest.mark.parametrize("name", sorted(AXES))
def test_empty_masks_and_constant_images_are_drawn(name: str) -> None:
    grid = make_grid(name, (8, 9, 7), (3.0, 3.0, 3.0))
    empty = Volume(torch.zeros(grid.shape), grid)
    none = np.zeros((0, 4, 4))
    index = np.zeros(0, int)
    motion = Motion(none, index, empty, empty, index * 1.0, index * 1.0, np.zeros((0, 7)), 2, [], "none")
    assert pixels(figures.reference(motion)).max() > 0  # the letters


# --- methods ---


def test_every_citation_of_every_stage_is_in_the_bibliography() -> None:
    keys: set[str] = set()
    for module in pkgutil.iter_modules(dsiprep.stages.__path__):
        methods = importlib.import_module(f"dsiprep.stages.{module.name}").METHODS
        for text in methods.values():
            found = cited(text)
            assert len(found) == len(set(re.findall(r"@([A-Za-z][\w-]*)", text))), f"{module.name}: malformed citation"
            keys |= set(found)
    assert keys
    assert keys <= set(bibliography()), f"missing: {sorted(keys - set(bibliography()))}"


def test_references_are_whole() -> None:
    assert len(bibliography()) == (Path(html.__file__).with_name("references.bib").read_text().count("\n@") + 1)
    for reference in bibliography().values():
        assert reference.fields.get("title")
        assert re.fullmatch(r"\d{4}", reference.fields["year"])
        assert reference.text.count("{") == reference.text.count("}")
        if "doi" in reference.fields:
            assert re.fullmatch(r"10\.\d{4,5}/\S+", reference.fields["doi"]), reference.key
    assert bibliography()["cieslak2021"].short == "Cieslak et al. 2021"
    assert bibliography()["unser1999"].short == "Unser 1999"
    assert bibliography()["changfitzpatrick1992"].short == "Chang and Fitzpatrick 1992"


def test_methods_tell_what_was_done_and_not_what_was_not(subject: UnitResults) -> None:
    text = methods_text(subject)
    assert "[@veraart2016" in text
    assert "[@irfanoglu2015]" in text
    assert set(cited(text)) <= set(bibliography())
    plain = methods_text(
        replace(
            subject,
            distortion=None,
            distortion_reason="Distortion is not corrected: it was switched off.",
            anatomy=replace(subject.anatomy, acpc_to_template=None, template_to_acpc=None),
        )
    )
    assert "mean diffusion-weighted images" not in text
    assert subject.distortion is not None
    helped = replace(subject, distortion=replace(subject.distortion, diffusion=True))
    assert "mean diffusion-weighted images" in methods_text(helped)
    assert "irfanoglu2015" not in plain
    assert "fonov2011" not in plain
    assert "it was switched off" in plain


def test_methods_name_the_programs_that_were_used(subject: UnitResults) -> None:
    assert not {"hoopes2022", "hoffmann2022", "esteban2019"} & set(cited(methods_text(subject)))
    chosen = replace(subject.settings.anatomy, engine="freesurfer", normalization="auto")
    labelled = replace(subject.anatomy, labels=subject.anatomy.mask)
    by_freesurfer = replace(
        subject, anatomy=labelled, settings=replace(subject.settings, anatomy=chosen),
        distortion=replace(subject.distortion, method="tortoise"),
    )  # fmt: skip
    text = methods_text(by_freesurfer)
    assert {"hoopes2022", "billot2023", "hoffmann2022", "irfanoglu2015"} <= set(cited(text)) <= set(bibliography())
    assert "in the T1w image by the deepbet" not in text and "DRBUDDI [@irfanoglu2015] of TORTOISE" in text
    chosen = replace(subject.settings.anatomy, normalization="ants")
    text = methods_text(replace(subject, settings=replace(subject.settings, anatomy=chosen)))
    assert "esteban2019" in cited(text) and "deepbet" in text and "greedy" not in text
    assert set(cited(text)) <= set(bibliography())


def test_units_processed_differently_have_their_own_text(subject: UnitResults) -> None:
    twin = replace(subject, unit=replace(subject.unit, name="sub-01_ses-2"))
    assert methods_text([subject, twin]).count("# Methods") == 1
    other = replace(twin, distortion=None, distortion_reason="No reversed images.")
    text = methods_text([subject, other])
    assert "## sub-01_acq-dsi" in text
    assert "## sub-01_ses-2" in text


def test_boilerplate_files_agree(subject: UnitResults, tmp_path: Path) -> None:
    path = write_boilerplate([subject], tmp_path)
    assert path == tmp_path / "logs" / "CITATION.md"
    keys = set(cited(methods_text(subject)))
    bib = (tmp_path / "logs" / "CITATION.bib").read_text(encoding="utf-8")
    tex = (tmp_path / "logs" / "CITATION.tex").read_text(encoding="utf-8")
    assert set(re.findall(r"@\w+\{([^,]+),", bib)) == keys
    assert {key for group in re.findall(r"\\citep\{([^}]+)\}", tex) for key in group.split(",")} == keys
    assert not re.search(r"(?<!\\)[%&#]|\[@", tex)
    assert tex.count("{") == tex.count("}")
    fragment = methods_html(subject)
    assert {f'id="ref-{key}"' for key in keys} <= set(re.findall(r'id="ref-[^"]+"', fragment))
    assert "[@" not in (tmp_path / "logs" / "CITATION.html").read_text(encoding="utf-8")
