"""All preprocessed volumes as an animation in order of b-value."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageDraw

from dsiprep.data.results import Preprocessed
from dsiprep.report.rendering import apply_colourmap
from dsiprep.report.slice_layout import Layout, View, sample_at, window

MOST_FRAMES, MILLISECONDS = 96, 140
WIDTH, QUALITY, CAPTION = 760, 45, 22  # pixels wide; quality of WebP; height of the line of text


def volume_animation(preprocessed: Preprocessed) -> bytes | None:
    """Animated WebP of the middle slices, at most `MOST_FRAMES` volumes; None for a single volume."""
    dwi = preprocessed.dwi
    if len(dwi) < 2:
        return None
    layout = Layout.middle_slices(View.of(preprocessed.mask, margin=6.0))
    points, indices = layout.points()
    inside = sample_at(preprocessed.mask, points) > 0.5
    size = (WIDTH, round(layout.height * WIDTH / layout.width))
    order = np.lexsort((np.arange(len(dwi)), np.round(dwi.bvals)))
    chosen = order[np.unique(np.linspace(0, len(order) - 1, min(MOST_FRAMES, len(order))).round().astype(int))]
    frames = []
    for v in chosen:
        values = sample_at(dwi.volume(int(v)), points)
        limits = window(values[None], inside[None], 99.5)
        small = Image.fromarray(apply_colourmap(layout.scatter(values, indices), limits)[..., 0])
        frame = Image.new("L", (WIDTH, size[1] + CAPTION))
        frame.paste(small.resize(size, Image.Resampling.BILINEAR), (0, CAPTION))
        ImageDraw.Draw(frame).text((8, 4), f"b = {dwi.bvals[v]:.0f} s/mm\u00b2, volume {v}", fill=230)
        frames.append(frame)
    out = io.BytesIO()
    frames[0].save(out, "WEBP", save_all=True, append_images=frames[1:], duration=MILLISECONDS, loop=0, quality=QUALITY,
                   method=2)  # fmt: skip
    return out.getvalue()
