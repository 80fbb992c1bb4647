"""Long sums, in float32: over a large hidden size, and over many time steps and sequences, by the tolerance rule."""

import pytest
import torch

from bench.check import problems
from bench.workloads import Workload


@pytest.mark.parametrize(
    ("cell", "hidden", "batch", "time"),
    [
        ("RNN", 1024, 8, 16),
        ("GRU", 1024, 2, 16),
        ("LSTM", 512, 8, 16),
        ("LSTM", 512, 1, 24),
        ("LSTM", 1024, 4, 2),  # so few rows that the weights are not packed
        ("GRU", 24, 1000, 24),
        ("LSTM", 16, 3000, 20),
        ("RNN", 8, 40, 2000),
    ],
)
def test_long_sums(cell, hidden, batch, time):
    size = {"input": hidden, "hidden": hidden, "batch": batch, "time": time}
    workload = Workload(name="long", source="", cell=cell, mode="train", **size)
    assert not problems(workload, torch.float32, torch.device("cpu"))
