"""Selection of third-party engines according to the settings. An engine is imported only when it is selected."""

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

__all__ = ["ENGINES", "anatomical_steps", "check_engines", "distortion_step", "engine_fingerprints", "engines_for"]

ENGINES = {name: f"dsiprep.engines.{name}" for name in ("tortoise", "freesurfer", "ants")}


def _engine(name: str) -> ModuleType:
    """Module with `METHODS`, `version`, `check`, and replacements with the signatures of the native functions."""
    return import_module(ENGINES[name])


def _selected_engines(settings: AnatomySettings | DistortionSettings) -> tuple[str, ...]:
    """Names of the engines that the settings of a stage select."""
    names = [settings.engine]
    if isinstance(settings, AnatomySettings):
        names.append({"synthmorph": "freesurfer"}.get(settings.normalizer, settings.normalizer))
    return tuple(name for name in dict.fromkeys(names) if name in ENGINES)


def engines_for(unit: Unit, settings: Settings) -> tuple[str, ...]:
    """Names of the engines that are needed to process a unit."""
    pair = settings.distortion.method != "none" and unit.reversed_pairs()
    structural = unit.structural(settings.anatomy.modality)
    return (
        *(_selected_engines(settings.distortion) if pair else ()),
        *(_selected_engines(settings.anatomy) if structural else ()),
    )


def check_engines(unit: Unit, settings: Settings, device: torch.device) -> None:
    """Check, before processing starts, that the required programs, licences and memory are available.

    Raises
    ------
    EngineError
        If something is missing; the message explains what to do.
    """
    for name in engines_for(unit, settings):
        _engine(name).check(unit, settings, device)


def engine_fingerprints(settings: AnatomySettings | DistortionSettings) -> list[list[object]]:
    """Name, source digest and program version of each engine, for the cache key of a stage's result."""
    return [[name, source_digest(ENGINES[name]), _engine(name).version()] for name in _selected_engines(settings)]


def distortion_step(settings: DistortionSettings, folder: Path | None) -> Callable[..., Distortion]:
    """Function that corrects a blip-up/blip-down pair; `folder` is the work folder of the subject."""
    if settings.engine in ENGINES:
        return partial(_engine(settings.engine).correct_distortion, folder=folder)
    return distortion.correct_distortion


def anatomical_steps(settings: AnatomySettings, folder: Path | None) -> anatomy.ExternalSteps:
    """Third-party replacements for steps of the anatomy stage; `folder` is the work folder of the subject."""
    brain = tissue = normalise = None
    if settings.engine in ENGINES:
        engine = _engine(settings.engine)
        modes = {"robust": settings.synthseg_robust, "parc": settings.synthseg_parc}
        brain, tissue = partial(engine.brain_mask, folder=folder), partial(engine.segment, **modes, folder=folder)
    if settings.normalizer not in ("none", "native"):
        normalise = partial(_engine(_selected_engines(settings)[-1]).normalise, folder=folder)
    return anatomy.ExternalSteps(brain, tissue, normalise)
