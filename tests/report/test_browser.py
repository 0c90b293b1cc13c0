"""The pages in a real browser: everything loads, scripts work, and axe-core finds no violation."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dsiprep.data.results import UnitResults
from dsiprep.report.group_page import write_group
from dsiprep.report.html import render_report
from dsiprep.settings import ReportSettings, Settings
from helpers.cohorts import make_cohort

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install dsiprep[browser]")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the PATH")
WEBGL = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"]
NUMBER = 1000  # series of the cohort


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=CHROMIUM, args=WEBGL)
        yield running
        running.close()


class Tab:
    """A page, and the errors that its scripts and its console reported."""

    def __init__(self, browser: object, path: Path, **context: object) -> None:
        self.page = browser.new_context(viewport={"width": 1300, "height": 1000}, **context).new_page()
        self.errors: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        self.page.goto(path.as_uri())

    def violations(self) -> list[str]:
        """Rules of axe-core (WCAG 2.2 A and AA, and best practices) that the page violates, with the first node."""
        axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")
        found = axe.Axe().run(self.page).response["violations"]
        return [f"{rule['id']}: {rule['nodes'][0]['html'][:200]}" for rule in found]


@pytest.fixture(scope="module")
def folder(subject: UnitResults, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with a page of its own and as one file."""
    out = tmp_path_factory.mktemp("derivatives")
    settings = Settings(report=ReportSettings(single_file=True))
    failures = [("sub-01_ses-2_acq-dsi", "MetadataError: no readout time")]
    render_report([replace(subject, settings=settings)], out, "1.2.3", failures, "dsiprep /data /out participant")
    return out


@pytest.fixture(scope="module")
def cohort(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cohort")
    make_cohort(out, folder / "sub-01" / "figures" / "sub-01_acq-dsi_desc-quality_dwi.json", NUMBER)
    return write_group(out, "1.2.3")


def broken_images(tab: Tab) -> list[str]:
    tab.page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    tab.page.evaluate("Promise.all([...document.images].map((i) => { i.loading = 'eager'; return i.decode(); }))")
    return tab.page.evaluate("[...document.images].filter((i) => !i.naturalWidth).map((i) => i.src)")


@pytest.mark.parametrize("name", ["sub-01.html", "sub-01_report.html"])
def test_every_picture_loads_and_nothing_fails(browser: object, folder: Path, name: str) -> None:
    tab = Tab(browser, folder / name)
    assert broken_images(tab) == []
    assert tab.errors == []


def test_one_file_is_complete_when_it_is_alone(browser: object, folder: Path, tmp_path: Path) -> None:
    alone = shutil.copy(folder / "sub-01_report.html", tmp_path)
    assert Path(alone).stat().st_size < 10_000_000
    tab = Tab(browser, Path(alone))
    assert broken_images(tab) == []
    tab.page.click("[data-viewer]")
    frame = tab.page.wait_for_selector("iframe").content_frame()
    frame.wait_for_selector("body[data-ready=true]", timeout=60_000)
    assert tab.errors == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["sub-01.html", "sub-01/figures/sub-01_acq-dsi_desc-viewer_dwi.html"])
def test_axe_finds_no_violation_in_a_report(browser: object, folder: Path, name: str, scheme: str) -> None:
    tab = Tab(browser, folder / name, color_scheme=scheme)
    if "viewer" in name:
        tab.page.wait_for_selector("body[data-ready=true]", timeout=60_000)
    tab.page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert tab.violations() == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_violation_in_a_cohort(browser: object, folder: Path, tmp_path: Path, scheme: str) -> None:
    make_cohort(tmp_path, folder / "sub-01" / "figures" / "sub-01_acq-dsi_desc-quality_dwi.json", 30)
    tab = Tab(browser, write_group(tmp_path, "1"), color_scheme=scheme)
    tab.page.click("#series tbody tr:first-child td:nth-child(3)")
    assert tab.violations() == []


def test_buttons_show_one_frame_or_flicker(browser: object, folder: Path) -> None:
    tab = Tab(browser, folder / "sub-01.html")
    figure = tab.page.locator("figure.multiple").first
    upper = figure.locator(".frames a").nth(1)
    assert upper.evaluate("(node) => getComputedStyle(node).visibility") == "visible"
    figure.locator("label").nth(0).click()
    assert upper.evaluate("(node) => getComputedStyle(node).visibility") == "hidden"
    figure.locator("label").last.click()
    assert "flicker" in upper.evaluate("(node) => getComputedStyle(node).animationName")


def test_each_verdict_leads_to_its_picture(browser: object, folder: Path) -> None:
    tab = Tab(browser, folder / "sub-01.html")
    targets = tab.page.evaluate("[...document.querySelectorAll('.verdicts a')].map((a) => a.getAttribute('href'))")
    assert len(targets) == 15
    assert tab.page.evaluate("(ids) => ids.filter((id) => !document.querySelector(id))", targets) == []
    assert sum("-figure-" in target for target in targets) >= 13


def test_q_space_turns_by_mouse_and_keys(browser: object, folder: Path) -> None:
    tab = Tab(browser, folder / "sub-01.html")
    canvas = tab.page.locator(".qspace canvas")
    canvas.scroll_into_view_if_needed()
    pictures = [canvas.screenshot()]
    box = canvas.bounding_box()
    tab.page.mouse.move(box["x"] + 200, box["y"] + 200)
    tab.page.mouse.down()
    tab.page.mouse.move(box["x"] + 300, box["y"] + 230, steps=4)
    tab.page.mouse.up()
    pictures.append(canvas.screenshot())
    canvas.press("ArrowLeft")
    pictures.append(canvas.screenshot())
    tab.page.click("text=Colour by error")
    pictures.append(canvas.screenshot())
    assert len(set(pictures)) == 4
    assert tab.errors == []


def test_the_page_is_complete_without_script(browser: object, folder: Path, cohort: Path) -> None:
    report = Tab(browser, folder / "sub-01.html", java_script_enabled=False)
    assert report.page.locator(".qspace").is_hidden()
    assert report.page.locator("figure").count() > 20
    assert report.page.locator("#sub-01_acq-dsi-figure-qspace img").is_visible()
    table = Tab(browser, cohort, java_script_enabled=False)
    assert table.page.locator("#series tbody tr").count() == NUMBER
    assert table.page.locator("#tools").is_hidden()


def test_print_shows_all_frames_and_no_buttons(browser: object, folder: Path) -> None:
    tab = Tab(browser, folder / "sub-01.html")
    tab.page.emulate_media(media="print")
    assert tab.page.locator("nav").is_hidden()
    assert tab.page.locator(".multiple label").first.is_hidden()
    heights = tab.page.evaluate(
        "[...document.querySelector('figure.multiple .frames').querySelectorAll('img')]"
        ".map((i) => [i.getBoundingClientRect().top, i.getBoundingClientRect().height])"
    )
    assert heights[1][0] >= heights[0][0] + heights[0][1] - 1


def test_the_viewer_draws_each_image_and_overlay(browser: object, folder: Path, tmp_path: Path) -> None:
    tab = Tab(browser, folder / "sub-01" / "figures" / "sub-01_acq-dsi_desc-viewer_dwi.html")
    tab.page.wait_for_selector("body[data-ready=true]", timeout=60_000)
    shots = {}
    for name, action in (
        ("T1w", lambda: None),
        ("mask", lambda: tab.page.check("#overlays input >> nth=0")),
        ("DWI", lambda: tab.page.select_option("#base", label="DWI")),
        ("last volume", lambda: tab.page.fill("#frame", tab.page.get_attribute("#frame", "max"))),
    ):
        action()
        tab.page.wait_for_timeout(1500)
        file = tmp_path / f"{name}.png"
        tab.page.locator("canvas").screenshot(path=file)
        with Image.open(file) as picture:
            shots[name] = np.asarray(picture.convert("RGB"), float)
    assert shots["T1w"].std() > 20
    for before, after in (("T1w", "mask"), ("mask", "DWI"), ("DWI", "last volume")):
        assert np.abs(shots[before] - shots[after]).mean() > 1
    assert tab.errors == []


def test_a_cohort_of_1000_is_sorted_within_a_second(browser: object, cohort: Path) -> None:
    tab = Tab(browser, cohort)
    for column in (0, 2, 5):
        took = tab.page.evaluate(
            "(column) => { const start = performance.now();"
            " document.querySelectorAll('#series thead button')[column].click();"
            " document.body.getBoundingClientRect(); return performance.now() - start; }",
            column,
        )
        assert took < 1000
    values = tab.page.evaluate("[...document.querySelectorAll('#series tbody tr')].map((r) => +r.cells[5].textContent)")
    assert values == sorted(values, reverse=True)
    assert len(values) == NUMBER
    assert tab.errors == []


def test_a_cohort_is_filtered_and_paged_with_the_keyboard(browser: object, cohort: Path) -> None:
    tab = Tab(browser, cohort)
    tab.page.fill("#filter", "sub-001")
    assert tab.page.inner_text("#count") == f"10 of {NUMBER} series"
    tab.page.evaluate("document.activeElement.blur()")
    tab.page.keyboard.press("ArrowDown")
    first = tab.page.inner_text("#open")
    tab.page.keyboard.press("ArrowDown")
    second = tab.page.inner_text("#open")
    tab.page.keyboard.press("ArrowUp")
    assert (tab.page.inner_text("#open"), first != second) == (first, True)
    assert tab.page.evaluate("document.getElementById('thumbnail').decode().then(() => true)")
    tab.page.fill("#filter", "")
    tab.page.click("circle[data-i='500'] >> nth=0", force=True)
    assert tab.page.inner_text("#open") != first


def test_ratings_are_saved_read_back_and_kept(browser: object, cohort: Path, tmp_path: Path) -> None:
    tab = Tab(browser, cohort, accept_downloads=True)
    tab.page.keyboard.press("ArrowDown")
    name = tab.page.inner_text("#open")
    tab.page.keyboard.press("e")
    tab.page.fill("#note", 'turned "much", twice')
    with tab.page.expect_download() as download:
        tab.page.click("#save")
    file = tmp_path / "ratings.csv"
    download.value.save_as(file)
    assert file.read_text() == f'series,rating,note\n{name},exclude,"turned ""much"", twice"\n'
    tab.page.reload()
    row = tab.page.locator("#series tbody tr", has_text=name)
    assert row.locator("td").nth(-2).inner_text() == "exclude"
    other = Tab(browser, cohort)
    other.page.set_input_files("#load", file)
    row = other.page.locator("#series tbody tr", has_text=name)
    row.locator("td", has_text="exclude").wait_for()
    assert row.locator("td").nth(-1).inner_text() == 'turned "much", twice'
    page = write_group(cohort.parent, "1", ratings=file).read_text(encoding="utf-8")
    assert "turned &#34;much&#34;, twice" in page
