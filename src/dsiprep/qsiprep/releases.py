"""Differences between the releases of QSIPrep: package location in the image, and names of options."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dsiprep.errors import SettingsError

# Releases that this module describes; tests/qsiprep checks it against their wheels.
CHECKED_RELEASES = ("0.23.0", "0.24.0", "1.0.0", "1.0.1", "1.0.2", "1.1.0", "1.1.1", "26.0.0", "26.1.0", "26.1.1")
OLDEST = (0, 23, 0)


@dataclass(frozen=True)
class Release:
    """One release of QSIPrep.

    Attributes
    ----------
    version : str
        Version on PyPI and Docker Hub, such as "1.0.1".
    numbers : tuple of int
        Major, minor, patch.
    """

    version: str
    numbers: tuple[int, int, int]

    @classmethod
    def of(cls, version: str) -> Release:
        """Parse a version such as "1.0.1"; raise SettingsError if it is no release or is older than 0.23.0."""
        match = re.fullmatch(r"v?(\d+)\.(\d+)\.(\d+)((?:rc|\.post)\d+)?", version.strip())
        if not match:
            raise SettingsError(
                f"--version {version}: not a QSIPrep release; give one such as {CHECKED_RELEASES[-1]} or 1.0.1"
            )
        numbers = (int(match[1]), int(match[2]), int(match[3]))
        if numbers < OLDEST:
            raise SettingsError(
                f"--version {version}: QSIPrep releases before {CHECKED_RELEASES[0]} are not supported; use a later one"
            )
        return cls(version.strip().removeprefix("v"), numbers)

    @property
    def checked(self) -> bool:
        """Whether the release has been checked; any other is treated like the last one before it."""
        return self.version in CHECKED_RELEASES

    @property
    def image(self) -> str:
        """Image on Docker Hub; up to 0.24.0 the organisation was `pennbbl` (.circleci/config.yml)."""
        return f"{'pennlinc' if self.numbers >= (1, 0, 0) else 'pennbbl'}/qsiprep:{self.version}"

    @property
    def gpu_image(self) -> str:
        """Name of the image that `dsiprep-tools qsiprep-image` builds."""
        return f"qsiprep:{self.version}-gpu"

    @property
    def environment(self) -> str:
        """Python environment in the image: the parent of the folder of the ENTRYPOINT (Dockerfile)."""
        return "/app/.pixi/envs/qsiprep" if self.numbers >= (26, 0, 0) else "/opt/conda/envs/qsiprep"

    @property
    def site_packages(self) -> str:
        """site-packages folder in the image.

        Python is 3.10 in qsiprep_build's qsiprep_env.yml (up to 1.1.1) and in the pixi.lock of 26.0.0, and 3.11 in that
        of 26.1.
        """
        return f"{self.environment}/lib/python{'3.11' if self.numbers >= (26, 1, 0) else '3.10'}/site-packages"

    @property
    def has_method_options(self) -> bool:
        """Whether the release has `--hmc-method`, `--sdc-method` and `--gpu` (26.1.0 and later)."""
        return self.numbers >= (26, 1, 0)

    @property
    def session_option(self) -> str | None:
        """The option that selects sessions, or None."""
        if self.numbers < (0, 24, 0):
            return None
        return "--session-label" if self.has_method_options else "--session-id"

    @property
    def has_license_option(self) -> bool:
        """Whether the release has `--fs-license-file`; 26.1 needs no FreeSurfer licence."""
        return not self.has_method_options

    @property
    def eddy_cuda_commands(self) -> tuple[str, str]:
        """Command that the interface calls for eddy on a GPU, and the command available in the image.

        26.0.0 calls `eddy_cuda10.2` (interfaces/eddy.py), but its pixi.lock contains only fsl-eddy-cuda-11.0.
        """
        return ("eddy_cuda10.2", "eddy_cuda11.0" if self.numbers[:2] == (26, 0) else "eddy_cuda10.2")
