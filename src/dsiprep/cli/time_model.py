"""How much of a run is done and how long the rest takes: expected times by step, corrected as steps end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

PRIOR_SECONDS = 10.0  # of expected time that count as evidence that the model is right
OVERRUN = 0.1  # of the time so far that a step which takes longer than expected is given


def step_of(name: str) -> str:
    """The step that a stage of the pipeline belongs to: "motion" for "motion-up"."""
    return name.split("-")[0].split("_")[0]


@dataclass
class TimeModel:
    """Progress of one unit.

    Attributes
    ----------
    expected : mapping
        Seconds of each step, in order.
    pace : float
        Factor by which steps take longer than expected, learned from other units before this one starts.
    """

    expected: Mapping[str, float]
    pace: float = 1.0
    step: str = ""
    _started: float = 0.0
    _measured: dict[str, float] = field(default_factory=dict)
    _ended: bool = False

    def begin(self, name: str, now: float) -> None:
        """A stage begins, so that the one before has ended; skipped steps were found in the work folder.

        The report of a subject begins after its last unit has ended.
        """
        step = step_of(name)
        if step not in self.expected or step == self.step:
            return
        self._close(now)
        self._ended = False
        self.step, self._started = step, now

    def end(self, now: float) -> None:
        """The unit has ended."""
        self._close(now)
        self.step, self._ended = "", True

    def _close(self, now: float) -> None:
        if self.step:
            self._measured[self.step] = self._measured.get(self.step, 0.0) + now - self._started

    @property
    def learned_pace(self) -> float:
        """Geometric mean of measured over expected time of the steps that have ended, weighted by expected time.

        The pace so far takes part as a step of `PRIOR_SECONDS`. A short step that compiles or loads much thus counts
        little, however long it takes.
        """
        weight, total = PRIOR_SECONDS, PRIOR_SECONDS * math.log(self.pace)
        for step, measured in self._measured.items():
            weight += self.expected[step]
            total += self.expected[step] * math.log(max(measured, 1e-3) / max(self.expected[step], 1e-3))
        return math.exp(total / weight)

    def seconds_left(self, now: float) -> float:
        """Expected time to the end of the unit."""
        if self._ended:
            return 0.0
        order = list(self.expected)
        later = order[order.index(self.step) + 1 :] if self.step else order
        pace = self.learned_pace
        left = sum(self.expected[step] for step in later) * pace
        if self.step:
            elapsed = now - self._started
            left += max(self.expected[self.step] * pace - elapsed, OVERRUN * elapsed)
        return left

    def share(self, now: float) -> float:
        """Part of the whole that is done, by time, 0 to 1."""
        if self._ended:
            return 1.0
        order = list(self.expected)
        before = order[: order.index(self.step)] if self.step else []
        done = sum(self._measured.get(step, self.expected[step] * self.learned_pace) for step in before)
        done += now - self._started if self.step else 0.0
        return done / max(done + self.seconds_left(now), 1e-9)
