"""Compile the Triton kernels for GPUs that are not there, and list what they take: ``python -m bench.triton_kernels``.

Every kernel is compiled with the tiles that ``choose_tiles`` gives for the GPU's limits. Registers and spills are
those that ptxas reports (for AMD: the assembler text), shared memory that of Triton's metadata.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import torch

from fastrnn.kernels.triton_tiles import (
    AMD,
    AMPERE,
    BLACKWELL,
    HOPPER,
    WARPS,
    Tiles,
    choose_tiles,
    registers_without_spills,
)
from fastrnn.reference import CELLS

LIMITS = {"sm_80": AMPERE, "sm_90": HOPPER, "sm_100": BLACKWELL, "gfx942": AMD}
TYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Kernel(NamedTuple):
    """One kernel: of a cell, for a size and a GPU."""

    arch: str
    cell: str
    backward: bool
    hidden_size: int
    batch: int
    dtype: torch.dtype

    def tiles(self) -> Tiles:
        limits, itemsize = LIMITS[self.arch], self.dtype.itemsize
        return choose_tiles(self.cell, self.backward, self.hidden_size, 1, -(-self.batch // 16), itemsize, limits)


class Resources(NamedTuple):
    """What a compiled kernel takes: registers and spilled bytes of a thread, shared memory of a program.

    And whether Hopper's warp groups make its products (wgmma).
    """

    registers: int
    spilled_bytes: int
    shared_kb: float
    warp_groups: bool = False


def _resources(kernel: Kernel, compiled) -> Resources:
    if kernel.arch.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
        spilled = 4 * int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1])
        return Resources(registers, spilled, compiled.metadata.shared / 1024)
    from triton.backends.nvidia.compiler import get_ptxas

    text = compiled.asm["ptx"]
    target = re.search(r"\.target (\w+)", text)[1]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(text)
        file.flush()
        ptxas = get_ptxas(int(kernel.arch.removeprefix("sm_"))).path
        command = [ptxas, "-v", f"--gpu-name={target}", file.name, "-o", os.devnull]
        report = subprocess.run(command, check=True, capture_output=True, text=True)
    report = report.stdout + report.stderr
    spilled = int(re.search(r"(\d+) bytes spill stores", report)[1])
    registers = int(re.search(r"Used (\d+) registers", report)[1])
    return Resources(registers, spilled, compiled.metadata.shared / 1024, "wgmma.mma_async" in text)


def compile_kernel(kernel: Kernel) -> Resources:
    """Compile ``kernel`` as ``triton_layer`` would launch it, and read what it takes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastrnn.kernels.triton_scan import OF_THE_CALL, backward_scan, forward_scan

    tiles, cell = kernel.tiles(), CELLS[kernel.cell]
    scan = backward_scan if kernel.backward else forward_scan
    amd = kernel.arch.startswith("gfx")
    tf32 = kernel.dtype == torch.float32 and not amd
    constants = {
        **{"CELL": kernel.cell, "H": kernel.hidden_size, "GATES": cell.gates, "SAVED": cell.saved},
        **{name.upper(): value for name, value in tiles._asdict().items()},
        **{
            "PACKED": False,
            "SAVE": True,
            **{"WITH_D_OUTPUT": True, "WITH_RESETS": False, "WITH_CELLS": False, "WITH_D_CELLS": False},
            "PRECISION": "tf32" if tf32 else "ieee",
        },
        "EXACT": kernel.dtype in (torch.float32, torch.float64),
    }
    wide = "*fp64" if kernel.dtype == torch.float64 else "*fp32"
    types = {
        **dict.fromkeys(constants, "constexpr"),
        **dict.fromkeys(OF_THE_CALL, "i32"),
        **dict.fromkeys(("hidden", "cell", "d_hidden", "d_cell"), wide),
        **{"counters": "*i32", "offsets": "*i64", "resets": "*u8"},
    }
    signature = {name: types.get(name, f"*{TYPES[kernel.dtype]}") for name in scan.arg_names}
    places = {name: (index,) for index, name in enumerate(scan.arg_names)}
    source = ASTSource(
        scan,
        signature,
        constexprs={places[name]: value for name, value in constants.items() if name in places},
        # torch's memory starts at multiples of 16: without saying so another kernel would be compiled
        attrs={places[name]: [["tt.divisibility", 16]] for name, kind in signature.items() if kind.startswith("*")},
    )
    if amd:
        target = GPUTarget("hip", kernel.arch, 64)
    else:
        target = GPUTarget("cuda", int(kernel.arch.removeprefix("sm_")), 32)
    options = {"num_warps": WARPS, "num_stages": 1, "launch_cooperative_grid": not tiles.alone}
    if amd:
        return _resources(kernel, triton.compile(source, target=target, options=options))

    @functools.cache
    def resources(registers):
        return _resources(kernel, triton.compile(source, target=target, options={**options, "maxnreg": registers}))

    return resources(registers_without_spills(lambda registers: resources(registers).spilled_bytes))


SIZES = ((64, 32), (64, 4096), (128, 64), (128, 4096), (256, 32), (256, 4096), (512, 32), (1024, 96), (2048, 16))


def some_kernels(sizes=SIZES) -> list[Kernel]:
    """Kernels of all cells and GPUs, in bfloat16 and float32, for some hidden sizes and batches."""
    kinds = itertools.product(
        LIMITS, ("lstm", "gru", "rnn_tanh"), (torch.bfloat16, torch.float32), sizes, (False, True)
    )
    return [Kernel(arch, cell, backward, *size, dtype) for arch, cell, dtype, size, backward in kinds]


def compile_all(kernels: list[Kernel]) -> list[Resources]:
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_kernel, kernels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=LIMITS, action="append", help="only these GPUs")
    arguments = parser.parse_args()
    kernels = [kernel for kernel in some_kernels() if not arguments.arch or kernel.arch in arguments.arch]
    taken = dict(zip(kernels, compile_all(kernels), strict=True))
    print("| GPU | cell | dtype | H | B | forward | registers, spilled, shared | backward | the same |")
    print("|---|---|---|---|---|---|---|---|---|")
    for kernel in kernels:
        if kernel.backward:
            continue
        passes = (kernel, kernel._replace(backward=True))
        columns = [f"{describe(each.tiles())} | {amounts(taken[each])}" for each in passes]
        sizes = f"{TYPES[kernel.dtype]} | {kernel.hidden_size} | {kernel.batch}"
        print(f"| {kernel.arch} | {kernel.cell} | {sizes} | {' | '.join(columns)} |")


def describe(tiles: Tiles) -> str:
    """The rows and units of a program, and how much of its weights stays on chip."""
    share = "alone" if tiles.alone else f"{tiles.resident}/{tiles.chunks} on chip"
    return f"{tiles.rows} × {tiles.units}, {share}"


def amounts(taken: Resources) -> str:
    warp_groups = ", wgmma" if taken.warp_groups else ""
    return f"{taken.registers}, {taken.spilled_bytes} B, {taken.shared_kb:.0f} KB{warp_groups}"


if __name__ == "__main__":
    main()
