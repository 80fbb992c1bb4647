"""What the CUDA kernels take of a GPU: `python -m bench.cuda_kernels` prints the table of docs/cuda-kernels.md.

It builds csrc/, and nvcc reports registers and spills of every kernel; no GPU is needed.
"""

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
ARCHS = ("80", "90", "100")
FLAGS = "-Xptxas -v -Werror all-warnings"
# In the order of their numbers in csrc/arguments.h.
TYPES = ("Bfloat16", "Float16", "Tf32", "Float32")
# What nvcc calls a kernel: its regime, cell, element type, tiles of sequences, whether it is the backward pass.
NAME = re.compile(r"entryI\d+(Alone|SpreadOut)I\d+(Lstm|Gru|Rnn)\d+(Bfloat16|Float16|Tf32|Float32)Li(\d)ELb([01])E")


class Kernel(NamedTuple):
    """A compiled kernel and what it takes of a thread."""

    arch: str
    regime: str  # S: a block alone, L: units spread over blocks
    cell: str
    type: str
    tiles: int
    backward: bool
    registers: int
    spilled: int  # bytes


def build(folder: Path, archs: Sequence[str] = ARCHS) -> tuple[list[Kernel], Path]:
    """Build the kernels into ``folder``: what each takes, and the module."""
    environment = {
        **os.environ,
        "FASTRNN_BUILD_CUDA": "1",
        "FASTRNN_CUDA_ARCHS": " ".join(archs),
        "FASTRNN_CUDA_FLAGS": FLAGS,
    }
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", folder, "--build-temp", folder / "objects"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the build failed:\n{done.stdout[-5000:]}\n{done.stderr[-5000:]}")
    kernels, found, spilled = [], None, None
    for line in done.stdout.splitlines():
        if "Compiling entry function" in line:
            found = re.search(r"for 'sm_(\d+)", line), NAME.search(line)
        elif "spill stores" in line:
            spilled = sum(int(count) for count in re.findall(r"(\d+) bytes spill", line))
        elif "Used" in line and found is not None:
            arch, (regime, cell, element, tiles, backward) = found[0][1], found[1].groups()
            registers = int(re.search(r"Used (\d+) registers", line)[1])
            regime = "S" if regime == "Alone" else "L"
            kernels.append(Kernel(arch, regime, cell, element, int(tiles), backward == "1", registers, spilled))
            found = None
    return kernels, next((folder / "fastrnn").glob("_cuda*.so"))


def load(library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_cuda", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shared_memory(module: ModuleType, regime: str, cell: str, element: str, tiles: int) -> str:
    """Kilobytes of a block, forward and backward, at the largest hidden size of regime S, or 1024 in regime L."""
    name, kind, spread = {"Rnn": "rnn_tanh"}.get(cell, cell.lower()), TYPES.index(element), regime == "L"
    size = 1024
    while not spread and module.grid(name, kind, False, False, tiles, size) is None:
        size //= 2
    both = (module.grid(name, kind, backward, spread, tiles, size)[2] / 1024 for backward in (False, True))
    return f"{', '.join(f'{kilobytes:.0f}' for kilobytes in both)} KB at H {size}"


def table(kernels: list[Kernel], module: ModuleType) -> str:
    """A row for each kernel, with a column for each GPU: registers and, if there are any, spilled bytes."""
    archs = sorted({kernel.arch for kernel in kernels}, key=int)
    by_name = {}
    for kernel in kernels:
        by_name.setdefault(kernel[1:5], {})[kernel.backward, kernel.arch] = kernel
    header = [f"{word}, sm_{arch}" for word in ("forward", "backward") for arch in archs]
    lines = [f"| regime | cell | type | tiles | {' | '.join(header)} | shared |", "|---" * (5 + len(header)) + "|"]
    for name, found in sorted(by_name.items()):
        taken = [found[backward, arch] for backward in (False, True) for arch in archs]
        cells = [f"{kernel.registers}" + f" ({kernel.spilled} B)" * (kernel.spilled > 0) for kernel in taken]
        lines.append(f"| {' | '.join(map(str, name))} | {' | '.join(cells)} | {shared_memory(module, *name)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(prog="python -m bench.cuda_kernels", description=__doc__).parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        kernels, library = build(Path(folder))
        print(table(kernels, load(library)))


if __name__ == "__main__":
    main()
