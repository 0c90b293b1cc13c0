"""The page of a cohort, `group.html`, with its tables `group_dwi.tsv` and `.json` and bounds `group_bounds.toml`."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dsiprep.report.cohort import (
    Series,
    cohort_bounds,
    direction,
    is_quality,
    meaning,
    metric_names,
    read_cohort,
    read_reference,
    read_table,
    robust_z,
    values_of,
)
from dsiprep.report.page_parts import write_atomically
from dsiprep.report.thumbnails import SUFFIX as THUMBNAIL_SUFFIX
from dsiprep.report.verdict_bounds import Bound

COLUMNS = ("mean_fd", "max_fd", "check_outlier_slices", "check_snr", "raw_neighbor_corr", "t1_neighbor_corr",
           "CNR0_median", "check_coregistration", "t1_dice_distance", "mni_dice_distance")  # fmt: skip
REPEATED = ("check_mean_fd", "check_max_fd", "check_normalisation")  # columns of image_qc.tsv under another name
RATINGS = ("keep", "exclude", "")
RATINGS_FILE = "group_ratings.csv"
STRIP_WIDTH, STRIP_HEIGHT, STRIP_MARGIN = 320, 74, 8
SHOWN_Z = 6.0  # at the ends of a strip; points beyond are drawn at the end


@dataclass(frozen=True)
class Row:
    """One series of the table, with everything that the page shows of it."""

    series: Series
    link: str
    cells: tuple[str, ...]
    values: tuple[float | None, ...]
    worst_z: float
    worst_metric: str
    rating: str
    note: str
    thumbnail: str

    @property
    def state(self) -> str:
        """The worst verdict."""
        return next((s for s in ("bad", "look", "fine") if self.series.count(s)), "not measured")


def write_group(out: Path, version: str, reference: Path | None = None, ratings: Path | None = None) -> Path:
    """Write the page and the tables of all series below `out`.

    Parameters
    ----------
    out : Path
        Derivatives of dsiprep or QSIPrep.
    version : str
        Of dsiprep.
    reference : Path, optional
        Table with one row per series to compare with, such as the group_dwi.tsv of another study; by default the
        cohort itself.
    ratings : Path, optional
        CSV file of ratings; by default `out/group_ratings.csv`, if it exists.

    Returns
    -------
    Path
        `out/group.html`.

    Raises
    ------
    InputError
        If there are no series, or a file cannot be read.
    """
    cohort = read_cohort(out)
    names = metric_names(cohort)
    compared = read_reference(reference) if reference else {name: values_of(cohort, name) for name in names}
    scores = {
        name: robust_z(values_of(cohort, name), compared[name])
        for name in names
        if name in compared and is_quality(name)
    }
    given = ratings or (out / RATINGS_FILE if (out / RATINGS_FILE).is_file() else None)
    rows = _rows(cohort, scores, read_ratings(given) if given else {}, out)
    _write_tables(out, cohort, names, {row.series.name: row for row in rows})
    bounds = cohort_bounds(cohort)
    if bounds:
        write_atomically(out / "group_bounds.toml", _toml(bounds).encode())
    page = _render(rows, cohort, scores, reference.name if reference else "", version, bool(bounds))
    return write_atomically(out / "group.html", page.encode("utf-8"))


def read_ratings(path: Path) -> dict[str, tuple[str, str]]:
    """Rating and note by series, from the CSV file that the page saves: series, rating, note."""
    ratings = {}
    for row in read_table(path):
        rating = (row.get("rating") or "").strip()
        ratings[(row.get("series") or "").strip()] = (rating if rating in RATINGS else "", row.get("note") or "")
    return ratings


def _rows(
    cohort: Sequence[Series], scores: Mapping[str, np.ndarray], ratings: Mapping[str, tuple[str, str]], out: Path
) -> list[Row]:
    """Rows of the table, the most conspicuous series first."""
    names = list(scores)
    signs = np.array([direction(name) for name in names])
    z = np.array([scores[name] for name in names]).reshape(len(names), len(cohort))
    harm = np.nan_to_num(np.where(signs[:, None] == 0, np.abs(z), z * signs[:, None]), nan=0.0)
    rows = []
    for index, series in enumerate(cohort):
        worst = int(np.argmax(harm[:, index])) if names else 0
        rows.append(_row(series, harm[worst, index] if names else 0.0, names[worst] if names else "", ratings, out))
    return sorted(rows, key=lambda row: (-row.series.count("bad"), -row.series.count("look"), -row.worst_z))


def _row(series: Series, z: float, metric: str, ratings: Mapping[str, tuple[str, str]], out: Path) -> Row:
    values = tuple(series.metrics.get(name) for name in COLUMNS)
    thumbnail = out / series.subject / "figures" / f"{series.name}{THUMBNAIL_SUFFIX}"
    encoded = base64.b64encode(thumbnail.read_bytes()).decode() if thumbnail.is_file() else ""
    rating, note = ratings.get(series.name, ("", ""))
    page = f"{series.subject}.html"
    cells = tuple("" if value is None else f"{value:.3g}" for value in values)
    return Row(series, page, cells, values, float(z), metric if z > 0 else "", rating, note, encoded)


def _write_tables(out: Path, cohort: Sequence[Series], names: Sequence[str], rows: Mapping[str, Row]) -> None:
    """group_dwi.tsv, one row per series, and its sidecar."""
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
    writer.writerow(["series", "subject", "bad", "look", "worst_z", "worst_metric", "rating", *names])
    for series in cohort:
        row = rows[series.name]
        values = [f"{series.metrics[name]:.6g}" if name in series.metrics else "n/a" for name in names]
        writer.writerow([series.name, series.subject, series.count("bad"), series.count("look"), f"{row.worst_z:.3f}",
                         row.worst_metric or "n/a", row.rating or "n/a", *values])  # fmt: skip
    write_atomically(out / "group_dwi.tsv", stream.getvalue().encode("utf-8"))
    described = {
        "series": "Name of the preprocessed series",
        "subject": "BIDS subject",
        "bad": "Number of checks that are bad",
        "look": "Number of checks to look at",
        "worst_z": "Largest distance from the median towards worse values, in robust standard deviations",
        "worst_metric": "The metric with that distance",
        "rating": "keep or exclude, as rated by a person",
        **{name: meaning(name, cohort) for name in names},
    }
    sidecar = {name: {"Description": text} for name, text in described.items()}
    write_atomically(out / "group_dwi.json", (json.dumps(sidecar, indent=2) + "\n").encode("utf-8"))


def _toml(bounds: Mapping[str, Bound]) -> str:
    """A file of bounds for --report-bounds."""
    head = "# Bounds of the verdicts from a cohort; use them with --report-bounds.\n"
    return head + "".join(
        f"\n[{key}]\nlook = {bound.look:g}\nbad = {bound.bad:g}\nsource = {json.dumps(bound.source)}\n"
        for key, bound in bounds.items()
    )


def strip(z: np.ndarray, order: Sequence[int]) -> Markup:
    """Distribution of one metric as SVG: a point per series in the order given, jittered vertically by its density."""
    half = (STRIP_WIDTH - 2 * STRIP_MARGIN) / 2
    x = np.round(STRIP_MARGIN + half + np.clip(z, -SHOWN_Z, SHOWN_Z) * half / SHOWN_Z, 1)
    stacked: dict[int, int] = {}
    points = []
    for number, index in enumerate(order):
        if not np.isfinite(z[index]):
            continue
        cell = int(x[index] // 3)
        level = stacked[cell] = stacked.get(cell, -1) + 1
        offset = (level % 19 + 1) // 2 * 3.4 * (1 if level % 2 else -1)
        side = ' class="far"' if abs(z[index]) > 3 else ""
        points.append(f'<circle cx="{x[index]:g}" cy="{STRIP_HEIGHT / 2 + offset:g}" r="2.2" data-i="{number}"{side}/>')
    lines = "".join(
        f'<path class="{kind}" d="M{STRIP_MARGIN + half + at * half / SHOWN_Z:g} 2V{STRIP_HEIGHT - 2}"/>'
        for at, kind in ((0, "median"), (-3, "limit"), (3, "limit"))
    )
    return Markup(  # numbers only
        f'<svg viewBox="0 0 {STRIP_WIDTH} {STRIP_HEIGHT}" aria-hidden="true">{lines}{"".join(points)}</svg>'
    )


def _render(
    rows: Sequence[Row],
    cohort: Sequence[Series],
    scores: Mapping[str, np.ndarray],
    reference: str,
    version: str,
    has_bounds: bool,
) -> str:
    position = {series.name: index for index, series in enumerate(cohort)}
    order = [position[row.series.name] for row in rows]
    strips = []
    for name, z in scores.items():
        if name in REPEATED:
            continue
        if np.isfinite(z).sum() > 1 and np.ptp(z[np.isfinite(z)]) > 0:
            known = values_of(cohort, name)
            known = known[np.isfinite(known)]
            text = f"median {np.median(known):.3g}, {known.min():.3g} to {known.max():.3g}"
            strips.append((name, meaning(name, cohort), text, strip(z, order)))
    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("group.html.j2").render(
        rows=rows,
        columns=[(name, meaning(name, cohort)) for name in COLUMNS],
        strips=strips,
        subjects=len({series.subject for series in cohort}),
        reference=reference,
        version=version,
        has_bounds=has_bounds,
        data=Markup(_script_data(rows)),
        script=Markup((folder / "group.js").read_text(encoding="utf-8")),
    )


def _script_data(rows: Sequence[Row]) -> str:
    """What the script needs, as JSON that cannot end its element."""
    data = [
        {
            "name": row.series.name,
            "subject": row.series.subject,
            "values": [row.worst_z, row.series.count("bad"), row.series.count("look"), *row.values],
            "state": row.state,
            "checks": [
                f"{v.get('state')}: {v.get('title')}: {v.get('reason')}"
                for v in row.series.verdicts
                if v.get("state") in ("bad", "look")
            ],
            "rating": row.rating,
            "note": row.note,
            "thumbnail": row.thumbnail,
        }
        for row in rows
    ]
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
