"""The check that comes before the clock: fastrnn's results beside torch.nn's and float64, by the tests' one rule."""

from collections.abc import Callable

import torch

from tests.helpers import Results, rule_violations

from .cases import Case, Pair, build
from .workloads import Workload

# The rule compares two maxima, and the maximum over a few numbers is a matter of luck: where the first draw of weights
# and inputs breaks it, the mean over several decides.
DRAWS = 4


def problems(
    workload: Workload, dtype: torch.dtype, device: torch.device, side: Callable[[Pair], Case] = lambda pair: pair.ours
) -> list[str]:
    """A line for each output or gradient that breaks the tolerance rule; empty where all is right."""

    def draw(seed: int) -> tuple[Results, Results, Results]:
        pair = build(workload, dtype, device, seed)
        return side(pair).results(), pair.theirs.results(), pair.theirs.in_dtype(torch.float64).results()

    draws = [draw(0)]
    if found := rule_violations(draws):
        draws += map(draw, range(1, DRAWS))
        found = rule_violations(draws)
    return [f"{name}: {problem}" for name, problem in found.items()]
