"""Gradient tables generated from their definitions: Cartesian DSI lattices, random subsets and shells."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dsiprep.errors import GradientError, SettingsError

SCHEMES = ("dsi257", "dsi515", "dsi101", "hasc55", "multishell")
PROTOCOL_SEED = 2008  # the volume order belongs to the protocol and is the same for all subjects


def gradient_table(scheme: str) -> tuple[np.ndarray, np.ndarray]:
    """Generate the b-table of a named scheme.

    - dsi257: half of the Cartesian lattice of radius 5, b up to 7000 s/mm² (Wedeen et al. 2005,
      doi 10.1002/mrm.20642), 13 b=0.
    - dsi515: the whole of that lattice, 26 b=0.
    - dsi101: half of the 203-point lattice, squared radius 13, b up to 4000 (Kuo et al. 2008,
      doi 10.1016/j.neuroimage.2008.01.063), 6 b=0.
    - hasc55: 55 random points of the radius-5 lattice, b up to 5000 (compressed sensing), 6 b=0.
    - multishell: 90 directions at each of b 1000, 2000 and 3000, 18 b=0.

    Returns
    -------
    bvals : ndarray, (n,)
        s/mm².
    bvecs : ndarray, (n, 3)
        Unit vectors; zero at b=0.

    Raises
    ------
    SettingsError
        If the scheme is unknown.
    """
    rng = np.random.default_rng(PROTOCOL_SEED)
    if scheme == "dsi257":
        q, top, n_b0 = half_lattice(25), 7000.0, 13
    elif scheme == "dsi515":
        half = half_lattice(25)
        q, top, n_b0 = np.concatenate([half, -half]), 7000.0, 26
    elif scheme == "dsi101":
        q, top, n_b0 = half_lattice(13), 4000.0, 6
    elif scheme == "hasc55":
        full = half_lattice(25)
        q, top, n_b0 = full[rng.choice(len(full), 55, replace=False)], 5000.0, 6
        q *= rng.choice([-1, 1], (len(q), 1))
    elif scheme == "multishell":
        q, top, n_b0 = _shells(rng), 3000.0, 18
    else:
        raise SettingsError(f"--scheme {scheme}: expected {', '.join(SCHEMES)} or BVAL,BVEC")
    q = q[rng.permutation(len(q))]
    squared = (q**2).sum(1)
    bvals = top * squared / squared.max()
    return with_b0(bvals, q / np.sqrt(squared)[:, None], n_b0)


def load_scheme(scheme: str) -> tuple[np.ndarray, np.ndarray]:
    """b-values (n,) and b-vectors (n, 3) of a named scheme in world RAS+, or of BVAL,BVEC in the frame of the file.

    Raises
    ------
    SettingsError
        If the name is unknown.
    GradientError
        If the files are missing or invalid.
    """
    return read_fsl_table(scheme) if "," in scheme else gradient_table(scheme)


def half_lattice(squared_radius: int) -> np.ndarray:
    """One of each antipodal pair of integer points in a ball, without the origin, (n, 3) float."""
    reach = int(np.sqrt(squared_radius))
    axis = np.arange(-reach, reach + 1)
    points = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    points = points[(points**2).sum(1) <= squared_radius]
    weight = points @ np.array([1, 2 * reach + 1, (2 * reach + 1) ** 2])
    return points[weight > 0].astype(float)


def with_b0(bvals: np.ndarray, bvecs: np.ndarray, n_b0: int) -> tuple[np.ndarray, np.ndarray]:
    """Insert `n_b0` b=0 volumes at even intervals, the first at the start."""
    positions = np.floor(np.arange(n_b0) * (len(bvals) / max(n_b0 - 1, 1))).astype(int)
    positions = np.minimum(positions, len(bvals))
    return np.insert(bvals, positions, 0.0), np.insert(bvecs, positions, 0.0, axis=0)


def read_fsl_table(names: str) -> tuple[np.ndarray, np.ndarray]:
    """Read "BVAL,BVEC": b-values (n,) and b-vectors (n, 3) in the frame of the file (FSL's axes).

    Raises
    ------
    GradientError
        If a file is missing or the counts do not match.
    """
    paths = [Path(name) for name in names.split(",")]
    if len(paths) != 2 or not all(path.is_file() for path in paths):
        raise GradientError(f"--scheme {names}: expected two existing files BVAL,BVEC")
    bvals = np.loadtxt(paths[0], ndmin=1).ravel()
    bvecs = np.loadtxt(paths[1], ndmin=2)
    bvecs = bvecs.T if bvecs.shape[0] == 3 else bvecs
    if bvecs.shape != (len(bvals), 3):
        raise GradientError(f"--scheme {names}: {len(bvals)} b-values but b-vectors of shape {bvecs.shape}")
    norm = np.linalg.norm(bvecs, axis=1, keepdims=True)
    return bvals, np.divide(bvecs, norm, out=np.zeros_like(bvecs), where=norm > 0)


def _shells(rng: np.random.Generator, per_shell: int = 90) -> np.ndarray:
    """Three shells from one golden spiral over the half sphere, (270, 3), with |q|² of 1, 2 and 3."""
    count = 3 * per_shell
    z = (np.arange(count) + 0.5) / count
    angle = np.pi * (1 + np.sqrt(5)) * np.arange(count)
    r = np.sqrt(1 - z**2)
    directions = np.stack([r * np.cos(angle), r * np.sin(angle), z], 1) * rng.choice([-1, 1], (count, 1))
    shell = np.concatenate([rng.permutation(3) for _ in range(per_shell)])
    return directions * np.sqrt(1 + shell)[:, None]
