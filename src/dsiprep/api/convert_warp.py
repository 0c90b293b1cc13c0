"""Convert, compose and invert warps and linear transforms of FreeSurfer, FSL and ITK.

The format of an input is recognised from its content. `dsiprep-tools convert-warp` is the command-line interface of
`convert_warp`.
"""

from __future__ import annotations

import gzip
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dsiprep.data.grid import Grid
from dsiprep.data.transform import Affine, Chain, DisplacementField
from dsiprep.errors import InputError, OutputError, SettingsError
from dsiprep.io import freesurfer, fsl, itk
from dsiprep.io.nifti import grid_of, open_nifti
from dsiprep.io.vector_image import VectorImage, absolute_or_displacement, read_vectors
from dsiprep.ops.image.displacement_field import chain_displacement, chain_points, chain_points_back, prefilter

__all__ = ["KINDS", "Transform", "convert_warp", "read_transform"]

KINDS = ("itk", "freesurfer", "easyreg", "fsl", "fsl-absolute")
LAYOUTS = {"freesurfer": "displacement", "easyreg": "absolute"}  # vector layout of the FreeSurfer kinds
LAYOUT_DESCRIPTIONS = {
    "displacement": "RAS displacements",
    "absolute": "RAS coordinates",
    "voxel-displacement": "displacements in voxels",
    "voxel-absolute": "voxel coordinates",
}
LINEAR_SUFFIXES = (".mat", ".txt", ".tfm")
# A MATLAB 4 header: five 32-bit integers, then the name of the first variable.
MATLAB_TRANSFORM = re.compile(rb".{20}\w*Transform\w*_3_3\0", re.DOTALL)
# The `descrip` field of NIfTI files written by FSL: "FSL5.0", "6.0.5:9e026117".
FSL_DESCRIPTION = re.compile(r"FSL|\d+(\.\d+)+:[0-9a-f]+")
INVERSE_CHECK_POINTS = 100_000


@dataclass(frozen=True, eq=False)
class Transform:
    """A transform read from a file.

    Attributes
    ----------
    chain : Chain
        Maps points of the fixed image to points of the moving image.
    moving : Grid or None
        Grid of the moving image, if known.
    description : str
        The recognised format, as a sentence.
    """

    chain: Chain
    moving: Grid | None
    description: str

    @property
    def grid(self) -> Grid | None:
        """Grid of the first displacement field, if there is one."""
        return next((step.grid for step in self.chain.steps if isinstance(step, DisplacementField)), None)


def convert_warp(
    source_file: Path,
    out: Path,
    *,
    affine: Path | None = None,
    invert: bool = False,
    source: Path | None = None,
    reference: Path | None = None,
    kind: str | None = None,
    to: str = "itk",
) -> list[str]:
    """Read a warp or a linear transform and write it in another format.

    Parameters
    ----------
    source_file, out : Path
        Input and output file. The suffix of `out` selects its format: `.h5` is an ITK composite transform, `.nii` and
        `.nii.gz` are displacement fields, `.mat`, `.txt` and `.tfm` are linear ITK transforms.
    affine : Path, optional
        A linear transform applied after the warp: x -> affine(warp(x)), as in ANTs' `-t warp -t affine`.
    invert : bool
        Write the inverse, on the grid of the moving image if known and otherwise on the grid of the warp.
    source : Path, optional
        The moving image of the warp; required to read FSL warps and to write FreeSurfer warps.
    reference : Path, optional
        The fixed image of the warp; its grid is the output grid unless `invert` is set.
    kind : str, optional
        One of `KINDS`, for vector images whose header does not identify the format.
    to : str
        "itk" or "freesurfer", the format of a NIfTI output.

    Returns
    -------
    list of str
        Messages: what was read and written, and the accuracy of an inverse.

    Raises
    ------
    InputError
        If a file cannot be used or lacks necessary information.
    SettingsError
        If the format of `out` cannot hold the requested transform.
    OutputError
        If `out` is the input file.
    """
    source_file, out = Path(source_file), Path(out)
    _check_file_names(source_file, out, to)
    fixed, moving = (None if image is None else _image_grid(image) for image in (reference, source))
    transform = read_transform(source_file, kind, moving, fixed)
    messages = [f"Read {source_file}: {transform.description}"]
    chain, moving = transform.chain, moving or transform.moving
    if affine is not None:
        chain = Chain((*chain.steps, *_read_linear(affine, moving, fixed)), chain.source, chain.target)
        moving = None if source is None else moving  # a file stores the moving image of the warp alone
    warp_grid = transform.grid
    fixed = fixed or warp_grid
    if invert:
        chain, message = _invert(chain, moving or fixed)
        messages.append(message)
        if moving is None and fixed is not None:
            messages.append("The inverse has the grid of the warp; use --source to select that of the moving image.")
        fixed, moving = moving or fixed, fixed
    elif reference is not None and warp_grid is not None and fixed is not None and not fixed.matches(warp_grid):
        chain = _as_single_field(chain, fixed)
    _write(out, chain, fixed, moving, to)
    return [*messages, f"Wrote {out}: {_contents(chain, out)}."]


def read_transform(
    path: Path, kind: str | None = None, moving: Grid | None = None, fixed: Grid | None = None
) -> Transform:
    """Read a warp or a linear transform in any supported format.

    Parameters
    ----------
    path : Path
    kind : str, optional
        One of `KINDS`, for vector images whose header does not identify the format.
    moving, fixed : Grid, optional
        Grids of the two images, for formats that do not store them.

    Returns
    -------
    Transform

    Raises
    ------
    InputError
        If the format is not recognised, or if the file lacks necessary information.
    """
    start = _first_bytes(path)
    names = ("source", "target")
    if start[:4] == b"\x89HDF":
        chain = itk.read_composite_h5(path, *names)
        return Transform(chain, None, f"ITK transform of {len(chain.steps)} step(s).")
    if start[:8] == b"#Insight" or MATLAB_TRANSFORM.match(start):
        step = itk.read_affine(path, *names)
        return Transform(Chain((step,), *names), None, "linear ITK transform.")
    if start[:4] in (b"\x5c\1\0\0", b"\0\0\1\x5c", b"\x1c\2\0\0", b"\0\0\2\x1c"):
        return _read_nifti(path, kind, moving, fixed)
    if freesurfer.is_mgh(path):
        return _freesurfer_transform(freesurfer.read_warp(path, LAYOUTS.get(kind or ""), moving), False)
    if start[:4] == b"\x3f\x80\0\0":
        raise InputError(
            f"{path}: .m3z morphs are not supported; run mri_warp_convert --inm3z {path.name} --outras warp.nii.gz and "
            "convert its output"
        )
    if re.search(rb"^\s*nxforms\s*=", start, re.MULTILINE):
        step = freesurfer.read_lta(path, *names)
        return Transform(Chain((step,), *names), None, "linear FreeSurfer transform (.lta).")
    raise InputError(f"{path}: {_explain_unrecognised(start)}")


def _read_nifti(path: Path, kind: str | None, moving: Grid | None, fixed: Grid | None) -> Transform:
    image = read_vectors(path, fixed)
    chosen = kind or _detect_kind(image)
    if chosen in LAYOUTS:
        return _freesurfer_transform(
            freesurfer.warp_of(image, LAYOUTS.get(kind or ""), moving), kind is None and not image.intent
        )
    if chosen == "fsl" or chosen == "fsl-absolute":
        field = fsl.warp_of(image, moving, fixed, None if kind is None else kind == "fsl-absolute")
        return Transform(_chain(field), moving, "FSL warp field.")
    field = itk.displacement_of(image)
    if kind is None and absolute_or_displacement(field.data.numpy(), _voxel_centres(field.grid)) == "absolute":
        raise InputError(
            f"{path}: the header declares ITK displacements, but the values look like coordinates; give the format "
            "with --kind"
        )
    return Transform(_chain(field), moving, "ITK displacement field (LPS).")


def _detect_kind(image: VectorImage) -> str:
    if image.intent == itk.NIFTI_INTENT:
        return "itk"
    if image.intent == freesurfer.INTENT or image.extension:
        return "freesurfer"
    if image.intent == fsl.FIELD or image.intent in fsl.COEFFICIENTS:
        return "fsl"
    if image.intent == 0 and image.axes == 4 and not FSL_DESCRIPTION.match(image.description):
        return "freesurfer"
    origin = f"description {image.description!r}" if image.description else "no description"
    raise InputError(
        f"{image.path}: a vector image with intent {image.intent} and {origin}, possibly of ITK (LPS), FreeSurfer "
        f"(RAS) or FSL (FSL coordinates); give the format with --kind {{{','.join(KINDS)}}}"
    )


def _freesurfer_transform(warp: freesurfer.FreeSurferWarp, unmarked: bool) -> Transform:
    description = f"FreeSurfer warp, {LAYOUT_DESCRIPTIONS[warp.layout]}."
    if unmarked:
        description += " The header does not identify the program; if it was FSL, use --kind fsl."
    return Transform(_chain(warp.field), warp.moving, description)


def _chain(field: DisplacementField) -> Chain:
    return Chain((field,), "source", "target")


def _read_linear(path: Path, moving: Grid | None, fixed: Grid | None) -> tuple[Affine, ...]:
    steps = read_transform(path, None, moving, fixed).chain.steps
    linear = tuple(step for step in steps if isinstance(step, Affine))
    if len(linear) != len(steps):
        raise InputError(f"{path} contains a displacement field; --affine requires a linear transform")
    return linear


def _invert(chain: Chain, grid: Grid | None) -> tuple[Chain, str]:
    """Return the inverse on a grid, and a message with its accuracy."""
    if all(isinstance(step, Affine) for step in chain.steps):
        inverse_steps = tuple(step.inverse() for step in reversed(chain.steps) if isinstance(step, Affine))
        return Chain(inverse_steps, chain.target, chain.source), "Inverse: exact (linear)."
    if grid is None:
        raise InputError("the inverse needs a grid; give the moving image of the warp with --source")
    points = _voxel_centres(grid).reshape(3, -1).T
    shift = chain_points_back(chain, points) - points
    data = np.ascontiguousarray(shift.T, dtype=np.float32).reshape(3, *grid.shape)
    inverse = Chain((prefilter(DisplacementField(torch.from_numpy(data), grid)),), chain.target, chain.source)
    return inverse, _describe_accuracy(chain, inverse, grid)


def _describe_accuracy(forward: Chain, inverse: Chain, grid: Grid) -> str:
    """Describe the accuracy of an inverse at random points, so that interpolation errors are included."""
    start = grid.to_world(np.random.default_rng(0).uniform(0, np.asarray(grid.shape) - 1.0, (INVERSE_CHECK_POINTS, 3)))
    inverted = chain_points(inverse, start)
    covered = np.ones(INVERSE_CHECK_POINTS, bool)
    for step in forward.steps:
        if isinstance(step, DisplacementField):
            preceding = Chain(forward.steps[: forward.steps.index(step)], "", "")
            voxels = step.grid.to_voxels(chain_points(preceding, inverted))
            covered &= ((voxels >= 0) & (voxels <= np.asarray(step.grid.shape) - 1)).all(axis=1)
    if not covered.any():
        raise InputError("the warp does not cover the image given with --source; give the moving image of the warp")
    error = np.linalg.norm(chain_points(forward, inverted) - start, axis=1)[covered]
    return (
        f"Inverse: the error of forward after inverse is {error.mean():.4f} mm on average, "
        f"{np.quantile(error, 0.999):.3f} mm at the 99.9th percentile and {error.max():.3f} mm at most, at those of "
        f"{INVERSE_CHECK_POINTS} points that the warp covers ({covered.mean():.0%})."
    )


def _as_single_field(chain: Chain, grid: Grid) -> Chain:
    """Combine all steps into one displacement field on a grid."""
    return Chain((DisplacementField(chain_displacement(chain, grid), grid),), chain.source, chain.target)


def _write(out: Path, chain: Chain, fixed: Grid | None, moving: Grid | None, to: str) -> None:
    if out.suffix == ".h5":
        itk.write_composite_h5(out, chain)
        return
    if out.suffix in LINEAR_SUFFIXES:
        matrix = np.eye(4)
        for step in chain.steps:
            if not isinstance(step, Affine):
                raise SettingsError(f"{out}: this format holds linear transforms only; write a warp as .h5 or .nii.gz")
            matrix = step.matrix @ matrix
        itk.write_affine(out, Affine(matrix, chain.source, chain.target))
        return
    if fixed is None:
        raise InputError(f"{out}: a displacement field needs a grid; give an image on that grid with --reference")
    field = _as_single_field(chain, fixed).steps[0]
    if len(chain.steps) == 1 and isinstance(chain.steps[0], DisplacementField) and chain.steps[0].grid.matches(fixed):
        field = chain.steps[0]
    assert isinstance(field, DisplacementField)
    if to == "itk":
        itk.write_displacement_nifti(out, field)
    elif moving is None:
        raise InputError(f"{out}: FreeSurfer warps store the geometry of the moving image; give it with --source")
    else:
        freesurfer.write_warp(out, field, moving)


def _contents(chain: Chain, out: Path) -> str:
    fields = sum(isinstance(step, DisplacementField) for step in chain.steps)
    if out.suffix in LINEAR_SUFFIXES:
        return "a linear transform"
    if out.suffix != ".h5":
        return "a displacement field"
    return f"{fields} displacement field(s) and {len(chain.steps) - fields} linear transform(s)"


def _check_file_names(source_file: Path, out: Path, to: str) -> None:
    nifti = out.name.endswith((".nii", ".nii.gz"))
    if not nifti and out.suffix not in (".h5", *LINEAR_SUFFIXES):
        raise SettingsError(f"{out}: the file name must end in .h5, .nii, .nii.gz, .mat, .txt or .tfm")
    if to != "itk" and not nifti:
        raise SettingsError(f"{out}: --to {to} writes NIfTI; the file name must end in .nii or .nii.gz")
    if out.exists() and source_file.exists() and out.samefile(source_file):
        raise OutputError(f"{out} is the input file, which is never overwritten; choose another name")


def _image_grid(path: Path) -> Grid:
    """Grid of an image with any number of dimensions."""
    if freesurfer.is_mgh(path):
        return freesurfer.mgh_grid(path)
    return grid_of(open_nifti(path), path)


def _voxel_centres(grid: Grid) -> np.ndarray:
    """World coordinates of the voxel centres, (3, i, j, k)."""
    return np.moveaxis(grid.to_world(np.moveaxis(np.indices(grid.shape), 0, -1)), -1, 0)


def _first_bytes(path: Path) -> bytes:
    """The first 4096 bytes of a file, decompressed."""
    try:
        with Path(path).open("rb") as raw:
            compressed = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path) if compressed else Path(path).open("rb") as stream:
            return stream.read(4096)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (OSError, EOFError, zlib.error) as problem:
        raise InputError(f"{path} cannot be read ({problem}); replace it with an intact copy") from None


def _explain_unrecognised(start: bytes) -> str:
    expected = "expected a NIfTI or .mgz warp, an .lta file, or an ITK transform (.h5, .mat, .txt, .tfm)"
    try:
        numbers = [float(word) for word in start.decode("ascii").split()]
    except (UnicodeDecodeError, ValueError):
        return f"unknown format; {expected}"
    if len(numbers) == 16:
        return (
            "a 4x4 matrix without its coordinate system, as written by FLIRT; convert it to an ITK transform with "
            "c3d_affine_tool -ref REFERENCE -src SOURCE FILE -fsl2ras -oitk affine.txt"
        )
    return f"unknown format; {expected}"
