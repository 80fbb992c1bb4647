"""Runs one workload: the first call, the check, then the clock; and says how far it is from the floor."""

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

import fastrnn

from . import check, flashrnn, timer
from .cases import Case, Pair, build
from .floor import floor_seconds
from .machine import measure
from .results import Result, row
from .workloads import Workload

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Job:
    """One row to be: a workload and how to run it."""

    workload: Workload
    dtype: str
    device: torch.device
    threads: int
    backend: str  # a name, auto for the one that dispatch picks, or flashrnn for that package in place of fastrnn
    budget: float  # seconds for the samples of all sides together
    note: str = ""

    def __str__(self) -> str:
        return f"{self.workload.name} ({self.dtype}, {self.threads} threads, backend {self.backend})"


class CheckFailed(Exception):
    """fastrnn's results break the tolerance rule; the message has a line for each."""


def side_of(pair: Pair, job: Job) -> Case:
    """What a job times against torch.nn."""
    if job.backend != flashrnn.NAME:
        return pair.ours
    return replace(pair.ours, module=flashrnn.FlashRNN(pair.ours.module))


def run(job: Job) -> tuple[Result, fastrnn.Explanation | None]:
    """Measures one row.

    Raises CheckFailed, before anything is timed, if the results are wrong; whatever fastrnn or torch raise for
    a call that they cannot run passes through. What FlashRNN gets wrong is not ours to mend: its row's note says so.
    """
    workload, device, dtype = job.workload, job.device, DTYPES[job.dtype]
    torch.set_num_threads(job.threads)
    pair, notes = build(workload, dtype, device), [job.note, *workload.left_out]
    ours, calls = side_of(pair, job).callable(), pair.torch_calls()
    named = job.backend not in ("auto", flashrnn.NAME)
    forced = fastrnn.use_backend(job.backend) if named else nullcontext()
    with forced, torch.set_grad_enabled(workload.mode == "train"):
        explanation = None
        if job.backend != flashrnn.NAME:
            explanation = fastrnn.explain(pair.ours.module, pair.ours.inputs.input)
        first_call = timer.seconds(ours, device)
        if found := check.problems(workload, dtype, device, lambda pair: side_of(pair, job)):
            if explanation:
                raise CheckFailed("\n".join(found))
            notes.append(f"{len(found)} results outside the tolerance rule")
        machine = measure(device, dtype, job.threads)
        timings = timer.compare({"fastrnn": ours, **calls}, device, job.budget)

    mine = timings.pop("fastrnn")
    torch_module, theirs = min(timings.items(), key=lambda item: item[1].median)
    backends = [layer.backend for layer in explanation.layers] if explanation else [job.backend]
    result = row(
        workload,
        device,
        job.dtype,
        job.threads,
        backend="+".join(dict.fromkeys(backends)),
        first_call=first_call,
        ours=mine,
        torch_module=torch_module,
        theirs=theirs,
        floor=floor_seconds(workload, dtype, device, machine),
        notes=notes,
    )
    return result, explanation
