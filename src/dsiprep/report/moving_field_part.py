"""What the report says about a field that changes with the head: both derivative fields, and what they explained."""

from __future__ import annotations

import numpy as np

from dsiprep.data.grid import Volume
from dsiprep.data.results import UnitResults
from dsiprep.report import slice_figures
from dsiprep.report.page_parts import Fact, FigureWriter, Picture

__all__ = ["moving_field_facts", "moving_field_pictures"]


def moving_field_pictures(results: UnitResults, figures: FigureWriter) -> tuple[Picture, ...]:
    """Maps of the change per degree of pitch and of roll; none where the field moves rigidly."""
    moving = results.moving_field
    values, unit = (None, "") if moving is None else moving.per_degree()
    if moving is None or values is None:
        return ()
    mask = results.motions[0].mask
    pictures: tuple[Picture, ...] = ()
    for name, field in zip(("pitch", "roll"), values, strict=True):
        pictures += figures.single(
            f"moving{name.capitalize()}",
            slice_figures.signed_map(Volume(field, moving.grid), mask, unit),
            f"Map of the change of the off-resonance field with {name}.",
            f"Change of the off-resonance field with {name}, in {unit}.",
            "It should be smooth and largest near air: the sinuses, the ear canals and the base of the brain.",
        )
    return pictures


def moving_field_facts(results: UnitResults) -> tuple[Fact, ...]:
    """Whether the field changes with the head, by how much, and what that explained; none if it was not asked for."""
    moving = results.moving_field
    if moving is None:
        return ()
    tilt = np.linalg.norm(moving.tilts, axis=1)
    facts = [
        Fact("Change of the field with the head", moving.reason),
        Fact("Pitch and roll", f"at most {tilt.max():.1f} degrees", "from the pose to which the distortion belongs"),
    ]
    if moving.residuals:
        before, after = (100 * value for value in moving.residuals)
        facts.append(
            Fact(
                "Gain by the moving field",
                f"residuals of turned volumes {before:.2f} % before, {after:.2f} % after",
                "mean difference between volumes and their predictions, relative to the signal",
            )
        )
    return tuple(facts)
