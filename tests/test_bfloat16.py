"""bfloat16 by the processor's dot product of pairs: taken where there is one, within the rule, the same bits always."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import CELLS, assert_same_as_torch, make_pair, random_packed, random_state, run

import fastrnn
from fastrnn.kernels import numba_layer
from fastrnn.kernels.numba_pairs import HAS_PAIRS

needs_pairs = pytest.mark.skipif(not HAS_PAIRS, reason="this CPU has no AVX512_BF16")

# H, B, T, I: more rows than FEW_ROWS; odd depths leave half a pair, odd numbers of rows half a pair of time steps
SHAPES = [(3, 7, 5, 1), (33, 1, 19, 19), (70, 40, 3, 1), (70, 7, 31, 19), (257, 7, 3, 19), (257, 40, 3, 1)]


@pytest.fixture
def kernels_used(monkeypatch):
    """The dtypes of the kernels that run."""
    used, kernel = [], numba_layer.kernel

    def recording(cell, backward, dtype, projected):
        used.append(dtype)
        return kernel(cell, backward, dtype, projected)

    monkeypatch.setattr(numba_layer, "kernel", recording)
    return used


def draw(class_name, hidden, batch, steps, features, packed=False, **options):
    """What makes a case from a seed, for ``assert_same_as_torch``."""

    def make(seed):
        ours, theirs = make_pair(class_name, features, hidden, dtype=torch.bfloat16, seed=seed, **options)
        if packed:
            input = random_packed(batch, steps, features, torch.bfloat16, seed)
        else:
            input = torch.randn(steps, batch, features).to(torch.bfloat16)
        return ours, theirs, input, random_state(ours, batch, torch.bfloat16, seed)

    return make


@needs_pairs
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "H{}-B{}-T{}-I{}".format(*shape))
@pytest.mark.parametrize("cell", CELLS)
def test_outputs_and_gradients(cell, shape, kernels_used):
    class_name, options = CELLS[cell]
    assert_same_as_torch(draw(class_name, *shape, **options), backend="numba")
    assert set(kernels_used) == {torch.bfloat16}


@needs_pairs
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("cell", [*CELLS, "lstm_proj"])
def test_directions_layers_and_packed_input(cell, packed, kernels_used):
    class_name, options = CELLS.get(cell, ("LSTM", {"proj_size": 19}))
    make = draw(class_name, 33, 7, 9, 19, packed, num_layers=2, bidirectional=True, **options)
    assert_same_as_torch(make, backend="numba")
    assert set(kernels_used) == {torch.bfloat16}


@needs_pairs
def test_few_rows_run_in_float32(kernels_used):
    """A single step reads the weights as they lie, once: there is nothing to gain."""
    assert_same_as_torch(draw("LSTM", 33, 3, 1, 19), backend="numba")
    assert set(kernels_used) == {torch.float32}


@needs_pairs
@pytest.mark.parametrize("batch", [1, 40])
@pytest.mark.parametrize("class_name", ["RNN", "GRU", "LSTM"])
def test_same_bits_with_any_number_of_threads(class_name, batch, kernels_used):
    ours, _, input, state = draw(class_name, 257, batch, 101, 33)(0)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with fastrnn.use_backend("numba"):
                results.append(run(ours, input, state))
    finally:
        torch.set_num_threads(before)
    assert set(kernels_used) == {torch.bfloat16}
    for other in results[1:]:
        for name, result in results[0].items():
            assert torch.equal(result, other[name]), name


@needs_pairs
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf"), 1e-40])
def test_special_values_stay_in_their_row(special):
    """The last pair of an odd row holds one value: what follows it in memory belongs to another sequence."""
    ours, theirs = make_pair("LSTM", 19, 33, dtype=torch.bfloat16)
    input = torch.randn(5, 7, 19).to(torch.bfloat16)
    input[:, 3] = special
    with torch.no_grad(), fastrnn.use_backend("numba"):
        output, expected = ours(input)[0], theirs(input)[0]
    assert torch.equal(output.isnan(), expected.isnan())
    others = [0, 1, 2, 4, 5, 6]
    assert output[:, others].isfinite().all()


MASKED = """
import llvmlite.binding
features = llvmlite.binding.get_host_cpu_features()
features["avx512bf16"] = False
llvmlite.binding.get_host_cpu_features = lambda: features
from test_bfloat16 import HAS_PAIRS, assert_same_as_torch, draw
from fastrnn.kernels import numba_compile
assert not HAS_PAIRS
assert_same_as_torch(draw("GRU", 33, 7, 5, 19), backend="numba")
assert sorted(numba_compile._addresses) == ["gru_backward_float32", "gru_forward_float32"]
"""


def test_without_the_instruction(tmp_path):
    """On other processors bfloat16 is computed in float32."""
    environment = {**os.environ, "FASTRNN_CACHE_DIR": str(tmp_path)}
    tests = Path(__file__).parent
    environment["PYTHONPATH"] = os.pathsep.join([str(tests), str(tests.parent)])
    command = [sys.executable, "-c", MASKED]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
