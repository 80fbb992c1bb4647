"""The kernels with narrower vectors and fewer registers than this machine's: what runs on AVX2, SSE and NEON."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import llvmlite.binding
import torch, fastrnn
from helpers import FLOAT64_AGREEMENT
own = llvmlite.binding.get_host_cpu_features
llvmlite.binding.get_host_cpu_features = lambda: {features!r}
from fastrnn.kernels import numba_simd  # looks at the features while it is imported
llvmlite.binding.get_host_cpu_features = own
assert numba_simd.VECTOR_BYTES == {width} and not numba_simd.MANY_REGISTERS
torch.manual_seed(0)
for name in ("LSTM", "GRU", "RNN"):
    for hidden, batch, steps in ((33, 7, 5), (70, 1, 40), (3, 2, 3)):
        options = dict(bidirectional=True, dtype=torch.float64)
        if name == "LSTM" and hidden == 33:
            options["proj_size"] = 9
        ours = getattr(fastrnn, name)(19, hidden, **options)
        theirs = fastrnn.convert(ours, to="torch")
        results = []
        for module in (ours, theirs):
            input = torch.linspace(-2, 2, steps * batch * 19, dtype=torch.float64).view(steps, batch, 19)
            output, state = module(input.requires_grad_())
            loss = output.sin().sum() + sum(part.cos().sum() for part in (state if name == "LSTM" else (state,)))
            results.append([output, *torch.autograd.grad(loss, [input, *module.parameters()])])
        with torch.no_grad():  # weights that are packed, and those that were kept
            results[0] += [ours(input)[0], ours(input)[0]]
            results[1] += [theirs(input)[0]] * 2
        for mine, other in zip(*results):
            assert (mine - other).abs().max() <= FLOAT64_AGREEMENT * max(1, other.abs().max()), (name, hidden)
    layer = getattr(fastrnn, name)(19, 40, dtype=torch.float64)
    stream, rows = fastrnn.Stream(layer), torch.randn(3, 19, dtype=torch.float64)
    steps = torch.stack([stream.step(row) for row in rows])
    assert (steps - fastrnn.convert(layer, to="torch")(rows)[0]).abs().max() <= FLOAT64_AGREEMENT
"""


@pytest.mark.parametrize(("width", "features"), [(32, {"avx2": True, "fma": True}), (16, {})])
def test_narrower_vectors(width, features, tmp_path):
    environment = {**os.environ, "FASTRNN_CACHE_DIR": str(tmp_path), "FASTRNN_BACKEND": "numba"}
    tests = Path(__file__).parent
    environment["PYTHONPATH"] = os.pathsep.join([str(tests), str(tests.parent)])
    command = [sys.executable, "-c", SCRIPT.format(features=features, width=width)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
