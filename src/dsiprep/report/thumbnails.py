"""A small picture of each series for the cohort page: brain mask, coregistration, mean before and after realignment."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from dsiprep.report.page_parts import FigureWriter, write_atomically

SUFFIX = "_desc-thumbnail_dwi.webp"
WIDTH, QUALITY = 360, 40  # pixels; about 8 kB, of which a page of 1,000 series holds 1,000
# Names of figures, of which the first that exists is taken, with the share of the width that it gets and the largest
# ratio of height to width, which cuts off lower rows.
SOURCES = (
    (("means",), 1.0, 0.15),
    (("coregDwiref",), 1.0, 0.30),
    (("hmcBefore", "hmcUpBefore"), 0.5, 1.0),
    (("hmcAfter", "hmcUpAfter"), 0.5, 1.0),
)


def write_thumbnail(figures: FigureWriter) -> Path | None:
    """Write `<unit>_desc-thumbnail_dwi.webp` from the figures of a unit; None if there are none of them."""
    folder = figures.out / figures.subject / "figures"
    placed: list[tuple[Image.Image, int, int]] = []
    left, top, height = 0, 0, 0
    for names, share, ratio in SOURCES:
        files = (f"{figures.prefix}_desc-{name}_dwi.png" for name in names)
        found = next((file for file in files if file in figures.written), None)
        if found is None:
            continue
        part = _scaled(folder / found, round(share * WIDTH), ratio)
        if left + part.width > WIDTH:
            left, top = 0, top + height
        placed.append((part, left, top))
        left, height = left + part.width, part.height
    if not placed:
        return None
    canvas = Image.new("RGB", (WIDTH, max(y + part.height for part, _, y in placed)))
    for part, x, y in placed:
        canvas.paste(part, (x, y))
    out = io.BytesIO()
    canvas.save(out, "WEBP", quality=QUALITY)
    figures.written.append(f"{figures.prefix}{SUFFIX}")
    return write_atomically(folder / f"{figures.prefix}{SUFFIX}", out.getvalue())


def _scaled(path: Path, width: int, ratio: float) -> Image.Image:
    """The upper part of a figure, at most `ratio` times as high as wide, scaled to a width in pixels."""
    with Image.open(path) as picture:
        rgb = picture.convert("RGB")
    height = min(rgb.height, round(rgb.width * ratio))
    cut = rgb.crop((0, 0, rgb.width, height))
    return cut.resize((width, max(1, round(height * width / rgb.width))), Image.Resampling.LANCZOS)
