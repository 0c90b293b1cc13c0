"""Write derivatives under QSIPrep's names, so that each query of QSIRecon matches exactly one file.

All files of a unit are written to a hidden folder and moved into place at the end, so that a file under its final name
is always complete.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from dsiprep.data.acquisition import Unit
from dsiprep.data.grid import Volume
from dsiprep.data.results import Anatomy, Joined, Preprocessed, Quality, UnitResults, eddy_currents
from dsiprep.data.template import Template
from dsiprep.data.transform import Affine, Chain, DisplacementField
from dsiprep.errors import OutputError
from dsiprep.io import gradients, itk
from dsiprep.io.gradient_deviation import write_deviation, write_poses, write_scanner_warp
from dsiprep.io.lattice_files import write_lattice
from dsiprep.io.moving_field_files import write_moving_field
from dsiprep.io.nifti import ALIGNED, MNI, write_image
from dsiprep.io.provenance import anatomical_uri, anatomy_stem, dataset_description, raw_uris, space_uri
from dsiprep.io.qc_tables import outlier_slices, write_json, write_tables
from dsiprep.io.series_sidecar import acquisition_fields
from dsiprep.io.slice_motion_table import write_slice_motion
from dsiprep.ops.image.displacement_field import chain_displacement
from dsiprep.ops.image.interpolation import sample_linear, voxel_points
from dsiprep.settings import AnatomySettings

BIDSIGNORE = """\
*_xfm.*
*_timeseries.*
*_dwiref.*
*_dwimap.*
*_hmcOptimization.csv
*image_qc.*
*slice_qc.json
*.html
group_*
sub-*/figures
logs/
*_dwi.bval
*_dwi.bvec
*_fslbvecs.txt
*.b
*.b_table.txt
*_dseg.tsv
*_fieldmap.*
"""


def write_root(out: Path, version: str, raw: Path | None = None) -> None:
    """Write dataset_description.json and .bidsignore to the output folder; `raw` is the root of the raw dataset."""
    description = dataset_description(out, version, raw)
    with _staged(out) as stage:
        write_json(stage / "dataset_description.json", description)
        (stage / ".bidsignore").write_text(BIDSIGNORE)


def write_unit(results: UnitResults, out: Path, template: Template | None) -> list[Path]:
    """Write all files of one unit.

    Parameters
    ----------
    results : UnitResults
    out : Path
        Root of the derivatives.
    template : Template or None
        Standard space to which structural images are warped; None skips these images.

    Returns
    -------
    list of Path
        Paths of the written files, relative to `out`.

    Raises
    ------
    OutputError
        If the disk is full or the folder cannot be written.
    """
    settings = results.settings.anatomy
    with _staged(out, results.unit.name) as stage:
        subject = stage / f"sub-{results.unit.subject}"
        session = subject / f"ses-{results.unit.session}" if results.unit.session else subject
        if results.anatomy.modality != "none":
            write_anatomy(results.anatomy, results.unit, stage, settings, template)
        (session / "dwi").mkdir(parents=True, exist_ok=True)
        _write_transforms(results, session)
        write_slice_motion(session / "dwi" / results.unit.name, results)
        write_moving_field(session, results)
        if not results.unit.output:  # otherwise the joined output contains series and tables
            _write_series(results, session / "dwi")
            files = [results.unit.runs[run].image.name for run in results.acquired.dwi.run]
            stem = session / "dwi" / results.unit.name
            write_tables(stem, results.quality, files, [results], results.preprocessed.sources)
        written = {out / path.relative_to(stage) for path in stage.rglob("*") if path.is_file()}
    name, target = results.unit.name, out / session.relative_to(stage)
    _remove_stale(target / "dwi", (f"{name}_space-*", f"{name}_from-*", f"{name}_desc-*", f"{name}_hmc*"), written)
    _remove_stale(target / "fmap", (f"{name}_desc-*",), written)
    if results.anatomy.modality != "none":
        for folder in {subject, session}:
            _remove_stale(out / folder.relative_to(stage) / "anat", ("*_from-*_xfm.*", "*_space-*"), written)
    return sorted(path.relative_to(out) for path in written)


def write_joined(joined: Joined, results: list[UnitResults], out: Path) -> list[Path]:
    """Write the series into which several units were joined, with its tables. Returns and raises as `write_unit`.

    Parameters
    ----------
    joined : Joined
    results : list of UnitResults
        Results of the joined units, in order.
    out : Path
        Root of the derivatives.
    """
    first = results[0]
    relative = Path(f"sub-{first.unit.subject}") / (f"ses-{first.unit.session}" if first.unit.session else "") / "dwi"
    sidecar = {
        "SpatialReference": space_uri(first),
        "SkullStripped": False,
        "Sources": [uri for each in results for uri in raw_uris(each.unit, (run.image for run in each.unit.runs))],
        "ScanGrouping": {"output_name": joined.name, "merge_strategy": joined.merge, "runs": list(joined.members)},
        "Interpolation": joined.preprocessed.interpolation,
    } | acquisition_fields(results, joined.preprocessed.dwi.grid)
    with _staged(out, joined.name) as stage:
        folder = stage / relative
        folder.mkdir(parents=True)
        _write_preprocessed(folder, joined.name, joined.preprocessed, joined.quality, sidecar, joined.model)
        if joined.lattice is not None:
            write_lattice(folder, joined.name, joined.lattice, joined.preprocessed.mask, sidecar)
        write_tables(folder / joined.name, joined.quality, joined.files, results, joined.preprocessed.sources)
        written = {out / path.relative_to(stage) for path in stage.rglob("*") if path.is_file()}
    _remove_stale(out / relative, (f"{joined.name}_space-*",), written)
    return sorted(path.relative_to(out) for path in written)


def _remove_stale(folder: Path, patterns: tuple[str, ...], written: set[Path]) -> None:
    """Remove files of earlier runs with other options, which would make QSIRecon's queries ambiguous."""
    for pattern in patterns:
        for path in folder.glob(pattern):
            if path not in written:
                path.unlink(missing_ok=True)


def write_anatomy_only(
    anatomy: Anatomy, unit: Unit, out: Path, template: Template | None, settings: AnatomySettings
) -> None:
    """Write only the structural files of a unit to the derivatives (`--anat-only`)."""
    with _staged(out, f"{unit.name}-anat") as stage:
        write_anatomy(anatomy, unit, stage, settings, template)


def write_anatomy(
    anatomy: Anatomy, unit: Unit, root: Path, settings: AnatomySettings, template: Template | None
) -> None:
    """Write the structural image with its tissues and transforms, in ACPC space and in template space."""
    stem, reference = anatomy_stem(unit, settings), anatomical_uri(unit, settings, anatomy.modality)
    folder, name = (root / stem).parent, Path(stem).name
    folder.mkdir(parents=True, exist_ok=True)
    images: dict[str, tuple[torch.Tensor, bool]] = {
        f"desc-preproc_{anatomy.modality}": (anatomy.image.data, False),
        "desc-brain_mask": (anatomy.mask.data, True),
    }
    if anatomy.tissue is not None:
        images["dseg"] = (_tissue_labels(anatomy.tissue, anatomy.mask.data), True)
        for label, probability in zip(("CSF", "GM", "WM"), anatomy.tissue, strict=True):
            images[f"label-{label}_probseg"] = (probability, False)
        (folder / f"{name}_dseg.tsv").write_text("index\tname\n1\tGM\n2\tWM\n3\tCSF\n")
    for suffix, (data, discrete) in images.items():
        _write_map(folder / f"{name}_space-ACPC_{suffix}", Volume(data, anatomy.image.grid), discrete, reference)
    if anatomy.labels is not None:
        _write_map(folder / f"{name}_space-ACPC_desc-aseg_dseg", anatomy.labels, True, reference)
    anat_to_acpc = anatomy.anat_to_acpc
    itk.write_affine(folder / f"{name}_from-anat_to-ACPC_mode-image_xfm.mat", anat_to_acpc)
    itk.write_affine(folder / f"{name}_from-ACPC_to-anat_mode-image_xfm.mat", anat_to_acpc.inverse())
    sources = _source_names(unit.structural(anatomy.modality))
    for source, orig_to_anat in zip(sources, anatomy.orig_to_anat, strict=True):
        itk.write_affine(folder / f"{source}_from-orig_to-anat_mode-image_xfm.txt", orig_to_anat)
    if anatomy.acpc_to_template is None or anatomy.template_to_acpc is None:
        return
    space = anatomy.template
    itk.write_composite_h5(folder / f"{name}_from-ACPC_to-{space}_mode-image_xfm.h5", anatomy.acpc_to_template)
    itk.write_composite_h5(folder / f"{name}_from-{space}_to-ACPC_mode-image_xfm.h5", anatomy.template_to_acpc)
    if template is not None:
        grid = template.brain.grid
        displacement = chain_displacement(anatomy.acpc_to_template, grid)
        points = voxel_points(grid, anatomy.image.grid, displacement=displacement)
        for suffix, (data, discrete) in images.items():
            warped = _sample(data, points, discrete)
            code = MNI if space.startswith("MNI") else ALIGNED
            _write_map(folder / f"{name}_space-{space}_{suffix}", Volume(warped, grid), discrete, space, code)


def _source_names(images: tuple[Path, ...]) -> tuple[str, ...]:
    """A name for each structural image: subject and session, as in QSIPrep, or all entities if there are several."""
    stems = [path.name.partition(".")[0].rpartition("_")[0] for path in images]
    if len(stems) > 1:
        return tuple(stems)
    return tuple("_".join(part for part in stem.split("_") if part.startswith(("sub-", "ses-"))) for stem in stems)


def _write_series(results: UnitResults, folder: Path) -> None:
    sidecar = {
        "SpatialReference": space_uri(results),
        "SkullStripped": False,
        "Sources": raw_uris(results.unit, (run.image for run in results.unit.runs)),
        "SamplingScheme": results.acquired.scheme.description,
        "MotionModel": results.motions[0].model,
        "EddyCurrents": "none" if results.motions[0].eddy is None else results.settings.motion.eddy,
        "SlicesReplaced": len(outlier_slices(results.motions)) if results.settings.motion.outliers == "replace" else 0,
        "DistortionCorrection": results.distortion.method if results.distortion else "none",
        "Interpolation": results.preprocessed.interpolation,
        **_nonlinearity_fields(results),
    } | acquisition_fields([results], results.preprocessed.dwi.grid)
    if results.preprocessed.sources:
        sidecar["VolumesMerged"] = results.settings.resample.merge
    model, quality = results.motions[0].model, results.quality
    _write_preprocessed(folder, results.unit.name, results.preprocessed, quality, sidecar, model)
    if results.lattice is not None:
        write_lattice(folder, results.unit.name, results.lattice, results.preprocessed.mask, sidecar)


def _nonlinearity_fields(results: UnitResults) -> dict[str, object]:
    if results.nonlinearity is None:
        return {}
    return {
        "GradientCoefficients": Path(results.settings.nonlinearity.coefficients).name,
        "ScannerGradientCorrection": results.nonlinearity.corrections.series,
        "NonlinearGradientCorrection": True,
    }


def _write_preprocessed(
    folder: Path, owner: str, preprocessed: Preprocessed, quality: Quality, sidecar: dict[str, object], model: str
) -> None:
    """Write a series in ACPC space with its gradient tables, mask and maps."""
    name, dwi, reference = f"{owner}_space-ACPC", preprocessed.dwi, str(sidecar["SpatialReference"])
    stem = folder / f"{name}_desc-preproc_dwi"
    seconds = sidecar.get("RepetitionTime")
    repetition_time = seconds if isinstance(seconds, float) else None
    write_image(_with(stem, ".nii.gz"), dwi.data, dwi.grid, space=ALIGNED, repetition_time=repetition_time)
    write_json(_with(stem, ".json"), sidecar | {"GradientTables": gradients.write_every_frame(stem, dwi)})
    _write_map(folder / f"{name}_dwiref", preprocessed.dwiref, False, reference)
    _write_map(folder / f"{name}_desc-brain_mask", preprocessed.mask, True, reference)
    if preprocessed.deviation is not None:
        fsl = f"{name}_desc-preproc_fslbvecs.txt"
        write_deviation(folder / f"{name}_desc-graddev_dwimap", preprocessed.deviation, dwi.grid, fsl, reference)
    if preprocessed.coverage is not None:
        _write_map(folder / f"{name}_desc-coverage_dwimap", preprocessed.coverage, False, reference)
    kind = "tensor" if "tensor" in model else "3dSHORE"  # the model that stages.quality uses for the CNR
    if quality.cnr is not None:
        _write_map(folder / f"{name}_model-{kind}_stat-cnr_dwimap", quality.cnr, False, reference)
    if quality.tsnr is not None:
        _write_map(folder / f"{name}_stat-tsnr_dwimap", quality.tsnr, False, reference)


def _write_transforms(results: UnitResults, session: Path) -> None:
    name, folder = results.unit.name, session / "dwi"
    transforms = np.empty((len(results.acquired.dwi), 4, 4))
    for motion in results.motions:
        transforms[motion.volumes] = motion.transforms
    itk.write_affine_series(folder / f"{name}_from-orig_to-dwiref_mode-image_desc-hmc_xfm.txt", transforms)
    eddy = eddy_currents(results.motions, len(transforms))
    if eddy is not None:
        itk.write_eddy_series(
            folder / f"{name}_from-orig_to-dwiref_mode-image_desc-eddy_xfm.txt", eddy, results.acquired.dwi.grid
        )
    if results.nonlinearity is not None:
        warp = folder / f"{name}_from-orig_to-scanner_mode-image_desc-gradwarp_xfm.h5"
        write_scanner_warp(warp, results.nonlinearity, results.acquired.dwi.grid)
        write_poses(folder / name, results)
    itk.write_affine(
        folder / f"{name}_from-dwiref_to-ACPC_mode-image_desc-coreg_xfm.txt",
        results.coregistration.dwiref_to_acpc,
    )
    if results.distortion is None:
        return
    distortion = results.distortion
    for blip, pose, field in zip(results.acquired.blips, distortion.poses, distortion.fields, strict=True):
        itk.write_composite_h5(
            folder / f"{name}_from-distorted_to-dwiref_mode-image_desc-sdc{blip.name}_xfm.h5",
            sdc_chain(pose, field, blip.name),
        )
    if distortion.fieldmap_hz is not None:
        (session / "fmap").mkdir(exist_ok=True)
        stem = session / "fmap" / f"{name}_desc-preproc_fieldmap"
        write_image(_with(stem, ".nii.gz"), distortion.fieldmap_hz.data, distortion.fieldmap_hz.grid)
        sources = raw_uris(results.unit, _fieldmap_sources(results.unit, distortion.method))
        write_json(_with(stem, ".json"), {"Units": "Hz", "Sources": sources, "EstimationMethod": distortion.method})


def _fieldmap_sources(unit: Unit, method: str) -> list[Path]:
    """Files from which a unit's fieldmap was estimated."""
    if method == "gre" and unit.gre:
        return list(unit.gre.files())
    return [*(run.image for run in unit.runs), *(epi.image for epi in unit.epis)]


def sdc_chain(pose: np.ndarray, field: DisplacementField, blip: str) -> Chain:
    """The map x -> P x + u(x) as a displacement field followed by an affine, the form in which it is stored."""
    rotated = torch.einsum(
        "ab,bijk->aijk", torch.as_tensor(np.linalg.inv(pose[:3, :3]), dtype=field.data.dtype), field.data
    )
    space = f"distorted-{blip}"
    return Chain((DisplacementField(rotated, field.grid), Affine(pose, space, "dwiref")), space, "dwiref")


def _write_map(stem: Path, volume: Volume, discrete: bool, reference: str, space: int = ALIGNED) -> None:
    write_image(_with(stem, ".nii.gz"), volume.data, volume.grid, discrete=discrete, space=space)
    sidecar: dict[str, object] = {"SpatialReference": reference}
    if "mask" in stem.name:
        sidecar["Type"] = "Brain"
    if "preproc" in stem.name:
        sidecar["SkullStripped"] = False
    write_json(_with(stem, ".json"), sidecar)


def _sample(data: torch.Tensor, points: torch.Tensor, discrete: bool) -> torch.Tensor:
    """Sample an image at voxel coordinates: linearly, or, for labels, by majority of linear weights."""
    if not discrete:
        return sample_linear(data[None].float(), points)[0]
    labels = torch.unique(data)
    votes = torch.stack([(data == label).float() for label in labels])
    return labels[sample_linear(votes, points).argmax(0)]


def _tissue_labels(tissue: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """BIDS tissue labels from CSF, GM and WM probabilities: GM 1, WM 2, CSF 3, 0 outside the mask."""
    return torch.tensor([3.0, 1.0, 2.0])[tissue.argmax(0)] * (mask > 0)


def _with(stem: Path, extension: str) -> Path:
    return stem.parent / (stem.name + extension)


@contextmanager
def _staged(out: Path, owner: str = "") -> Iterator[Path]:
    """Yield a hidden folder in `out`, whose files are moved into place on success.

    The folder of an `owner` (a unit) always has the same name, so that leftovers of a killed run are removed.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        if owner:
            stage = out / f".dsiprep-{owner}"
            shutil.rmtree(stage, ignore_errors=True)
            stage.mkdir()
        else:
            stage = Path(tempfile.mkdtemp(prefix=".dsiprep-", dir=out))
    except OSError as error:
        raise OutputError(f"{out} cannot be written ({error.strerror}); choose another output folder") from error
    try:
        yield stage
        for path in sorted(stage.rglob("*")):
            if path.is_file():
                target = out / path.relative_to(stage)
                target.parent.mkdir(parents=True, exist_ok=True)
                path.replace(target)
    except OSError as error:
        raise OutputError(f"{out}: {error.strerror}; free disk space or choose another output folder") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
