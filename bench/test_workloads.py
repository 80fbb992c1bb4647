"""The workloads under pytest-benchmark, to compare commits: `pytest bench --benchmark-only`.

`--benchmark-autosave`, then `pytest-benchmark compare`, shows two commits side by side. Without -k the cheap
workloads run; `-k NAME` runs any. On a GPU each call is timed until the device is done.
"""

import pytest
import torch

from . import check
from .cases import build
from .workloads import load

WORKLOADS = {workload.name: workload for workload in load()}
CHEAP_FLOPS = 1e10

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("library", ["fastrnn", "torch"])
@pytest.mark.parametrize("name", WORKLOADS)
def test_workload(benchmark, request, name, library):
    workload = WORKLOADS[name]
    cheap = workload.flops <= CHEAP_FLOPS and (workload.cpu or DEVICE.type == "cuda")
    if not cheap and not request.config.getoption("keyword"):
        pytest.skip("dear: name it with -k")
    pair = build(workload, torch.float32, DEVICE)
    if library == "fastrnn":
        assert not check.problems(workload, torch.float32, DEVICE)
        call = pair.ours.callable()
    else:
        call = pair.theirs.callable()

    def finished_call():
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize(DEVICE)

    benchmark.group = name
    with torch.set_grad_enabled(workload.mode == "train"):
        finished_call()
        benchmark(finished_call)
