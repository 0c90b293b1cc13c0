"""Which programs the settings ask for, and what they stand in for. Engines are loaded when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch

from dsiprep.data.acquisition import Unit
from dsiprep.data.results import Distortion
from dsiprep.settings import AnatomySettings, DistortionSettings, Settings
from dsiprep.sources import source_digest
from dsiprep.stages import anatomy, distortion

__all__ = ["ENGINES", "anatomical_steps", "check_engines", "distortion_step", "engines_for", "made_by"]

ENGINES = {name: f"dsiprep.engines.{name}" for name in ("tortoise", "freesurfer", "ants")}


def _engine(name: str) -> ModuleType:
    """`METHODS`, `version`, `check`, and functions with the signatures of native ones."""
    return import_module(ENGINES[name])


def _asked(settings: AnatomySettings | DistortionSettings) -> tuple[str, ...]:
    """The engines that the settings of a stage name."""
    names = [settings.engine]
    if isinstance(settings, AnatomySettings):
        names.append({"synthmorph": "freesurfer"}.get(settings.normalizer, settings.normalizer))
    return tuple(name for name in dict.fromkeys(names) if name in ENGINES)


def engines_for(unit: Unit, settings: Settings) -> tuple[str, ...]:
    """The engines that have work to do for a unit, by their names in `ENGINES`."""
    pair = settings.distortion.method != "none" and unit.reversed_pairs()
    structural = unit.structural(settings.anatomy.modality)
    return (*(_asked(settings.distortion) if pair else ()), *(_asked(settings.anatomy) if structural else ()))


def check_engines(unit: Unit, settings: Settings, device: torch.device) -> None:
    """Say before anything long is begun that a program is missing, or its licence, or memory for it.

    Raises
    ------
    EngineError
        With what to do.
    """
    for name in engines_for(unit, settings):
        _engine(name).check(unit, settings, device)


def made_by(settings: AnatomySettings | DistortionSettings) -> list[list[object]]:
    """What the key of a stage's result tells of engines: another version of a program makes another result."""
    return [[name, source_digest(ENGINES[name]), _engine(name).version()] for name in _asked(settings)]


def distortion_step(settings: DistortionSettings, folder: Path | None) -> Callable[..., Distortion]:
    """What corrects a pair of blips; `folder` is that of the subject's work."""
    if settings.engine in ENGINES:
        return partial(_engine(settings.engine).correct_distortion, folder=folder)
    return distortion.correct_distortion


def anatomical_steps(settings: AnatomySettings, folder: Path | None) -> anatomy.Steps:
    """What programs do in place of the stage's own functions; `folder` is that of the subject's work."""
    brain = tissue = normalise = None
    if settings.engine in ENGINES:
        found = _engine(settings.engine)
        modes = {"robust": settings.synthseg_robust, "parc": settings.synthseg_parc}
        brain, tissue = partial(found.brain_mask, folder=folder), partial(found.segment, **modes, folder=folder)
    if settings.normalizer not in ("none", "native"):
        normalise = partial(_engine(_asked(settings)[-1]).normalise, folder=folder)
    return anatomy.Steps(brain, tissue, normalise)
