"""Warps and linear transforms from elsewhere: recognised by their content, composed, inverted, written.

`dsiprep-tools convert-warp` is this module on the command line; `convert_warp` is the same as a library call.
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
from dsiprep.ops.image.displacement_field import chain_displacement, chain_points, chain_points_back, fit_between

__all__ = ["KINDS", "Transform", "convert_warp", "read_transform"]

KINDS = ("itk", "freesurfer", "easyreg", "fsl", "fsl-absolute")
LAYOUTS = {"freesurfer": "displacement", "easyreg": "absolute"}  # of the kinds that are FreeSurfer's
LINEAR = (".mat", ".txt", ".tfm")
MATLAB = re.compile(rb".{20}\w*Transform\w*_3_3\0", re.DOTALL)  # five integers, then the name of the first variable
STAMP = re.compile(r"FSL|\d+(\.\d+)+:[0-9a-f]+")  # "FSL5.0", "6.0.5:9e026117": what FSL leaves in headers
CHECKED = 100_000  # points at which an inverse is tried


@dataclass(frozen=True, eq=False)
class Transform:
    """What a file held.

    Attributes
    ----------
    chain : Chain
        Points of the fixed image to points of the moving image.
    moving : Grid or None
        Of the moving image, where it is known.
    description : str
        What the file was taken for, as a sentence.
    """

    chain: Chain
    moving: Grid | None
    description: str

    @property
    def grid(self) -> Grid | None:
        """Of the first displacement field, if there is one."""
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
    """Read a warp or a linear transform, and write it for another program.

    Parameters
    ----------
    source_file, out : Path
        What `out` becomes is told by its name: `.h5` an ITK composite, `.nii` and `.nii.gz` a displacement field,
        `.mat`, `.txt` and `.tfm` a linear transform of ITK.
    affine : Path, optional
        A linear transform that follows: x -> affine(warp(x)), as in ANTs' `-t warp -t affine`.
    invert : bool
        Write the inverse. It lies on the grid of `source` where that is known, and else on the warp's own.
    source : Path, optional
        The image that the warp brings over; needed for FSL's warps, and to write FreeSurfer's.
    reference : Path, optional
        The image that the warp brings it onto; without `invert`, the result lies on its grid.
    kind : str, optional
        One of `KINDS`, for images of vectors that do not say what they are.
    to : str
        "itk" or "freesurfer": what a NIfTI file shall be.

    Returns
    -------
    list of str
        Sentences: what was read, what was written, and how good an inverse is.

    Raises
    ------
    InputError
        If a file cannot be used, or does not say enough.
    SettingsError
        If `out` cannot hold what is asked for.
    """
    source_file, out = Path(source_file), Path(out)
    _check_names(source_file, out, to)
    fixed, moving = (None if image is None else _image_grid(image) for image in (reference, source))
    found = read_transform(source_file, kind, moving, fixed)
    said = [f"Read {source_file}: {found.description}"]
    chain, moving = found.chain, moving or found.moving
    if affine is not None:
        chain = Chain((*chain.steps, *_only_linear(affine, moving, fixed)), chain.source, chain.target)
        moving = None if source is None else moving  # the file knew the image before this step
    fixed = fixed or found.grid
    if invert:
        chain, sentence = _inverted(chain, moving or fixed)
        said.append(sentence)
        if moving is None and fixed is not None:
            said.append("The inverse lies on the warp's own grid; name the image it starts from with --source.")
        fixed, moving = moving or fixed, fixed
    elif reference is not None and found.grid is not None and fixed is not None and not fixed.matches(found.grid):
        chain = _single(chain, fixed)
    _write(out, chain, fixed, moving, to)
    return [*said, f"Wrote {out}: {_contents(chain, out)}."]


def read_transform(
    path: Path, kind: str | None = None, moving: Grid | None = None, fixed: Grid | None = None
) -> Transform:
    """A warp or a linear transform of any of the formats that are known.

    Parameters
    ----------
    path : Path
    kind : str, optional
        One of `KINDS`, where the file is an image of vectors and does not say what it is.
    moving, fixed : Grid, optional
        Of the two images, for formats that do not keep them.

    Returns
    -------
    Transform

    Raises
    ------
    InputError
        If the file is none of them, or does not say enough.
    """
    start = _start(path)
    names = ("source", "target")
    if start[:4] == b"\x89HDF":
        chain = itk.read_composite_h5(path, *names)
        return Transform(chain, None, f"ITK transform of {len(chain.steps)} step(s).")
    if start[:8] == b"#Insight" or MATLAB.match(start):
        step = itk.read_affine(path, *names)
        return Transform(Chain((step,), *names), None, "linear transform of ITK.")
    if start[:4] in (b"\x5c\1\0\0", b"\0\0\1\x5c", b"\x1c\2\0\0", b"\0\0\2\x1c"):
        return _read_nifti(path, kind, moving, fixed)
    if freesurfer.is_mgh(path):
        return _freesurfer(freesurfer.read_warp(path, LAYOUTS.get(kind or ""), moving), False)
    if start[:4] == b"\x3f\x80\0\0":
        raise InputError(
            f"{path}: an .m3z morph, which is not read; mri_warp_convert --inm3z {path.name} --outras warp.nii.gz, "
            "then convert that"
        )
    if re.search(rb"^\s*nxforms\s*=", start, re.MULTILINE):
        step = freesurfer.read_lta(path, *names)
        return Transform(Chain((step,), *names), None, "linear transform of FreeSurfer (.lta).")
    raise InputError(f"{path}: {_unknown(start)}")


def _read_nifti(path: Path, kind: str | None, moving: Grid | None, fixed: Grid | None) -> Transform:
    image = read_vectors(path, fixed)
    chosen = kind or _kind(image)
    if chosen in LAYOUTS:
        return _freesurfer(
            freesurfer.warp_of(image, LAYOUTS.get(kind or ""), moving), kind is None and not image.intent
        )
    if chosen == "fsl" or chosen == "fsl-absolute":
        field = fsl.warp_of(image, moving, fixed, None if kind is None else kind == "fsl-absolute")
        return Transform(_chain(field), moving, "warp field of FSL.")
    field = itk.displacement_of(image)
    if kind is None and absolute_or_displacement(field.data.numpy(), _places(field.grid)) == "absolute":
        raise InputError(
            f"{path}: marked as a vector of ITK, but the values grow like coordinates, not like displacements; "
            "say what it is with --kind"
        )
    return Transform(_chain(field), moving, "displacement field of ITK, LPS.")


def _kind(image: VectorImage) -> str:
    if image.intent == itk.NIFTI_INTENT:
        return "itk"
    if image.intent == freesurfer.INTENT or image.extension:
        return "freesurfer"
    if image.intent == fsl.FIELD or image.intent in fsl.COEFFICIENTS:
        return "fsl"
    if image.intent == 0 and image.axes == 4 and not STAMP.match(image.description):
        return "freesurfer"
    by = f"header says {image.description!r}" if image.description else "no word of who made it"
    raise InputError(
        f"{image.path}: three numbers per voxel, intent {image.intent}, {by}: displacements of ITK (LPS), "
        f"FreeSurfer (RAS) and FSL (its own frame) look alike; say which it is with --kind {{{','.join(KINDS)}}}"
    )


def _freesurfer(found: freesurfer.FreeSurferWarp, unmarked: bool) -> Transform:
    said = f"warp of FreeSurfer, {WORDS[found.layout]}."
    if unmarked:
        said += " The file does not say who made it; if it was FSL, add --kind fsl."
    return Transform(_chain(found.field), found.moving, said)


WORDS = {
    "displacement": "RAS displacements",
    "absolute": "RAS coordinates",
    "voxel-displacement": "displacements in voxels",
    "voxel-absolute": "voxel coordinates",
}


def _chain(field: DisplacementField) -> Chain:
    return Chain((field,), "source", "target")


def _only_linear(path: Path, moving: Grid | None, fixed: Grid | None) -> tuple[Affine, ...]:
    steps = read_transform(path, None, moving, fixed).chain.steps
    linear = tuple(step for step in steps if isinstance(step, Affine))
    if len(linear) != len(steps):
        raise InputError(f"{path}: holds a displacement field; --affine wants a linear transform")
    return linear


def _inverted(chain: Chain, grid: Grid | None) -> tuple[Chain, str]:
    """The inverse, and how near forward after inverse comes to where it began."""
    if all(isinstance(step, Affine) for step in chain.steps):
        back = tuple(step.inverse() for step in reversed(chain.steps) if isinstance(step, Affine))
        return Chain(back, chain.target, chain.source), "Inverted exactly."
    if grid is None:
        raise InputError("the inverse needs a grid to lie on; name the image that the warp brings over with --source")
    points = _places(grid).reshape(3, -1).T
    shift = chain_points_back(chain, points) - points
    data = np.ascontiguousarray(shift.T, dtype=np.float32).reshape(3, *grid.shape)
    inverse = Chain((fit_between(DisplacementField(torch.from_numpy(data), grid)),), chain.target, chain.source)
    return inverse, _residual(chain, inverse, grid)


def _residual(forward: Chain, inverse: Chain, grid: Grid) -> str:
    """Tried anywhere between voxels, where an interpolated field is read."""
    start = grid.to_world(np.random.default_rng(0).uniform(0, np.asarray(grid.shape) - 1.0, (CHECKED, 3)))
    there = chain_points(inverse, start)
    covered = np.ones(CHECKED, bool)
    for step in forward.steps:
        if isinstance(step, DisplacementField):
            voxels = step.grid.to_voxels(chain_points(Chain(forward.steps[: forward.steps.index(step)], "", ""), there))
            covered &= ((voxels >= 0) & (voxels <= np.asarray(step.grid.shape) - 1)).all(axis=1)
    if not covered.any():
        raise InputError("the warp does not reach the image named with --source; is it the one that the warp moves?")
    error = np.linalg.norm(chain_points(forward, there) - start, axis=1)[covered]
    return (
        f"Inverted: forward after inverse is off by {error.mean():.4f} mm on average, "
        f"{np.quantile(error, 0.999):.3f} mm at 99.9 % and {error.max():.3f} mm at worst of {CHECKED} points, over the "
        f"{covered.mean():.0%} of the grid that the warp covers."
    )


def _single(chain: Chain, grid: Grid) -> Chain:
    """All steps as one displacement field on a grid."""
    return Chain((DisplacementField(chain_displacement(chain, grid), grid),), chain.source, chain.target)


def _write(out: Path, chain: Chain, fixed: Grid | None, moving: Grid | None, to: str) -> None:
    if out.suffix == ".h5":
        itk.write_composite_h5(out, chain)
        return
    if out.suffix in LINEAR:
        matrix = np.eye(4)
        for step in chain.steps:
            if not isinstance(step, Affine):
                raise SettingsError(f"{out}: holds linear transforms only, and this one bends; write .h5 or .nii.gz")
            matrix = step.matrix @ matrix
        itk.write_affine(out, Affine(matrix, chain.source, chain.target))
        return
    if fixed is None:
        raise InputError(f"{out}: a displacement field needs a grid; name an image that has it with --reference")
    field = _single(chain, fixed).steps[0]
    if len(chain.steps) == 1 and isinstance(chain.steps[0], DisplacementField) and chain.steps[0].grid.matches(fixed):
        field = chain.steps[0]
    assert isinstance(field, DisplacementField)
    if to == "itk":
        itk.write_displacement_nifti(out, field)
    elif moving is None:
        raise InputError(
            f"{out}: FreeSurfer keeps the geometry of the image that the warp moves; name it with --source"
        )
    else:
        freesurfer.write_warp(out, field, moving)


def _contents(chain: Chain, out: Path) -> str:
    fields = sum(isinstance(step, DisplacementField) for step in chain.steps)
    if out.suffix in LINEAR:
        return "a linear transform"
    if out.suffix != ".h5":
        return "a displacement field"
    return f"{fields} displacement field(s) and {len(chain.steps) - fields} linear transform(s)"


def _check_names(source_file: Path, out: Path, to: str) -> None:
    nifti = out.name.endswith((".nii", ".nii.gz"))
    if not nifti and out.suffix not in (".h5", *LINEAR):
        raise SettingsError(f"{out}: the name must end in .h5, .nii, .nii.gz, .mat, .txt or .tfm")
    if to != "itk" and not nifti:
        raise SettingsError(f"{out}: --to {to} writes NIfTI; the name must end in .nii or .nii.gz")
    if out.exists() and source_file.exists() and out.samefile(source_file):
        raise OutputError(f"{out}: is the input, which is never overwritten; choose another name")


def _image_grid(path: Path) -> Grid:
    """Of an image of any number of axes."""
    if freesurfer.is_mgh(path):
        return freesurfer.mgh_grid(path)
    return grid_of(open_nifti(path), path)


def _places(grid: Grid) -> np.ndarray:
    """World places of the voxels, (3, i, j, k)."""
    return np.moveaxis(grid.to_world(np.moveaxis(np.indices(grid.shape), 0, -1)), -1, 0)


def _start(path: Path) -> bytes:
    """The first bytes, unpacked."""
    try:
        with Path(path).open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path) if packed else Path(path).open("rb") as stream:
            return stream.read(4096)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except (OSError, EOFError, zlib.error) as problem:
        raise InputError(f"{path}: cannot be read ({problem}); copy it again") from None


def _unknown(start: bytes) -> str:
    known = "a warp in NIfTI or .mgz, an .lta, or a transform of ITK (.h5, .mat, .txt, .tfm) was wanted"
    try:
        numbers = [float(word) for word in start.decode("ascii").split()]
    except (UnicodeDecodeError, ValueError):
        return f"of no known kind; {known}"
    if len(numbers) == 16:
        return (
            "16 numbers without a word of their frame, as FLIRT writes them; "
            "c3d_affine_tool -ref REFERENCE -src SOURCE FILE -fsl2ras -oitk affine.txt makes a transform of ITK"
        )
    return f"of no known kind; {known}"
