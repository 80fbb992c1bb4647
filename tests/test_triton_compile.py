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
    kernels = some_kernels(sizes=((128, 64), (1024, 96)))
    # of the other types, one size each on each GPU
    kernels += [
        Kernel(arch, cell, backward, 200, 33, dtype)
        for arch in LIMITS
        for cell in ("lstm", "gru", "rnn_relu")
        for dtype in (torch.float16, torch.float64)
        for backward in (False, True)
    ]
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
    process = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.splitlines()[-1])


def test_shared_memory_is_within_the_limit_of_each_gpu(compiled):
    assert [row for row in compiled if row[4] > row[1]] == []


def test_registers_do_not_spill(compiled):
    """But for the few bytes that ``bench.triton_kernels.FEW_BYTES`` explains."""
    from bench.triton_kernels import FEW_BYTES

    assert [row for row in compiled if row[3] > FEW_BYTES] == []


def test_sizes_of_the_call_are_no_part_of_a_kernel():
    """A kernel is compiled anew for its constants only, and those depend on the batch by the choice of tiles alone."""
    from fastrnn.kernels.triton_scan import OF_THE_CALL

    script = (
        "from fastrnn.kernels.triton_scan import OF_THE_CALL, backward_scan, forward_scan\n"
        "for scan in (forward_scan, backward_scan):\n"
        "    assert {p.name for p in scan.params if p.do_not_specialize} == set(OF_THE_CALL)\n"
        "    assert not {p.name for p in scan.params if p.is_constexpr} & set(OF_THE_CALL)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=100)
    assert {"batch", "steps", "begin", "end"} <= set(OF_THE_CALL)
