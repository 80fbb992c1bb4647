"""Drop every place in csrc/ that orders or waits, one after another, and list those that no test notices.

`make mutate` runs it. The kernels run on the CPU (csrc/host_run.h), under several schedules each.
"""

import sys
import tempfile
from pathlib import Path

import cuda_host
import torch
from helpers import assert_same_as_torch
from test_cuda_host import WAYS, make_case

from fastrnn.kernels import cuda_scan

SEEDS = range(3)
CASES = [
    (way, cell, shape)
    for way in ("alone-1", "spread-2")
    for cell in ("lstm", "gru", "rnn_tanh")
    for shape in ("H40-B9-T3-both", "H33-B3-T4-both-packed")
]
# more chunks of weights than registers take: only where they go to shared memory
LARGE = [("spread-1", "lstm", (300, 2, 2, {}, False))]


def problem(module, cases, **schedule) -> str | None:
    """What a test would notice of a schedule, or None."""
    # what an earlier launch left behind is none of this one's
    cuda_scan.failure = cuda_scan.Failure()
    for way, cell, shape in cases:
        for seed in SEEDS:
            module.set_schedule(seed=seed, **schedule)
            try:
                with cuda_host.cut(*WAYS[way]):
                    assert_same_as_torch(lambda draw: make_case(cell, shape, torch.bfloat16, draw), backend="cuda")  # noqa: B023
            except (AssertionError, RuntimeError) as error:
                return f"{way} {cell}: {str(error).splitlines()[0][:100]}"
    return None


def main() -> int:
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        for kept_chunks, cases in ((None, CASES), (1, LARGE)):
            module = cuda_host.build(Path(folder), kept_chunks)
            with cuda_host.installed(module):
                assert problem(module, cases) is None, "the kernels are wrong as they are"
                for number, site in enumerate(module.sites()):
                    noticed = problem(module, cases, dropped=number, longest_wait=100_000)
                    print(f"{'noticed' if noticed else 'MISSED'}: without {site}: {noticed}", flush=True)
                    if not noticed:
                        missed.append(site)
    print(f"{len(missed)} missed" + "".join(f"\n  {site}" for site in missed))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
