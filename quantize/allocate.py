"""Which format each matrix gets, where a whole model is to have a size, or a divergence.

Each matrix has some choices with a cost in bytes and one in divergence (sensitivity.py). With a price on bytes, the
best choice of each is on the lower convex hull of its costs, and all prices' solutions are one path: from everything
at its smallest, step by step along the hulls, the step that takes off the most divergence per byte first (the
Lagrangian relaxation of Shoham and Gersho, 1988). Knows no weights and no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from pyllama.common.errors import QuantizeError

from .sensitivity import Choice, Costs

# What a method leaves of the divergence that sums up from single matrices (measured on one small model).
_SHARE_LEFT = {"rtn": 1.7, "imatrix": 0.75, "gptq": 0.5}


@dataclass(frozen=True)
class Target:
    """What a model is to be; one of the three is given.

    n_bytes: of model.safetensors; bpw: bits per weight, vectors and padding included; kld: predicted mean KL divergence
    of the next token, nats.
    """

    n_bytes: int | None = None
    bpw: float | None = None
    kld: float | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.n_bytes, self.bpw, self.kld) if value is not None]
        if len(given) != 1:
            raise ValueError("one of a size, bits per weight and a divergence can be aimed at")
        if not 0 < given[0] < float("inf"):
            raise ValueError(f"a target of {given[0]:g}, expected a number above 0")

    def in_words(self) -> str:
        """For people, as `4.4 bits per weight`."""
        if self.n_bytes is not None:
            return f"{self.n_bytes / 1e6:.1f} MB"
        return f"{self.bpw:g} bits per weight" if self.bpw is not None else f"divergence {self.kld:g}"


@dataclass(frozen=True)
class Allocation:
    """A choice for every matrix, and the divergence that they are thought to make together."""

    choices: dict[str, Choice]
    kl: float


@dataclass(frozen=True)
class _Step:
    """From one choice of a matrix to the next on its hull."""

    gain: float  # divergence taken off per byte
    name: str
    choice: Choice
    n_bytes: int
    kl: float


def allocate(costs: Mapping[str, Costs], fixed_bytes: int, n_weights: int, target: Target, method: str) -> Allocation:
    """The choices with the least divergence within the target. fixed_bytes: of everything that has no choice.

    Raises QuantizeError where even the smallest choices are too large, or the largest not good enough.
    """
    left = _SHARE_LEFT[method]
    choices = {name: min(cost.n_bytes, key=lambda c: (cost.n_bytes[c], cost.kl[c])) for name, cost in costs.items()}
    n_bytes = fixed_bytes + sum(costs[name].n_bytes[choice] for name, choice in choices.items())
    kl = left * sum(costs[name].kl[choice] for name, choice in choices.items())
    budget = target.n_bytes if target.n_bytes is not None else None
    if target.bpw is not None:
        budget = int(target.bpw * n_weights / 8)
    if budget is not None and n_bytes > budget:
        raise QuantizeError(
            f"the smallest model that can be made has {n_bytes / 1e6:.1f} MB, {n_bytes * 8 / n_weights:.2f} bits per "
            f"weight; asked for {budget / 1e6:.1f} MB, {budget * 8 / n_weights:.2f}"
        )
    closed = set[str]()  # matrices whose next step did not fit: the one behind it is larger still
    for step in sorted((step for name, cost in costs.items() for step in _steps(name, cost)), key=lambda s: -s.gain):
        if target.kld is not None and kl <= target.kld:
            break
        if step.name in closed:
            continue
        if budget is not None and n_bytes + step.n_bytes > budget:
            closed.add(step.name)
            continue
        choices[step.name] = step.choice
        n_bytes += step.n_bytes
        kl -= left * step.kl
    if target.kld is not None and kl > target.kld:
        raise QuantizeError(
            f"a divergence of {target.kld:g} cannot be had: all matrices in the largest format are thought to make "
            f"{kl:.2g}"
        )
    return Allocation(choices, max(kl, 0.0))


def _steps(name: str, cost: Costs) -> list[_Step]:
    """Along the lower convex hull of (bytes, divergence), from the smallest choice on; gains fall."""
    hull: list[Choice] = []
    for choice in sorted(cost.n_bytes, key=lambda c: (cost.n_bytes[c], cost.kl[c])):
        if hull and cost.kl[choice] >= cost.kl[hull[-1]]:
            continue  # larger and no better
        while len(hull) > 1 and _slope(cost, hull[-2], hull[-1]) <= _slope(cost, hull[-1], choice):
            hull.pop()
        hull.append(choice)
    return [
        _Step(_slope(cost, a, b), name, b, cost.n_bytes[b] - cost.n_bytes[a], cost.kl[a] - cost.kl[b])
        for a, b in pairwise(hull)
    ]


def _slope(cost: Costs, a: Choice, b: Choice) -> float:
    return (cost.kl[a] - cost.kl[b]) / (cost.n_bytes[b] - cost.n_bytes[a])
