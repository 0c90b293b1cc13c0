"""Small BIDS datasets for tests, written file by file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from dsiprep.data.acquisition import Unit
from dsiprep.io.bids import find_units
from dsiprep.settings import Settings

SETTINGS = Settings()
AP = {"PhaseEncodingDirection": "j-", "TotalReadoutTime": 0.05}
PA = {"PhaseEncodingDirection": "j", "TotalReadoutTime": 0.05}
LAS = np.array([[-2.0, 0, 0, 5], [0, 2, 0, -5], [0, 0, 2, 1], [0, 0, 0, 1]])


class Dataset:
    """A tiny BIDS dataset with images of `shape`, written file by file."""

    def __init__(self, root: Path, shape: tuple[int, int, int] = (4, 5, 3)) -> None:
        self.root = root
        self.shape = shape
        self.json(root / "dataset_description.json", {"Name": "tiny", "BIDSVersion": "1.10.0"})

    def json(self, path: Path, content: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))

    def image(self, name: str, volumes: int, sidecar: dict[str, Any] | None, affine: np.ndarray = LAS) -> Path:
        parts = name.split("_")
        kind = {"dwi": "dwi", "T1w": "anat", "T2w": "anat"}.get(parts[-1], "fmap")
        folder = self.root.joinpath(*[p for p in parts if p.startswith(("sub-", "ses-"))], kind)
        folder.mkdir(parents=True, exist_ok=True)
        shape = (*self.shape, volumes) if volumes > 1 else self.shape
        largest = 4095 if "phase" in parts[-1] else 99  # phases as Siemens stores them
        data = np.random.default_rng(0).integers(1, largest, shape, endpoint=True).astype(np.int16)
        path = folder / f"{name}.nii.gz"
        nib.Nifti1Image(data, affine).to_filename(path)
        if sidecar is not None:
            self.json(folder / f"{name}.json", sidecar)
        return path

    def dwi(self, name: str, sidecar: dict[str, Any], volumes: int = 20, affine: np.ndarray = LAS) -> Path:
        path = self.image(f"{name}_dwi", volumes, sidecar, affine)
        bvecs = np.random.default_rng(1).normal(size=(volumes, 3))
        bvecs /= np.linalg.norm(bvecs, axis=1, keepdims=True)
        bvecs[0] = 0
        np.savetxt(path.parent / f"{name}_dwi.bval", np.r_[0, np.full(volumes - 1, 1000)][None], fmt="%d")
        np.savetxt(path.parent / f"{name}_dwi.bvec", bvecs.T, fmt="%.6f")
        return path

    def units(self, **options: Any) -> list[Unit]:
        return find_units(self.root, SETTINGS, **options)

    def unit(self, **options: Any) -> Unit:
        """The only unit of the dataset."""
        units = self.units(**options)
        assert len(units) == 1, [unit.name for unit in units]
        return units[0]


def has_note(unit: Unit, *words: str) -> bool:
    """Whether one note contains all the words."""
    return any(all(word in note for word in words) for note in unit.notes)
