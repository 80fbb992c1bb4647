"""Measure on the GPU at hand what the model of the kernels assumes: `python -m bench.gpu_experiments --output FILE`.

The programs beside this file measure the exchange between blocks, what a multiprocessor computes, and launches, each
alone. Then come the kernels of regime S, those that torch runs for the workloads, and every backend's time over hidden
sizes and batches. Times of a step are slopes between two lengths, so that what a call costs besides its steps drops
out. Lines of CSV: experiment, what, size, value, unit.
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
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from bench import workloads
from fastrnn.dispatch import Call, _objection

SOURCES = tuple(Path(__file__).with_name(f"{name}.cu") for name in ("exchange", "pipes", "launches"))
HIDDEN, BATCHES, LENGTHS = (128, 256, 512, 768, 1024, 2048), (1, 16, 64, 256), (64, 320)


def compile(source: Path, arch: str, folder: Path) -> Path:
    program = folder / source.stem
    command = ["nvcc", "-O3", "-std=c++17", f"-arch=sm_{arch}", "-Werror", "all-warnings", source, "-o", program]
    subprocess.run(command, check=True, timeout=200)
    return program


def primitives() -> Iterator[str]:
    capability = "{}{}".format(*torch.cuda.get_device_capability())
    # only code for sm_90a, which runs on nothing else, has the products of warp groups
    arch = "90a" if capability == "90" else capability
    with tempfile.TemporaryDirectory() as folder:
        for source in SOURCES:
            with open(Path(folder, "lines"), "w+") as lines:
                try:
                    program = compile(source, arch, Path(folder))
                    problem = subprocess.run([program], stdout=lines, timeout=200).returncode
                except subprocess.SubprocessError as error:
                    problem = error
                lines.seek(0)
                yield from lines.read().splitlines()
            if problem:
                yield f"# {source.name} stopped: {problem}"


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


def kernels(call) -> dict[str, float]:
    """Microseconds of every kernel of a call, by name."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return {
        event.key.replace(",", ";"): event.self_device_time_total
        for event in profile.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA
    }


def regime_s(hidden: int = 128) -> Iterator[str]:
    """The scans alone, without the matrix products of a layer."""
    reason = {info.name: None if info.available else info.reason for info in fastrnn.backends()}["cuda"]
    if reason:
        yield f"# regime S: {reason}"
        return
    module = fastrnn.LSTM(hidden, hidden, device="cuda", dtype=torch.bfloat16)
    weights = list(module.parameters())
    for batch in (8, 256, 1056):
        times = {}
        with fastrnn.use_backend("cuda"):
            for length in LENGTHS:
                x = torch.randn(length, batch, hidden, device="cuda", dtype=torch.bfloat16)
                gradient = torch.ones_like(x)
                with torch.no_grad():
                    times["infer", length] = kernels(lambda x=x: module(x))
                times["train", length] = kernels(lambda x=x, g=gradient: torch.autograd.grad(module(x)[0], weights, g))
        for mode in ("infer", "train"):
            short, long = times[mode, LENGTHS[0]], times[mode, LENGTHS[1]]
            for name in short.keys() & long.keys():
                if "Alone<" in name:
                    slope = (long[name] - short[name]) / (LENGTHS[1] - LENGTHS[0])
                    yield f"regime S,{mode} {name},H {hidden} B {batch},{slope:.3f},us a step"


def torchs_kernels(dtype: torch.dtype = torch.bfloat16) -> Iterator[str]:
    """What torch.nn, and so cuDNN, runs for each workload."""
    for workload in workloads.load():
        layer = getattr(torch.nn, workload.cell)
        options = {"bidirectional": workload.bidirectional, "device": "cuda", "dtype": dtype}
        module = layer(workload.input, workload.hidden, workload.layers, **options)
        x = torch.randn(workload.time, workload.batch, workload.input, device="cuda", dtype=dtype)
        if workload.lengths is not None:
            x = pack_padded_sequence(x, torch.tensor(workload.lengths))
        with torch.set_grad_enabled(workload.mode == "train"):

            def call(module=module, x=x):
                _, state = module(x)
                last = state[0] if isinstance(state, tuple) else state
                if last.requires_grad:
                    last.sum().backward()

            found = kernels(call)
        for name, microseconds in sorted(found.items(), key=lambda item: -item[1]):
            yield f"torch's kernels,{workload.name} {workload.mode},{name},{microseconds:.1f},us a call"


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
        for line in itertools.chain(head, primitives(), regime_s(), torchs_kernels(), steps()):
            print(line, flush=True)
            print(line, file=file, flush=True)


if __name__ == "__main__":
    main()
