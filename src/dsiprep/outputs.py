"""Write what `preprocess` returns: derivatives with QSIPrep's names, and the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dsiprep import __version__
from dsiprep.data.results import UnitResults
from dsiprep.data.template import Template
from dsiprep.io.derivatives import write_root, write_unit
from dsiprep.io.provenance import raw_root
from dsiprep.io.templates import load_template
from dsiprep.report.boilerplate import write_boilerplate
from dsiprep.report.html import render_report
from dsiprep.settings import AnatomySettings

__all__ = ["template_of", "write_derivatives", "write_methods", "write_report"]


def write_derivatives(results: UnitResults, out: Path | str) -> list[Path]:
    """Write the outputs of one unit into a BIDS derivatives folder, under QSIPrep's names.

    Parameters
    ----------
    results : UnitResults
        From `preprocess`.
    out : Path or str
        Root of the derivatives; made if it is missing, shared with other units.

    Returns
    -------
    list of Path
        Files written, relative to `out`.

    Raises
    ------
    OutputError
        If the folder cannot be written.
    """
    write_root(Path(out), __version__, raw_root(results.unit))
    return write_unit(results, Path(out), template_of(results.settings.anatomy))


def write_report(
    results: Sequence[UnitResults],
    out: Path | str,
    failures: Sequence[tuple[str, str]] = (),
    command: str = "",
) -> Path:
    """Write the report and the methods text of one subject into its derivatives folder.

    Parameters
    ----------
    results : sequence of UnitResults
        All units of the subject that finished.
    out : Path or str
        Root of the derivatives.
    failures : sequence of (str, str)
        Name of each unit that failed, and why.
    command : str
        Command line to be shown.

    Returns
    -------
    Path
        The HTML page.
    """
    write_methods(results, out)
    return render_report(results, Path(out), __version__, failures, command)


def write_methods(results: Sequence[UnitResults], out: Path | str) -> None:
    """Write the methods text and its references of one subject into its derivatives folder; see `write_report`."""
    write_root(Path(out), __version__, raw_root(results[0].unit) if results else None)
    if results:
        write_boilerplate(list(results), Path(out))


def template_of(settings: AnatomySettings) -> Template | None:
    """The standard space that images are written in; None without normalisation."""
    return load_template(settings.template, settings.modality) if settings.normalize else None
