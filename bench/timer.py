"""The one timer: alternating calls in one process, on the clock of the device that does the work."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

Call = Callable[[], object]

# A sample is as many calls in a row as fill this time, so that neither the clock's own cost nor the thread
# pool that the other side leaves spinning decides the time of a short call.
SAMPLE_SECONDS = 5e-3
MIN_SAMPLES, MAX_SAMPLES = 5, 200
# Beyond these, a time says more about the machine's other processes than about the call: p80 over p20, and the share
# of the time for which a thread was kept from running. On two cores one busy neighbour makes torch's calls, whose
# threads wait for each other at every step, slower by up to a thousand times; a quiet machine shows 0.01 at most.
NOISY_SPREAD, NOISY_WAIT = 1.5, 0.05


@dataclass(frozen=True)
class Timing:
    """Seconds a call, over all samples."""

    median: float
    p20: float
    p80: float
    samples: int
    waited: float  # threads kept waiting for a core, on average, while this and the others were timed

    @property
    def noisy(self) -> bool:
        return self.p80 > NOISY_SPREAD * self.p20 or self.waited > NOISY_WAIT

    @classmethod
    def of(cls, samples: list[float], waited: float) -> "Timing":
        deciles = statistics.quantiles(samples, n=10, method="inclusive")
        return cls(statistics.median(samples), deciles[1], deciles[7], len(samples), waited)


def seconds(call: Call, device: torch.device, calls: int = 1) -> float:
    """Seconds a call, the mean of `calls` in a row: CUDA events on a GPU, perf_counter on a CPU."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def compare(calls: Mapping[str, Call], device: torch.device, budget: float) -> dict[str, Timing]:
    """Times each of `calls` in turn, round after round, until `budget` seconds are spent.

    The order turns round each time, so that a drift of the clock rate favours neither. A sample of short calls
    follows an untimed one, which brings back its side's caches and wakes its threads. At least MIN_SAMPLES each,
    however long they take; the first call, with what it compiles, must have been made before.
    """
    repeats = {}
    for name, call in calls.items():
        call()
        estimate = min(seconds(call, device) for _ in range(2))
        repeats[name] = max(1, math.ceil(SAMPLE_SECONDS / estimate))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    begin, waited = time.perf_counter(), seconds_waited()
    collecting = gc.isenabled()
    gc.disable()
    try:
        for rounds in range(MAX_SAMPLES):
            if rounds >= MIN_SAMPLES and time.perf_counter() > begin + budget:
                break
            for name in order:
                if repeats[name] > 1:
                    calls[name]()
                samples[name].append(seconds(calls[name], device, repeats[name]))
            order.reverse()
    finally:
        if collecting:
            gc.enable()
    waited = (seconds_waited() - waited) / (time.perf_counter() - begin)
    return {name: Timing.of(values, waited) for name, values in samples.items()}


def seconds_waited() -> float:
    """How long the threads of this process have been ready to run without a core, as Linux counts; elsewhere 0."""
    total = 0
    for statistics_file in Path("/proc/self/task").glob("*/schedstat"):
        # A thread may end, or the kernel keep no such count.
        with suppress(OSError, IndexError):
            total += int(statistics_file.read_text().split()[1])
    return total / 1e9
