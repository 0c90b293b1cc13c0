"""Settings of the phantom: every option of `dsiprep-tools phantom`."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from dsiprep.errors import SettingsError
from dsiprep.ops.qspace.fibre_continuity import axis_frames, describe_frame
from dsiprep.option import option

ORIENTATIONS = ("RAS", "LAS", "LPS", "PSR", "oblique")
DEGREES_PER_MM = 1.8
K_SPACE = {"full": 1.0, "7/8": 7 / 8, "6/8": 6 / 8, "5/8": 5 / 8}  # fraction that is sampled
RIGHT_ROWS = "x y z"


@dataclass(frozen=True)
class PhantomSettings:
    """A simulated subject and the artefacts of its scan."""

    scheme: str = option(
        "dsi257",
        "sampling scheme: dsi257, dsi515, dsi101, hasc55, multishell, or two FSL files BVAL,BVEC",
        "--scheme",
        metavar="SCHEME",
    )
    resolution: float = option(2.5, "voxel size of the DWI in mm", "--resolution", metavar="MM")
    t1w_resolution: float = option(1.0, "voxel size of the T1w in mm", "--t1w-resolution", metavar="MM")
    snr: float = option(
        25.0,
        "mean b=0 signal of the brain divided by the noise standard deviation; 0 adds no noise",
        "--snr",
        metavar="RATIO",
    )
    coils: int = option(
        1, "coils whose magnitudes are combined by root sum of squares; 1 gives Rician noise", "--coils", metavar="N"
    )
    noise_variation: float = option(
        0.0,
        "noise in the middle of the head above that at its edge, as a fraction",
        "--noise-variation",
        metavar="FRACTION",
    )
    moved: float = option(
        0.15,
        "fraction of volumes with head motion, in addition to a slow drift",
        "--moved",
        metavar="FRACTION",
    )
    max_motion: float = option(
        5.0,
        "largest translation of a moved volume along each axis in mm; rotations are bounded by 1.8 degrees per mm",
        "--max-motion",
        metavar="MM",
    )
    jitter: float = option(
        0.0,
        "standard deviation of small random translations of each volume along each axis in mm; 1.8 degrees per mm for "
        "rotations",
        "--jitter",
        metavar="MM",
    )
    moved_within: float = option(
        0.0,
        "fraction of volumes during which the head moves by 3 to 9 mm and degrees, to rest there until the next",
        "--moved-within",
        metavar="FRACTION",
    )
    steady: float = option(
        0.0, "mean displacement of the brain per volume by steady motion, in mm", "--steady", metavar="MM"
    )
    distortion: float = option(
        5.0,
        "largest displacement of brain signal by the off-resonance field, in mm",
        "--distortion",
        metavar="MM",
    )
    moving_field: float = option(
        0.0,
        "change of the field as the head tilts: the displacement in mm that 6 degrees of pitch or roll exceed in 5 % "
        "of the brain",
        "--moving-field",
        metavar="MM",
    )
    eddy: float = option(0.0, "largest displacement of brain signal by eddy currents, in mm", "--eddy", metavar="MM")
    eddy_constant: float = option(
        0.0,
        "largest shift of the whole image by eddy currents, in mm, in addition to --eddy",
        "--eddy-constant",
        metavar="MM",
    )
    drift: float = option(
        0.0,
        "shift of the image over the series as the centre frequency drifts, in mm",
        "--drift",
        metavar="MM",
    )
    gradient_nonlinearity: float = option(
        0.0,
        "largest displacement of the brain by nonlinear gradients, in mm, in the series and in the T1w; the "
        "coefficients are written beside the dataset",
        "--gradient-nonlinearity",
        metavar="MM",
    )
    signal_drift: float = option(
        0.0, "fraction of the signal that is lost over the series", "--signal-drift", metavar="FRACTION"
    )
    dropout: float = option(
        0.0,
        "fraction of slices of diffusion-weighted volumes with signal dropout",
        "--dropout",
        metavar="FRACTION",
    )
    k_space: str = option(
        "",
        "sample k-space, so that images ring: full, or partial Fourier 5/8, 6/8 or 7/8 along the phase-encoding axis; "
        "by default a voxel is the mean of what it contains",
        "--k-space",
        choices=("", *K_SPACE),
    )
    complex: bool = option(
        False, "write the DWI as magnitude and phase; k-space is sampled fully unless --k-space is given", "--complex"
    )
    orientation: str = option(
        "LAS", "voxel axes of the DWI; oblique is LAS, tilted", "--orientation", choices=ORIENTATIONS
    )
    bvec_rows: str = option(
        RIGHT_ROWS,
        "rows that are written to the .bvec, in terms of the right ones: '-x y z' or 'x z y', for a wrong table",
        "--bvec-rows",
        metavar="ROWS",
    )
    reversed_bvals: bool = option(False, "write the b-values in reversed order, for a wrong table", "--reversed-bvals")
    ideal: bool = option(True, "do not write the ideal DWI (halves the run time)", "--no-ideal")
    seed: int = option(1, "seed of the random anatomy, motion and noise", "--seed", metavar="N")

    @property
    def sampled_fraction(self) -> float:
        """Part of k-space that is sampled; 0 if images are not made from k-space."""
        return K_SPACE[self.k_space] if self.k_space else float(self.complex)

    def described(self) -> dict[str, object]:
        """Settings by name, without effects that are not there."""
        absent = {"eddy_constant": 0, "drift": 0, "coils": 1, "noise_variation": 0, "signal_drift": 0, "k_space": ""}
        absent |= {"moved_within": 0, "steady": 0, "gradient_nonlinearity": 0, "moving_field": 0}
        absent |= {"complex": False, "reversed_bvals": False, "bvec_rows": RIGHT_ROWS}
        return {name: value for name, value in asdict(self).items() if absent.get(name) != value}

    def check(self) -> None:
        """Raise a SettingsError for values out of range."""
        if not 0.5 <= self.resolution <= 10 or not 0.5 <= self.t1w_resolution <= 4:
            raise SettingsError("voxel sizes of the phantom must be 0.5 to 10 mm (DWI) and 0.5 to 4 mm (T1w)")
        if self.sampled_fraction and (self.coils > 1 or self.noise_variation):
            raise SettingsError(
                "noise of images from k-space is that of one coil, the same everywhere: leave out "
                "--coils and --noise-variation, or --k-space and --complex"
            )
        if self.coils < 1:
            raise SettingsError(f"--coils {self.coils}: expected at least 1")
        for name in ("moved", "moved_within", "dropout", "signal_drift"):
            if not 0 <= getattr(self, name) <= 1:
                raise SettingsError(
                    f"--{name.replace('_', '-')} {getattr(self, name)}: expected a fraction between 0 and 1"
                )
        amounts = ("snr", "noise_variation", "max_motion", "jitter", "steady", "distortion", "eddy", "eddy_constant")
        for name in (*amounts, "drift", "gradient_nonlinearity", "moving_field"):
            if getattr(self, name) < 0:
                raise SettingsError(f"--{name.replace('_', '-')} {getattr(self, name)}: must not be negative")
        if self.bvec_rows not in map(describe_frame, axis_frames()):
            raise SettingsError(f"--bvec-rows {self.bvec_rows}: expected x, y and z once each, at most one negated")
        if self.orientation not in ORIENTATIONS:
            raise SettingsError(f"--orientation {self.orientation}: expected one of {', '.join(ORIENTATIONS)}")


def demo_settings() -> PhantomSettings:
    """A small subject with motion, distortion and signal dropout, simulated in well under a minute."""
    return PhantomSettings(
        scheme="hasc55", resolution=3.0, t1w_resolution=1.5, moved=0.3, dropout=0.005, ideal=False, seed=7
    )
