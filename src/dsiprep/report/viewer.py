"""An interactive viewer of a series: NiiVue, which nilearn ships, with the images of the series at a coarse resolution.

The page holds its images, so that it works from a disk and inside a mailed report. Where the folder is served by a web
server, structural image, reference and series are loaded at full resolution from the derivatives.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import nibabel as nib
import nilearn
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dsiprep.data.grid import Grid, Volume
from dsiprep.data.results import UnitResults
from dsiprep.io.provenance import anatomy_stem
from dsiprep.ops.image.displacement_field import chain_points
from dsiprep.report.page_parts import FigureWriter, write_atomically
from dsiprep.report.slice_figures import b_value_ranges, mean_volume
from dsiprep.report.slice_layout import sample_at

SPACING_MM, MARGIN_MM = 3.0, 12.0
SCRIPT = Path(nilearn.__file__).parent / "_assets" / "js" / "niivue.umd.js"
SHARED_SCRIPT = Path("logs") / "niivue.umd.js"  # one copy per output folder


@dataclass(frozen=True)
class Layer:
    """One image of the viewer.

    Attributes
    ----------
    name : str
    overlay : bool
        Shown over another image.
    colourmap, negative : str
        NiiVue's names of the colour maps of positive and of negative values.
    low, high : float
        Window of positive values, and of negative ones mirrored; overlays are transparent below it.
    image : str
        NIfTI, compressed, as base64.
    file : str
        The same image at full resolution, relative to the figures; empty if it is not among the derivatives.
    """

    name: str
    overlay: bool
    colourmap: str
    negative: str
    low: float
    high: float
    image: str
    file: str = ""


def write_viewer(results: UnitResults, figures: FigureWriter) -> str:
    """Write `<unit>_desc-viewer_dwi.html` and return its link relative to the report; empty without NiiVue's script."""
    if not SCRIPT.is_file():
        return ""
    shared = figures.out / SHARED_SCRIPT
    if not shared.is_file() or shared.stat().st_size != SCRIPT.stat().st_size:
        write_atomically(shared, SCRIPT.read_bytes())
    name = f"{figures.prefix}_desc-viewer_dwi.html"
    page = viewer_page(results, f"../../{SHARED_SCRIPT.as_posix()}")
    write_atomically(figures.out / figures.subject / "figures" / name, page.encode("utf-8"))
    figures.written.append(name)
    return f"{figures.subject}/figures/{name}"


def viewer_page(results: UnitResults, script: str) -> str:
    """The page; `script` is the address of NiiVue's script."""
    folder = Path(__file__).parent
    environment = Environment(loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined)
    layers = json.dumps([asdict(layer) for layer in _layers(results)]).replace("<", "\\u003c")
    return environment.get_template("viewer.html.j2").render(
        name=results.unit.name,
        niivue=script,
        layers=Markup(layers),
        script=Markup((folder / "viewer.js").read_text(encoding="utf-8")),
    )


def with_script_inside(page: str, address: str) -> str:
    """The page with NiiVue's script in place of its address."""
    text = SCRIPT.read_text(encoding="utf-8").replace("</script", "<\\/script")
    return page.replace(f'<script src="{address}"></script>', f"<script>{text}</script>")


def _layers(results: UnitResults) -> list[Layer]:
    """Images in ACPC space at `SPACING_MM`."""
    anatomy, preprocessed = results.anatomy, results.preprocessed
    grid = _coarse_grid(anatomy.mask)
    points = grid.to_world(np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), -1).reshape(-1, 3))

    def layer(
        name: str, sample: Callable[[], np.ndarray], colourmap: str = "gray", overlay: bool = False, file: str = ""
    ) -> Layer:
        return _layer(name, sample(), grid, colourmap, overlay, file)

    session = results.unit.session
    depth = f"../{f'ses-{session}/' if session else ''}dwi/{results.unit.name}_space-ACPC"
    written = "" if results.unit.output else depth
    layers = []
    if anatomy.modality != "none":
        stem = anatomy_stem(results.unit, results.settings.anatomy)
        file = f"../../{stem}_space-ACPC_desc-preproc_{anatomy.modality}.nii.gz"
        layers.append(layer(anatomy.modality, lambda: sample_at(anatomy.image, points), file=file))
    reference = f"{written}_dwiref.nii.gz" if written else ""
    layers.append(layer("b=0 reference", lambda: sample_at(preprocessed.dwiref, points), file=reference))
    series = f"{written}_desc-preproc_dwi.nii.gz" if written else ""
    layers.append(layer("DWI", lambda: _means(results, points), file=series))
    layers.append(layer("Brain mask", lambda: sample_at(preprocessed.mask, points), "red", True))
    if results.distortion is not None and results.distortion.fieldmap_hz is not None:
        hz, to_dwiref = results.distortion.fieldmap_hz, results.coregistration.dwiref_to_acpc.matrix
        layers.append(layer("Off-resonance field (Hz)", lambda: sample_at(hz, points, via=to_dwiref), "warm", True))
    template, chain = anatomy.template_image, anatomy.template_to_acpc
    if template is not None and chain is not None:
        layers.append(layer("Template", lambda: sample_at(template, chain_points(chain, points)), "bluegrn", True))
    return layers


def _coarse_grid(mask: Volume) -> Grid:
    """RAS+ grid around a brain mask, or over the whole image if the mask is empty."""
    inside = np.argwhere(mask.numpy() > 0.5)
    if not len(inside):
        inside = np.array([[0, 0, 0], np.asarray(mask.grid.shape) - 1])
    corners = mask.grid.to_world(inside)
    low, high = corners.min(0) - MARGIN_MM, corners.max(0) + MARGIN_MM
    affine = np.diag([SPACING_MM] * 3 + [1.0])
    affine[:3, 3] = low
    i, j, k = (int(n) for n in np.ceil((high - low) / SPACING_MM))
    return Grid((i, j, k), affine)


def _means(results: UnitResults, points: np.ndarray) -> np.ndarray:
    """Mean images of b=0 and of ranges of b-values at points (m, 3), (ranges, m)."""
    dwi = results.preprocessed.dwi
    ranges = b_value_ranges(dwi.bvals, dwi.is_b0)
    return np.stack([sample_at(mean_volume(dwi, chosen), points) for _, chosen in ranges])


def _layer(name: str, values: np.ndarray, grid: Grid, colourmap: str, overlay: bool, file: str) -> Layer:
    """A layer from values at the points of the grid, (m,) or (frames, m), stored as bytes over their window."""
    frames = values.reshape(-1, *grid.shape)
    signed = float(frames.min()) < 0 and overlay
    high = float(np.percentile(np.abs(frames), 99.7)) or 1.0
    low = -high if signed else 0.0
    levels = np.clip(np.round((frames - low) * (255 / (high - low))), 0, 255).astype(np.uint8)
    image = nib.Nifti1Image(np.moveaxis(levels, 0, -1) if len(levels) > 1 else levels[0], grid.affine)
    image.header.set_slope_inter((high - low) / 255, low)
    image.header.set_xyzt_units("mm")
    encoded = base64.b64encode(gzip.compress(image.to_bytes(), 9, mtime=0)).decode()
    least = 0.0 if not overlay else 0.05 * high if signed else 0.4 * high
    return Layer(name, overlay, colourmap, "winter" if signed else "", least, high, encoded, file)
