"""Scaling of a template and of the results of the anatomy stage, for heads that are processed at human size."""

from __future__ import annotations

from dataclasses import replace

from dsiprep.data.results import Anatomy
from dsiprep.data.template import Template
from dsiprep.ops.registration.head_size import scale_affine, scale_chain, scale_volume

__all__ = ["restore_size", "scale_template"]


def scale_template(template: Template, factor: float) -> Template:
    """The template with its world coordinates scaled."""
    return replace(template, brain=scale_volume(template.brain, factor), mask=scale_volume(template.mask, factor))


def restore_size(anatomy: Anatomy, factor: float) -> Anatomy:
    """Undo the scaling by `factor`, and record it in `magnification`."""
    if factor == 1:
        return anatomy
    inverse, forward, back = 1 / factor, anatomy.acpc_to_template, anatomy.template_to_acpc
    return replace(
        anatomy,
        image=scale_volume(anatomy.image, inverse),
        mask=scale_volume(anatomy.mask, inverse),
        template_image=None if anatomy.template_image is None else scale_volume(anatomy.template_image, inverse),
        warped=None if anatomy.warped is None else scale_volume(anatomy.warped, inverse),
        acpc_to_template=None if forward is None else scale_chain(forward, inverse),
        template_to_acpc=None if back is None else scale_chain(back, inverse),
        anat_to_acpc=scale_affine(anatomy.anat_to_acpc, inverse),
        orig_to_anat=tuple(scale_affine(pose, inverse) for pose in anatomy.orig_to_anat),
        labels=None if anatomy.labels is None else scale_volume(anatomy.labels, inverse),
        magnification=factor,
    )
