"""Triton's kernels compile for GPUs that are not here, within their registers and shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# In a process of its own: here kernels run in the interpreter.
SCRIPT = """
import json, sys
import torch
from bench.triton_kernels import LIMITS, Kernel, compile_all, some_kernels

def main():
    kernels = some_kernels(sizes=((128, 64),))
    kernels += [kernel for kernel in some_kernels(sizes=((1024, 96),)) if kernel.arch in ("sm_90", "gfx942")]
    # of the other types, one size each on each GPU
    kernels += [
        Kernel(arch, cell, backward, 200, 33, dtype)
        for arch in LIMITS
        for cell in ("lstm", "gru", "rnn_relu")
        for dtype in (torch.float16, torch.float64)
        for backward in (False, True)
    ]
    kernels += [Kernel("sm_90", cell, backward, 256, 4096, torch.bfloat16) for cell in ("lstm", "gru", "rnn_tanh")
                for backward in (False, True)]
    results = compile_all(kernels)
    print(json.dumps([
        [str(kernel), LIMITS[kernel.arch].shared_bytes / 1024, *taken] for kernel, taken in zip(kernels, results)
    ]))

if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compile")
    script = folder / "script.py"
    script.write_text(SCRIPT)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment.update(PYTHONPATH=str(ROOT), TRITON_CACHE_DIR=str(folder / "cache"), TRITON_DEFAULT_FP_FUSION="1")
    process = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=1200)
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.splitlines()[-1])


def test_shared_memory_is_within_the_limit_of_each_gpu(compiled):
    assert [row for row in compiled if row[4] > row[1]] == []


def test_registers_do_not_spill(compiled):
    assert [row for row in compiled if row[3] > 0] == []


def test_large_batches_use_the_warp_groups_of_hopper(compiled):
    large = [row for row in compiled if "batch=4096" in row[0]]
    assert len(large) == 6 and all(row[5] for row in large)


# Launches of many batches, lengths and directions, bound as Triton binds them: the key under which it keeps kernels.
KEYS = """
import inspect, itertools
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from fastrnn.kernels import gpu_layer, triton_layer
from fastrnn.kernels.triton_scan import OF_THE_CALL, backward_scan, forward_scan
from fastrnn.kernels.triton_tiles import HOPPER, choose_tiles

class Bound:
    def __init__(self, scan):
        backend = make_backend(GPUTarget("cuda", 90, 32))
        self.bind = create_function_from_signature(inspect.signature(scan.fn), scan.params, backend)
        self.keys = set()

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.keys.add(str(self.bind(*arguments, **options)[1:]))

triton_layer._limits = lambda device: HOPPER
triton_layer._registers = lambda *arguments: {}
x = torch.empty(64)
for scan, pointers, options in (
    (forward_scan, 13, {"SAVE": True, "WITH_RESETS": False, "WITH_CELLS": False}),
    (backward_scan, 11, {"WITH_D_OUTPUT": True, "WITH_RESETS": False, "WITH_D_CELLS": False}),
):
    assert not {p.name for p in scan.params if p.is_constexpr} & set(OF_THE_CALL)
    for hidden in (64, 300, 1024):
        bound, tiles = Bound(scan), set()
        calls = itertools.product((1, 2, 15, 16, 17, 100, 256), (1, 2, 16, 1000), ((0,), (1,), (0, 1)))
        for batch, steps, reverse in calls:
            groups = len(reverse)
            dtype, device = torch.bfloat16, torch.device("cpu")
            call = gpu_layer.Scan("gru", hidden, groups, batch, steps, dtype, device, reverse, None, None)
            triton_layer._launch(call, bound, (x,) * pointers, steps, **options)
            tiles.add(choose_tiles("gru", False, hidden, groups, -(-batch // 16), 2, HOPPER))
        print(scan.fn.__name__, hidden, len(bound.keys), len(tiles))
        assert len(bound.keys) == len(tiles), bound.keys
"""


def test_sizes_of_the_call_are_no_part_of_a_kernel():
    """As many kernels as choices of tiles: batch, steps and directions make no other."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    subprocess.run([sys.executable, "-c", KEYS], env=environment, check=True, timeout=100)
