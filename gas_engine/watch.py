"""What goes wrong in adversarial training of a solver, said in one line with the number and the knob to turn.

| signature (arXiv 2510.17699)                   | number                                        | knob               |
|------------------------------------------------|-----------------------------------------------|--------------------|
| times cluster at high noise: shapes distort    | inner times above a noise ratio; least gap    | start grid, rate   |
| the discriminator overpowers the student       | loss over its median; relativistic logits     | its rate, gamma    |
| adversarial weight too low: blur               | power at high frequencies over the teacher's  | weight, up         |
| adversarial weight too high: less diversity    | trace of the covariance over the teacher's    | weight, down       |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor

from .metrics import diversity, high_frequency_power
from .schedule import Schedule

# Each pair: where a signature is said, and where it has cleared and may be said again.

# Noise ratio sigma / alpha above which a denoiser knows little more than the mean of its data, whose deviation is 0.5
# to 1: shapes are settled below. Of the inner times of variance-preserving grids, 20 to 55 % lie there.
HIGH_NOISE, HIGH_NOISE_CLEAR = 5.0, 4.0
# Gap of lambda over the mean gap. The named grids stay above 0.19; two evaluations at one level are worth one.
GAP, GAP_CLEAR = 0.05, 0.1
# Loss over its running median. Batches of 24 differ by some tenths; what trebles is no noise.
SPIKE, SPIKE_CLEAR = 3.0, 1.5
# Readings of a loss behind the median: enough that a few spikes do not move it, few enough to follow the learning.
MEDIAN, MEDIAN_FROM = 25, 8
# Share of pairs that the discriminator is sure of, sigmoid(D(real) - D(fake)) > 0.99: their gradient is below 1 % of
# its greatest. Smoothed over about three readings, since a batch is small.
SURE, SATURATED, SATURATED_CLEAR, SMOOTHING = 0.99, 0.5, 0.25, 0.7
# Mean |D(real) - D(fake)|: softplus(-8) = 3e-4, a loss that has nothing left to say whichever side it is on.
LOGITS, LOGITS_CLEAR = 8.0, 5.0
# Power and diversity over the teacher's on the same noise, which leaves little chance in a ratio.
BLUR, BLUR_CLEAR = 0.9, 0.95
ALIKE, ALIKE_CLEAR = 0.9, 0.95
FEWEST = 16  # samples


class Watch:
    """Tells of failure signatures, each once until it clears; it reads numbers and never changes training.

    Each method is fed now and then, such as with every row of metrics, and returns sentences, mostly none. ``start``:
    times of the start grid [K+1], the first that ``times`` sees unless given.

        watch = Watch(solver.times())
        for sentence in watch.times(solver.times(), denoiser.schedule):
            print(sentence)
    """

    def __init__(self, start: Tensor | None = None) -> None:
        self.start = None if start is None else start.detach().tolist()
        self._said: set[str] = set()
        self._losses: dict[str, list[float]] = {"distillation": [], "adversarial": []}
        self._sure: float | None = None

    def times(self, times: Tensor, schedule: Schedule) -> list[str]:
        """Times of the states [K+1]: most inner ones at high noise, and not so at the start; two at one noise level."""
        times = times.detach().double().cpu()
        self.start = times.tolist() if self.start is None else self.start
        inner, lam = len(times) - 2, schedule.lam(times)
        high, before = (int((schedule.lam(t)[1:-1] < -math.log(HIGH_NOISE)).sum()) for t in (times, _row(self.start)))
        nearly = int((lam[1:-1] < -math.log(HIGH_NOISE_CLEAR)).sum())
        gaps = lam.diff() / lam.diff().mean()
        least = int(gaps.argmin())
        return self._tell(
            "clustered", high > max(inner / 2, before), nearly <= max(inner / 2, before),
            f"{high} of {inner} inner times lie above a noise ratio of {HIGH_NOISE:g} (at the start {before}), which "
            "distorts shapes; try another --start-grid or a lower --rate, or a lower --adversarial-weight",
        ) + self._tell(
            "collided", float(gaps[least]) < GAP, float(gaps[least]) > GAP_CLEAR,
            f"times {least} and {least + 1} are {float(gaps[least]):.3f} of a mean step apart, which wastes an "
            "evaluation; try a lower --rate or another --start-grid",
        )  # fmt: skip

    def losses(self, step: int, distillation: float, adversarial: float | None = None) -> list[str]:
        """Losses of an update, the adversarial one if there is one: who leaps above the running median."""
        sentences = []
        knobs = {
            "distillation": "--rate" if adversarial is None else "--adversarial-weight or --rate",
            "adversarial": "--discriminator-rate, or raise --gamma or --warm-up",
        }
        for name, value in (("distillation", distillation), ("adversarial", adversarial)):
            seen = self._losses[name]
            if value is None or not math.isfinite(value):
                continue
            usual = median(seen) if len(seen) >= MEDIAN_FROM else math.inf
            cause = "" if adversarial is None else "; the discriminator may overpower the student"
            sentences += self._tell(
                f"{name} spike", value > SPIKE * usual, value < SPIKE_CLEAR * usual,
                f"update {step}: {name} loss {value:.3g} is {value / max(usual, 1e-30):.1f} times its median{cause}; "
                f"lower {knobs[name]}",
            )  # fmt: skip
            self._losses[name] = [*seen, float(value)][-MEDIAN:]
        return sentences

    def logits(self, relativistic: Tensor) -> list[str]:
        """D(real) - D(fake) of pairs [B]: a discriminator that is sure of most, or logits far from zero."""
        values = relativistic.detach().double().flatten().cpu()
        if len(values) == 0 or not bool(values.isfinite().all()):
            return []
        share, mean = float((torch.sigmoid(values) > SURE).double().mean()), float(values.abs().mean())
        self._sure = share if self._sure is None else SMOOTHING * self._sure + (1 - SMOOTHING) * share
        knobs = "lower --discriminator-rate, or raise --gamma or --warm-up"
        return self._tell(
            "saturated", self._sure > SATURATED, self._sure < SATURATED_CLEAR,
            f"the discriminator is sure of {self._sure:.0%} of the pairs, which teach the student nothing; {knobs}",
        ) + self._tell(
            "logits", mean > LOGITS, mean < LOGITS_CLEAR,
            f"relativistic logits of {mean:.1f} on average: the discriminator overpowers the student; {knobs}",
        )  # fmt: skip

    def samples(
        self, student: Tensor, teacher: Tensor, features: Callable[[Tensor], Tensor] | None = None
    ) -> list[str]:
        """Samples [N, C, H, W] of the same noise: blur and lost diversity.

        Diversity is that of ``features``; without them that of pixels, which blur lowers too and which is therefore
        judged where samples are sharp. Fewer than 16 samples, or states that are no images, tell nothing.
        """
        if student.shape != teacher.shape or student.ndim != 4 or len(student) < FEWEST:
            return []
        sharp = _ratio(*(high_frequency_power(x) for x in (student, teacher)))
        spread = _ratio(*(diversity((features or (lambda v: v.flatten(1)))(x)) for x in (student, teacher)))
        return self._tell(
            "blur", sharp < BLUR, sharp > BLUR_CLEAR,
            f"the student's samples have {sharp:.2f} of the teacher's power at high frequencies: they are blurred; "
            "raise --adversarial-weight",
        ) + self._tell(
            "alike", spread < ALIKE and (features is not None or sharp >= BLUR), spread > ALIKE_CLEAR,
            f"the student's samples have {spread:.2f} of the teacher's diversity: they grow alike; "
            "lower --adversarial-weight",
        )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """What ``load`` goes on from: names, and at most 52 + K numbers; plain JSON."""
        losses = {name: list(values) for name, values in self._losses.items()}
        return {"start": self.start, "said": sorted(self._said), "losses": losses, "sure": self._sure}

    def load(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state``."""
        self.start, self._sure, self._said = state["start"], state["sure"], set(state["said"])
        self._losses = {name: list(state["losses"][name]) for name in self._losses}

    def _tell(self, name: str, wrong: bool, clear: bool, sentence: str) -> list[str]:
        if clear:
            self._said.discard(name)
        if not wrong or name in self._said:
            return []
        self._said.add(name)
        return [sentence]


def _row(times: Any) -> Tensor:
    return torch.tensor(times, dtype=torch.float64)


def _ratio(student: float, teacher: float) -> float:
    """NaN, which no threshold counts as wrong, where the teacher has nothing."""
    return student / teacher if teacher > 0 and math.isfinite(student) else math.nan
