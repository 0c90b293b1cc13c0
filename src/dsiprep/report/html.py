"""The HTML report of one subject, rendered from the results alone."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dsiprep.data.results import UnitResults
from dsiprep.mapped import release_memory
from dsiprep.report.boilerplate import methods_html
from dsiprep.report.page_parts import FigureWriter, Section, write_atomically
from dsiprep.report.quality_record import write_record
from dsiprep.report.sections import SECTIONS
from dsiprep.report.single_file import as_single_file
from dsiprep.report.thumbnails import write_thumbnail
from dsiprep.report.verdict_bounds import read_bounds
from dsiprep.report.verdicts import Verdict, judge
from dsiprep.report.viewer import write_viewer
from dsiprep.report.wording import duration

LOG = logging.getLogger(__name__)
STAGE_COLOURS = ("#94a3b8", "#22a7c3", "#3f7fdb", "#7c5cd6", "#c2529c", "#e07b1f", "#d9b310", "#4f9d5d")


@dataclass(frozen=True)
class UnitReport:
    """The verdicts and sections of one unit."""

    name: str
    anchor: str
    sections: tuple[Section, ...]
    verdicts: tuple[Verdict, ...] = ()
    viewer: str = ""

    def link(self, verdict: Verdict) -> str:
        """Link to the picture of a verdict; to its section where there is no such picture."""
        for section in self.sections:
            for picture in section.pictures:
                if verdict.figure and picture.name.startswith(verdict.figure):
                    return f"#{self.anchor}-figure-{picture.name}"
        return f"#{self.anchor}-{verdict.section}"


def render_report(
    results: Sequence[UnitResults],
    out: Path,
    version: str,
    failures: Sequence[tuple[str, str]] = (),
    command: str = "",
) -> Path:
    """Write `out/sub-X.html` and its figures in `out/sub-X/figures`.

    Parameters
    ----------
    results : sequence of UnitResults
        The units of one subject; may be empty if all of them failed.
    out : Path
        Root of the derivatives.
    version : str
        Version of dsiprep.
    failures : sequence of (str, str)
        Name of each failed unit and its error message.
    command : str
        Command line to show in the report.

    Returns
    -------
    Path
        The HTML file. It is replaced atomically once its figures are written.

    Raises
    ------
    ValueError
        If there are neither results nor failures, or if they belong to more than one subject.
    """
    subject = _subject(results, failures)
    reports = tuple(_unit_report(unit, out, subject, version) for unit in results)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["duration"] = duration
    page = environment.get_template("template.html.j2").render(
        subject=subject,
        version=version,
        reports=reports,
        failures=list(failures),
        command=command,
        methods=Markup(methods_html(results)) if results else "",
        colours=STAGE_COLOURS,
        script=Markup((Path(__file__).parent / "report.js").read_text(encoding="utf-8")),
    )
    if any(unit.settings.report.single_file for unit in results):
        write_atomically(out / f"{subject}_report.html", as_single_file(page, out).encode("utf-8"))
    return write_atomically(out / f"{subject}.html", page.encode("utf-8"))


def _subject(results: Sequence[UnitResults], failures: Sequence[tuple[str, str]]) -> str:
    subjects = {f"sub-{unit.unit.subject}" for unit in results} | {name.split("_")[0] for name, _ in failures}
    if len(subjects) != 1:
        raise ValueError(f"a report covers exactly one subject, got {sorted(subjects) or 'none'}")
    return subjects.pop()


def _unit_report(results: UnitResults, out: Path, subject: str, version: str) -> UnitReport:
    writer = FigureWriter(out, subject, results.unit.name)
    sections = []
    for build in SECTIONS:
        release_memory()
        try:
            sections.append(build(results, writer))
        except Exception as error:  # the derivatives are already written; one section must not cost the whole page
            LOG.exception("%s: report section '%s' could not be rendered", results.unit.name, build.__name__)
            problem = (
                f"This section could not be rendered ({type(error).__name__}: {error}). "
                "The preprocessed data are not affected."
            )
            sections.append(Section(build.__name__, build.__name__.capitalize(), "", notes=(problem,)))
    write_thumbnail(writer)
    viewer = write_viewer(results, writer)
    writer.remove_stale()
    anchor = re.sub(r"[^A-Za-z0-9_-]", "-", results.unit.name)
    verdicts = judge(results, read_bounds(results.settings.report.bounds))
    write_record(results, verdicts, out, version)
    return UnitReport(results.unit.name, anchor, tuple(sections), verdicts, viewer)
