"""Measure on the GPU at hand what the model of the kernels assumes: `python -m bench.gpu_experiments --output FILE`.

primitives.cu measures the exchange between blocks, tensor cores and launches, each alone. Then every backend's time of
one step is measured over hidden sizes and batches: the slope between two lengths, so that what a call costs besides
its steps drops out. Lines of CSV: experiment, what, size, value, unit.
"""

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

import fastrnn
from fastrnn.dispatch import Call, _objection

SOURCE = Path(__file__).with_name("primitives.cu")
HIDDEN, BATCHES, LENGTHS = (128, 256, 512, 768, 1024, 2048), (1, 16, 64, 256), (64, 320)


def primitives() -> Iterator[str]:
    major, minor = torch.cuda.get_device_capability()
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "primitives")
        command = ["nvcc", "-O3", "-std=c++17", f"-arch=sm_{major}{minor}", SOURCE, "-o", program]
        subprocess.run(command, check=True, timeout=200)
        done = subprocess.run([program], capture_output=True, text=True, timeout=200)
        yield from done.stdout.splitlines()
        if done.returncode != 0:
            yield f"# primitives.cu stopped with {done.returncode}: {done.stderr.strip()}"


def milliseconds(call, repeats: int = 7) -> float:
    times = []
    for index in range(repeats + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        if index >= 2:
            times.append(begin.elapsed_time(end))
    return statistics.median(times)


def steps(dtype: torch.dtype = torch.bfloat16) -> Iterator[str]:
    backends = [info.name for info in fastrnn.backends() if info.available and info.name not in ("numba", "reference")]
    for cell, hidden, batch in itertools.product(("LSTM", "GRU", "RNN"), HIDDEN, BATCHES):
        module = getattr(fastrnn, cell)(hidden, hidden, device="cuda", dtype=dtype)
        call = Call(module.mode.lower(), "cuda", dtype, hidden, hidden, 0, 1)
        for backend in backends:
            if _objection(backend, call) is not None:
                continue
            times = {}
            with fastrnn.use_backend(backend):
                for length in LENGTHS:
                    x = torch.randn(length, batch, hidden, device="cuda", dtype=dtype)
                    gradient = torch.ones_like(x)
                    with torch.no_grad():
                        times["infer", length] = milliseconds(lambda x=x: module(x))  # noqa: B023
                    weights = list(module.parameters())
                    times["train", length] = milliseconds(
                        lambda x=x, g=gradient: torch.autograd.grad(module(x)[0], weights, g)  # noqa: B023
                    )
            for mode in ("infer", "train"):
                slope = (times[mode, LENGTHS[1]] - times[mode, LENGTHS[0]]) / (LENGTHS[1] - LENGTHS[0])
                yield f"step {mode},{backend} {cell},H {hidden} B {batch},{1e3 * slope:.3f},us a step"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_experiments", description=__doc__)
    parser.add_argument("--output", type=Path, help="where to write the CSV besides printing it")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("these experiments need a GPU; torch finds none")
    name = torch.cuda.get_device_name()
    head = [f"# {name}, torch {torch.__version__}, CUDA {torch.version.cuda}", "experiment,what,size,value,unit"]
    # written as they come: a run that is cut short keeps what it has
    with open(options.output or os.devnull, "w") as file:
        for line in itertools.chain(head, primitives(), steps()):
            print(line, flush=True)
            print(line, file=file, flush=True)


if __name__ == "__main__":
    main()
