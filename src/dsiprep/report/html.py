"""One page per subject, drawn from results alone."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dsiprep.data.results import UnitResults
from dsiprep.report.boilerplate import methods_html
from dsiprep.report.page_parts import Album, Section, write_atomically
from dsiprep.report.sections import SECTIONS
from dsiprep.report.wording import duration

LOG = logging.getLogger(__name__)
COLOURS = ("#94a3b8", "#22a7c3", "#3f7fdb", "#7c5cd6", "#c2529c", "#e07b1f", "#d9b310", "#4f9d5d")


@dataclass(frozen=True)
class Page:
    """The cards of one unit."""

    name: str
    anchor: str
    sections: tuple[Section, ...]


def render_report(
    results: Sequence[UnitResults],
    out: Path,
    version: str,
    failures: Sequence[tuple[str, str]] = (),
    command: str = "",
) -> Path:
    """Write `out/sub-X.html` and its pictures in `out/sub-X/figures`.

    Parameters
    ----------
    results : sequence of UnitResults
        The units of one subject; may be empty where all failed.
    out : Path
        Root of the derivatives.
    version : str
        Version of dsiprep.
    failures : sequence of (str, str)
        Name of a unit and what went wrong with it.
    command : str
        The command line, to be shown.

    Returns
    -------
    Path
        The page. It is replaced in one step, after its pictures are there.

    Raises
    ------
    ValueError
        If there is neither a result nor a failure, or more than one subject.
    """
    subject = _subject(results, failures)
    pages = tuple(_page(unit, out, subject) for unit in results)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["duration"] = duration
    text = environment.get_template("template.html.j2").render(
        subject=subject,
        version=version,
        pages=pages,
        failures=list(failures),
        command=command,
        methods=Markup(methods_html(results)) if results else "",
        colours=COLOURS,
    )
    return write_atomically(out / f"{subject}.html", text.encode("utf-8"))


def _subject(results: Sequence[UnitResults], failures: Sequence[tuple[str, str]]) -> str:
    found = {f"sub-{unit.unit.subject}" for unit in results} | {name.split("_")[0] for name, _ in failures}
    if len(found) != 1:
        raise ValueError(f"a report is about one subject, found {sorted(found) or 'none'}")
    return found.pop()


def _page(results: UnitResults, out: Path, subject: str) -> Page:
    album = Album(out, subject, results.unit.name)
    sections = []
    for draw in SECTIONS:
        try:
            sections.append(draw(results, album))
        except Exception as error:  # results are whole and written; a picture must not cost the rest of the page
            LOG.exception("%s: section '%s' of the report could not be drawn", results.unit.name, draw.__name__)
            problem = f"This section could not be drawn ({type(error).__name__}: {error}); the results are whole."
            sections.append(Section(draw.__name__, draw.__name__.capitalize(), "", notes=(problem,)))
    album.sweep()
    return Page(results.unit.name, re.sub(r"[^A-Za-z0-9_-]", "-", results.unit.name), tuple(sections))
