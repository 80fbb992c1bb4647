"""Questions that the workloads do not answer: `python -m bench.studies` and one of these.

length: the time of a step and row for short and long sequences, and for packed ones. memory: the peak of a training
step, fastrnn's and torch.nn's, each in a process of its own (Linux). parts: the forward pass, the backward time loop
and the products after it, one by one. checkpoint: training that keeps the state every so many steps. packing: what a
call costs beside its time steps. reading: batch 1, the rate at which the weights of the recurrence are read. options:
training of layers beyond torch.nn's, beside the plain layer.
"""

import argparse
import functools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from fastrnn import ops
from fastrnn.reference import CELLS

from .machine import read_rate

LENGTHS = (500, 10_000)
LENGTH_SIZES = tuple((cell, *sizes) for cell in ("LSTM", "GRU") for sizes in ((8, 128), (32, 64), (32, 256)))
MEMORY_SIZES = (("LSTM", 128, 256, 100), ("GRU", 128, 256, 100), ("RNN", 128, 256, 100), ("LSTM", 8, 1024, 64))
PARTS_SIZES = (("LSTM", 128, 32), ("LSTM", 32, 64), ("LSTM", 32, 128), ("LSTM", 32, 256), ("GRU", 128, 128))
PARTS_STEPS = 64
CHECKPOINT_SIZES = ((32, 128, 1000), (1, 64, 20_000), (16, 512, 200))
PACKING_SIZES = (("LSTM", 32, 128), ("LSTM", 256, 128), ("LSTM", 32, 512), ("GRU", 32, 512), ("LSTM", 32, 1024))
OPTIONS_SIZES = ((1, 128, 100), (8, 64, 100), (16, 128, 100), (64, 256, 50))
OPTIONS = (
    ("LSTM", {"layer_norm": True}),
    ("GRU", {"layer_norm": True}),
    ("GRU", {"reset_after": False}),
    ("LSTM", {"zoneout": 0.1}),
    ("LSTM", {"recurrent_dropout": 0.2}),
    ("LSTM", {"weight_dropout": 0.2}),
    ("LSTM", {"peephole": True}),
    ("RNN", {"periods": (1, 2, 4, 8)}),
)
READING_SIZES = (("LSTM", 512), ("GRU", 1024), ("LSTM", 1024))

MEMORY_SCRIPT = """
import torch, fastrnn
def kilobytes(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name))
def step(steps, batch):
    input = torch.randn(steps, batch, {hidden}, requires_grad=True)
    output, _ = module(input)
    output.backward(torch.ones_like(output))
module = {library}.{cell}({hidden}, {hidden})
step(2, 2)
module.zero_grad()
before = kilobytes("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
step({steps}, {batch})
step({steps}, {batch})
print((kilobytes("VmHWM") - before) / 1024)
"""


def median(call: Callable[[], object], repeats: int = 5) -> float:
    """Seconds of a call, after two that warm up."""
    durations = []
    for index in range(repeats + 2):
        start = time.perf_counter()
        call()
        if index >= 2:
            durations.append(time.perf_counter() - start)
    return statistics.median(durations)


def training_call(module: torch.nn.Module, input: torch.Tensor) -> Callable[[], object]:
    gradient = torch.ones(*input.shape[:2], module.hidden_size)
    return lambda: torch.autograd.grad(module(input)[0], list(module.parameters()), gradient)


def without_grad(call: Callable[[], object]) -> Callable[[], object]:
    return torch.no_grad()(call)


def length() -> None:
    print(f"microseconds a step and row, T = {LENGTHS[0]} and {LENGTHS[1]}, {torch.get_num_threads()} threads")
    for cell, batch, hidden in LENGTH_SIZES:
        module = getattr(fastrnn, cell)(hidden, hidden)
        for mode in ("infer", "train"):
            times = []
            for steps in LENGTHS:
                input = torch.randn(steps, batch, hidden)
                call = training_call(module, input) if mode == "train" else without_grad(lambda x=input: module(x))  # noqa: B023
                times.append(median(call) / (steps * batch) * 1e6)
            print(f"{cell} B {batch} H {hidden} {mode}: {times[0]:.3f} {times[1]:.3f} ratio {times[1] / times[0]:.2f}")
    module, input = fastrnn.LSTM(256, 256), torch.randn(200, 32, 256)
    lengths = torch.linspace(200, 80, 32).long()
    packed = pack_padded_sequence(input, lengths)
    dense_time = median(without_grad(lambda: module(input))) / (200 * 32)
    packed_time = median(without_grad(lambda: module(packed))) / int(lengths.sum())
    print(f"LSTM B 32 H 256, microseconds a row: dense {1e6 * dense_time:.2f}, packed {1e6 * packed_time:.2f}")


def memory() -> None:
    print("MB of the peak of a training step above what was there before it")
    for cell, batch, hidden, steps in MEMORY_SIZES:
        peaks = []
        for library in ("fastrnn", "torch.nn"):
            script = MEMORY_SCRIPT.format(cell=cell, batch=batch, hidden=hidden, steps=steps, library=library)
            result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
            peaks.append(float(result.stdout))
        print(f"{cell} B {batch} H {hidden} T {steps}: fastrnn {peaks[0]:.0f}, torch.nn {peaks[1]:.0f}")


def parts() -> None:
    torch.set_num_threads(1)
    print("milliseconds, one thread: forward, backward time loop alone, and what each product adds to it")
    for cell, batch, hidden in PARTS_SIZES:
        name, rows = cell.lower(), PARTS_STEPS * batch
        module = getattr(fastrnn, cell)(hidden, hidden)
        weights = [
            getattr(module, f"{kind}_l0").detach()[None] for kind in ("weight_ih", "bias_ih", "weight_hh", "bias_hh")
        ]
        state = torch.zeros(1, batch, hidden)
        cell_state = state if CELLS[name].has_cell_state else None
        x = torch.randn(rows, 1, hidden)
        forward = ("numba", name, x, *weights, None, state, cell_state, None, [0], True)
        output, _, _, gates, hidden_prev, cell_prev, _ = ops.layer_forward(*forward)
        reserve = (gates, hidden_prev, cell_prev if cell_state is not None else None)

        def backward(*needs: bool):
            arguments = ("numba", name, output, None, None, *reserve, x, weights[0], weights[2], None)  # noqa: B023
            return lambda: ops.layer_backward(*arguments, batch, None, [0], 1, [*needs, False])  # noqa: B023

        loop = median(backward(False, False, False, False, False), 15)
        times = {
            "forward": median(lambda: ops.layer_forward(*forward), 15),  # noqa: B023
            "time loop": loop,
            "dx": median(backward(True, False, False, False, False), 15) - loop,
            "dW_ih": median(backward(False, True, False, False, False), 15) - loop,
            "whole backward": median(backward(True, True, True, True, True), 15),
        }
        print(f"{cell} B {batch} H {hidden}: " + ", ".join(f"{part} {1e3 * t:.2f}" for part, t in times.items()))


def alternating(calls: dict[str, Callable[[], object]], repeats: int = 9) -> dict[str, float]:
    """Seconds of each call: medians of turns, after two that warm up."""
    durations = {name: [] for name in calls}
    for index in range(repeats + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if index >= 2:
                durations[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in durations.items()}


def checkpoint() -> None:
    print(f"milliseconds of a training step, LSTM, {torch.get_num_threads()} threads, by steps between kept states")
    for batch, hidden, steps in CHECKPOINT_SIZES:
        module, input = fastrnn.LSTM(hidden, hidden), torch.randn(steps, batch, hidden)

        def call(every):
            module.checkpoint = every  # noqa: B023
            return training_call(module, input)()  # noqa: B023

        times = alternating({str(every): lambda every=every: call(every) for every in (None, 10, 50, 200)}, 7)
        print(f"B {batch} H {hidden} T {steps}: " + ", ".join(f"{name} {1e3 * t:.1f}" for name, t in times.items()))


def packing() -> None:
    print(f"inference, {torch.get_num_threads()} threads: milliseconds of a step, and of the rest of a call")
    for cell, batch, hidden in PACKING_SIZES:
        module = getattr(fastrnn, cell)(hidden, hidden)
        inputs = {steps: torch.randn(steps, batch, hidden) for steps in (8, 40)}
        calls = {steps: without_grad(functools.partial(module, x)) for steps, x in inputs.items()}
        times = alternating(calls, 21)
        step = (times[40] - times[8]) / 32
        rest = times[8] - 8 * step
        print(f"{cell} B {batch} H {hidden}: step {1e3 * step:.3f}, rest {1e3 * rest:.3f}, {rest / step:.1f} steps")


def reading() -> None:
    threads = torch.get_num_threads()
    print(f"batch 1, input size 1, {threads} threads: recurrent weights read, GB/s, and the machine's rate for so many")
    for cell, hidden in READING_SIZES:
        module, input = getattr(fastrnn, cell)(1, hidden), torch.randn(200, 1, 1)
        size = module.weight_hh_l0.numel() * 4
        rate = size * 200 / median(without_grad(functools.partial(module, input)), 25)
        machine = read_rate(size, threads)
        print(f"{cell} H {hidden}: {rate / 1e9:.1f} of {machine / 1e9:.1f}, {100 * rate / machine:.0f}%")


def options() -> None:
    print(f"milliseconds of a training step, {torch.get_num_threads()} threads")
    for batch, hidden, steps in OPTIONS_SIZES:
        input = torch.randn(steps, batch, hidden)
        for cell, chosen in OPTIONS:
            layer, plain = getattr(fastrnn, cell)(hidden, hidden, **chosen), getattr(fastrnn, cell)(hidden, hidden)
            calls = {"with it": training_call(layer, input), "fastrnn without": training_call(plain, input)}
            times = ", ".join(f"{name} {1e3 * time:.2f}" for name, time in alternating(calls).items())
            print(f"{cell} {layer._options} B {batch} H {hidden} T {steps}: {times}")


def main(arguments: Sequence[str] | None = None) -> None:
    studies = {study.__name__: study for study in (length, memory, parts, checkpoint, packing, reading, options)}
    parser = argparse.ArgumentParser(prog="python -m bench.studies", description=__doc__)
    parser.add_argument("study", choices=studies)
    studies[parser.parse_args(arguments).study]()


if __name__ == "__main__":
    main()
