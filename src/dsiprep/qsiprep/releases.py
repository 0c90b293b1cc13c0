"""What is known of QSIPrep's releases: where an image keeps the package, and how its options are called."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dsiprep.errors import SettingsError

# Read for this module, and read again by tests/test_qsiprep.py.
CHECKED = ("0.23.0", "0.24.0", "1.0.0", "1.0.1", "1.0.2", "1.1.0", "1.1.1", "26.0.0", "26.1.0", "26.1.1")
OLDEST = (0, 23, 0)


@dataclass(frozen=True)
class Release:
    """One release of QSIPrep.

    Attributes
    ----------
    version : str
        As PyPI and Docker Hub write it: "1.0.1".
    numbers : tuple of int
        Major, minor, patch.
    """

    version: str
    numbers: tuple[int, int, int]

    @classmethod
    def of(cls, version: str) -> Release:
        """From "1.0.1"; raises SettingsError for what is no release, or older than 0.23.0."""
        found = re.fullmatch(r"v?(\d+)\.(\d+)\.(\d+)((?:rc|\.post)\d+)?", version.strip())
        if not found:
            raise SettingsError(f"--version {version}: a release of QSIPrep is wanted, such as {CHECKED[-1]} or 1.0.1")
        numbers = (int(found[1]), int(found[2]), int(found[3]))
        if numbers < OLDEST:
            raise SettingsError(
                f"--version {version}: the options and images of QSIPrep are known from {CHECKED[0]} on; use that or "
                f"a later release"
            )
        return cls(version.strip().removeprefix("v"), numbers)

    @property
    def checked(self) -> bool:
        """Whether this very release was read; others are taken to be as the last one before them."""
        return self.version in CHECKED

    @property
    def image(self) -> str:
        """Its image on Docker Hub. Releases were pushed to `pennbbl` up to 0.24.0 (.circleci/config.yml)."""
        return f"{'pennlinc' if self.numbers >= (1, 0, 0) else 'pennbbl'}/qsiprep:{self.version}"

    @property
    def custom(self) -> str:
        """What `dsiprep-tools qsiprep-image` names the image with other commands."""
        return f"qsiprep:{self.version}-gpu"

    @property
    def environment(self) -> str:
        """Where the image keeps the Python environment: the folder above that of the ENTRYPOINT (Dockerfile)."""
        return "/app/.pixi/envs/qsiprep" if self.numbers >= (26, 0, 0) else "/opt/conda/envs/qsiprep"

    @property
    def site_packages(self) -> str:
        """Where the image keeps the package.

        Python is 3.10 in qsiprep_build's qsiprep_env.yml (up to 1.1.1) and in the pixi.lock of 26.0.0, and 3.11 in that
        of 26.1.
        """
        return f"{self.environment}/lib/python{'3.11' if self.numbers >= (26, 1, 0) else '3.10'}/site-packages"

    @property
    def has_methods(self) -> bool:
        """Whether methods are chosen by `--hmc-method` and `--sdc-method`, and GPU tasks by `--gpu` (26.1.0 on)."""
        return self.numbers >= (26, 1, 0)

    @property
    def session_option(self) -> str | None:
        """The option that chooses sessions."""
        if self.numbers < (0, 24, 0):
            return None
        return "--session-label" if self.has_methods else "--session-id"

    @property
    def takes_license(self) -> bool:
        """Whether there is `--fs-license-file`; 26.1 needs no licence of FreeSurfer."""
        return not self.has_methods

    @property
    def eddy_cuda(self) -> tuple[str, str]:
        """What the interface calls for eddy on a GPU, and what the image has.

        26.0.0 calls `eddy_cuda10.2` (interfaces/eddy.py), but its pixi.lock has fsl-eddy-cuda-11.0 alone.
        """
        return ("eddy_cuda10.2", "eddy_cuda11.0" if self.numbers[:2] == (26, 0) else "eddy_cuda10.2")
