"""What this machine can do, measured at the start: its rate of multiply-adds and how fast it reads memory."""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.nn.functional import linear

from .timer import Call, seconds

# Bytes that each thread reads over and over: one size for each level of a CPU's memory. A GPU has one.
CPU_READS = (16 << 10, 256 << 10, 4 << 20, 64 << 20)
GPU_COPY = 1 << 30

CPU_MATRIX, GPU_MATRIX = 512, 8192  # larger ones were no faster
HORNER_STEPS = 16


@dataclass(frozen=True)
class Machine:
    """The best rates that any engine reached with the threads used."""

    flops: float  # a second
    bandwidths: tuple[tuple[int, float], ...]  # (bytes, bytes a second), the smallest working set first

    def __str__(self) -> str:
        reads = ", ".join(f"{rate / 1e9:.0f} GB/s from {size >> 10} KiB" for size, rate in self.bandwidths)
        return f"{self.flops / 1e9:.0f} GFLOP/s; reads {reads}"

    def bandwidth(self, size: int) -> float:
        """Bytes a second from the level of memory that holds a working set of `size` bytes."""
        smaller = [rate for measured, rate in self.bandwidths if measured < size]
        others = [rate for measured, rate in self.bandwidths if measured >= size]
        # Between two measured sizes the smaller one's rate: a floor must not lie above what can be reached.
        return max(smaller[-1:] + others)


@cache
def measure(device: torch.device, dtype: torch.dtype, threads: int) -> Machine:
    """Measures in about a second. `threads` must be torch's number of threads at this moment."""
    if device.type == "cuda":
        source = torch.empty(GPU_COPY, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        copying = best(lambda: target.copy_(source), device)
        return Machine(matrix_flops(device, dtype), ((2 * GPU_COPY, 2 * GPU_COPY / copying),))
    # float16 and bfloat16 are stored so and computed in float32, unless the CPU has instructions of its own.
    computed = torch.promote_types(dtype, torch.float32)
    flops = max(matrix_flops(device, dtype), matrix_flops(device, computed), vector_flops(computed, threads))
    return Machine(flops, tuple((threads * size, read_rate(size, threads)) for size in CPU_READS))


def best(call: Call, device: torch.device, budget: float = 0.1) -> float:
    """Seconds of the fastest call in `budget` seconds, after one that warms up."""
    call()
    fastest, spent = math.inf, 0.0
    while spent < budget:
        duration = seconds(call, device)
        fastest, spent = min(fastest, duration), spent + duration
    return fastest


def matrix_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The best rate of a square matrix product: torch.mm, and on a CPU oneDNN with packed weights."""
    size = GPU_MATRIX if device.type == "cuda" else CPU_MATRIX
    a, b = torch.rand(2, size, size, device=device).to(dtype)
    durations = []
    with torch.no_grad(), tf32_as_in_recurrent_layers():
        durations.append(best(lambda: torch.mm(a, b), device))
        if device.type == "cpu" and torch.backends.mkldnn.is_available():
            # oneDNN has no float64, and float16 only on some CPUs.
            with suppress(RuntimeError):
                packed = a.to_mkldnn(), b.to_mkldnn()
                durations.append(best(lambda: linear(*packed), device))
    return 2 * size**3 / min(durations)


@contextmanager
def tf32_as_in_recurrent_layers() -> Iterator[None]:
    """torch's recurrent layers follow cuDNN's switch for TF32; here its matrix products do so too."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def vector_flops(dtype: torch.dtype, threads: int) -> float:
    """The rate of multiply-adds in registers; 0 where numba is missing."""
    if (kernels := numba_kernels()) is None:
        return 0.0
    horner, _ = kernels
    size, repeats = 1024, 2000
    arrays = [torch.ones(size, dtype=dtype).numpy() for _ in range(threads)]
    factor, term = arrays[0].dtype.type(0.5), arrays[0].dtype.type(0.25)
    work = 2 * HORNER_STEPS * size * repeats
    return work * calls_per_second(lambda array: horner(array, factor, term, repeats), arrays)


def read_rate(size: int, threads: int) -> float:
    """Bytes a second when each thread reads `size` bytes of its own again and again."""
    repeats = max(1, (16 << 20) // size)
    arrays = [torch.ones(size // 4).numpy() for _ in range(threads)]
    if (kernels := numba_kernels()) is None:
        return size * calls_per_second(lambda array: array.sum(), arrays)
    _, read = kernels
    return size * repeats * calls_per_second(lambda array: read(array, repeats), arrays)


def calls_per_second(work: Callable[[Any], object], arrays: list) -> float:
    """Calls of `work` a second, each thread on its array: the sum of what each reaches at its best.

    Each thread has its own clock, and its best moment counts: the rate of all together would fall with every
    other process that takes a core for a while, and a floor must not rise with it.
    """
    with ThreadPoolExecutor(len(arrays)) as pool:
        durations = pool.map(lambda array: best(lambda: work(array), torch.device("cpu")), arrays)
        return sum(1 / duration for duration in durations)


@cache
def numba_kernels() -> tuple[Callable, Callable] | None:
    """A loop of multiply-adds and a loop that only reads, both without the interpreter's lock."""
    try:
        from numba import njit
    except ImportError:
        return None

    @njit(nogil=True, fastmath=True)
    def horner(array, factor, term, repeats):
        # A polynomial of each element: long enough to hide the load and the store, and the elements are
        # independent, so that the compiler makes vectors of them and the processor overlaps them. The coefficients
        # are arguments: with constants the compiler would fold all steps into one.
        for _ in range(repeats):
            for index in range(array.size):
                value = array[index]
                for _ in range(HORNER_STEPS):
                    value = value * factor + term
                array[index] = value

    @njit(nogil=True, fastmath=True)
    def read(array, repeats):
        total = array[0]
        for repeat in range(repeats):
            once = array[0]
            for index in range(array.size):
                once += array[index]
            # The factor keeps the compiler from reading only once.
            total += once * array.dtype.type(repeat)
        return total

    return horner, read
