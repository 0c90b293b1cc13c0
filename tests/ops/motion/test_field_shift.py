"""Shifts along the phase encoding: what is the field's and what the head's, by the size and company of each."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dsiprep.ops.motion.field_shift import HeadMovements, field_shifts, resting_steps
from helpers.motion_subject import directions

COUNT, JITTER = 60, 0.1
RUN = np.zeros(COUNT + 5, int)
B0 = np.arange(COUNT + 5) % 13 == 0


def _gradients() -> np.ndarray:
    q = np.zeros((len(B0), 3))
    q[~B0] = directions(COUNT + 5)[: (~B0).sum()]
    return q


def _head(rng: np.random.Generator, moved: np.ndarray) -> tuple[np.ndarray, HeadMovements]:
    """Path (mm) of a restless head along the phase encoding, with jumps in the volumes `moved`, and the other axes."""
    jumps = rng.uniform(1, 4, (len(B0), 4)) * rng.choice([-1, 1], (len(B0), 4)) * moved[:, None]
    movements = JITTER * rng.normal(size=(len(B0), 4)) + jumps
    return movements[:, 0], HeadMovements(movements[:, 1:] / JITTER, JITTER, 0.1, np.zeros((len(B0), 0)))


def _earlier(q: np.ndarray) -> np.ndarray:
    return np.vstack([np.zeros((1, 3)), q[:-1]])


@pytest.mark.parametrize("cause", ["gradient", "earlier gradient", "even function", "drift"])
def test_fields_are_told_from_a_head_that_moves(cause: str) -> None:
    """A third of the volumes moved; without the model, all of the field would be taken for motion."""
    rng, q = np.random.default_rng(2), _gradients()
    head, movements = _head(rng, (rng.random(len(B0)) < 0.3) & ~B0)
    field = {
        "gradient": q @ [2.0, -1.0, 1.5],
        "earlier gradient": _earlier(q) @ [2.0, -1.0, 1.5],
        "even function": 3 * q[:, 0] ** 2 + (~B0),
        "drift": np.linspace(0, 3, len(B0)),
    }[cause]
    field = field - np.median(field[B0])
    found = field_shifts(head + field, movements, q, RUN, even=True)
    assert field.std() > 0.8
    assert np.sqrt(np.mean((found - field) ** 2)) < 2 * JITTER


def test_fluctuations_that_a_resting_head_does_not_share_are_the_fields() -> None:
    rng, q = np.random.default_rng(3), _gradients()
    head, movements = _head(rng, np.zeros(len(B0), bool))
    field = rng.normal(0, 0.8, len(B0))
    field -= np.median(field[B0])
    found = field_shifts(head + field, movements, q, RUN, even=True)
    assert np.std(found - field) < 1.5 * JITTER


@pytest.mark.parametrize("moved", [0.0, 0.3])
def test_a_head_without_fields_keeps_its_movements(moved: float) -> None:
    rng, q = np.random.default_rng(4), _gradients()
    head, movements = _head(rng, rng.random(len(B0)) < moved)
    found = field_shifts(head, movements, q, RUN, even=True)
    assert np.sqrt(np.mean(found**2)) < 0.5 * JITTER


def test_a_movement_along_the_phase_encoding_alone_is_the_heads() -> None:
    rng, q = np.random.default_rng(5), _gradients()
    head, movements = _head(rng, np.zeros(len(B0), bool))
    head[20] += 3
    assert abs(field_shifts(head, movements, q, RUN, even=True)[20]) < 0.3


def test_even_functions_are_left_to_the_poses_between_rounds() -> None:
    rng, q = np.random.default_rng(6), _gradients()
    head, movements = _head(rng, np.zeros(len(B0), bool))
    field = 3 * q[:, 0] ** 2 + (~B0)
    found = field_shifts(head + field, movements, q, RUN, even=False)
    assert np.std(found) < 0.3 * np.std(field)


def _resting(rng: np.random.Generator) -> tuple[np.ndarray, HeadMovements]:
    """A head that changes its place of rest every seven volumes, along the phase encoding and the other axes."""
    places = np.cumsum(rng.uniform(0.5, 2, (20, 4)) * rng.choice([-1, 1], (20, 4)), 0)[np.arange(len(B0)) // 7]
    scatter = JITTER * rng.normal(size=(len(B0), 4))
    steps = resting_steps((places + scatter)[:, 1:3], RUN)
    return (places + scatter)[:, 0], HeadMovements(scatter[:, 1:] / JITTER, JITTER, 0.3, steps)


def test_a_head_that_changes_its_place_of_rest_is_not_taken_for_drift_of_the_field() -> None:
    rng, q = np.random.default_rng(7), _gradients()
    head, movements = _resting(rng)
    found = field_shifts(head, movements, q, RUN, even=True)
    assert np.std(head) > 1
    assert np.sqrt(np.mean(found**2)) < 0.2
    without = replace(movements, steps=movements.steps[:, :0])
    assert np.sqrt(np.mean(field_shifts(head, without, q, RUN, even=True) ** 2)) > 1


def test_steps_are_found_where_the_head_changes_its_place() -> None:
    _, movements = _resting(np.random.default_rng(8))
    first, true = np.argmax(movements.steps > 0, axis=0), np.arange(7, len(B0) - 3, 7)
    assert len(first) == len(true)
    assert np.abs(first - true).max() <= 1
    assert resting_steps(JITTER * np.random.default_rng(9).normal(size=(len(B0), 2)), RUN).shape[1] == 0
