"""`python -m bench`: fastrnn against torch.nn on the workloads of public projects, on the device at hand."""

import argparse
import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import fastrnn

from . import flashrnn, report, results
from .machine import measure
from .plot import plot
from .runner import DTYPES, Job, run
from .workloads import GATES, MODES, Workload, grid, load, select

FOLDER = Path(__file__).parent
SECONDS, QUICK_SECONDS = 10.0, 1.5  # of samples, a row
# What one call may cost in a quick run: its check makes three more, one of them in float64.
QUICK_FLOPS = 3e9


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 1 if a check failed or a workload could not run, 0 otherwise."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    output = options.output or FOLDER / ("out/quick.csv" if options.quick else "results/results.csv")
    try:
        chosen = select(load() + (grid() if options.grid else []), options.workload, options.cell, options.mode)
        workloads = leave_out_dear_ones(chosen, options)
        if options.list:
            print_list(chosen, workloads)
            return 0
        if not workloads:
            raise ValueError("no workload is left to run; name one with --workload, see --list")
        results.check_columns(output)
    except ValueError as error:
        parser.error(str(error))

    rows, failures = run_all(make_jobs(workloads, options), output, options.stop_after)
    if rows:
        print(f"\n{report.table(rows)}\n")
        for dtype, threads in dict.fromkeys((row.dtype, row.threads) for row in rows):
            print(f"floor, {dtype}, {threads} threads: {measure(options.device, DTYPES[dtype], threads)}")
        print(f"results: {output}")
        draw(rows, options.plot or FOLDER / "out" / "ratios.png")
    if failures:
        print(f"{len(failures)} of {len(rows) + len(failures)} failed, see above", file=sys.stderr)
    return 1 if failures else 0


def positive(text: str) -> int:
    """An argument that counts something; argparse reports a ValueError as a wrong value."""
    if (number := int(text)) < 1:
        raise ValueError(text)
    return number


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Times fastrnn against torch.nn on the workloads of public projects: both in one process,"
        " alternating, with the same weights and inputs, each checked before it is timed.",
    )
    add = parser.add_argument
    add("--workload", action="append", default=[], metavar="NAME", help="a name or a pattern; may be repeated")
    add("--cell", action="append", default=[], choices=GATES, help="only this cell; may be repeated")
    add("--mode", action="append", default=[], choices=MODES, help="only this mode; may be repeated")
    add("--dtype", nargs="+", default=["float32"], choices=DTYPES, help="(default: float32)")
    backends = ["auto", *(backend.name for backend in fastrnn.backends()), flashrnn.NAME]
    add(
        "--backend",
        nargs="+",
        default=["auto"],
        choices=backends,
        help="(default: auto, what dispatch picks; flashrnn: that package in place of fastrnn, where it can run)",
    )
    add("--threads", nargs="+", type=positive, default=[torch.get_num_threads()], help="(default: %(default)s)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=torch.device, default=torch.device(device), help=f"(default: {device})")
    add("--grid", action="store_true", help="also cells x batches x hidden sizes, in every mode (grid-*)")
    add("--quick", action="store_true", help="the cheap workloads only, with a small time budget")
    add("--seconds", type=float, help=f"of samples, a row (default: {SECONDS:g}, quick: {QUICK_SECONDS:g})")
    add("--stop-after", type=float, metavar="SECONDS", help="begin no more rows then (default: never)")
    add(
        "--output",
        type=Path,
        metavar="CSV",
        help="(default: bench/results/results.csv, quick: bench/out/quick.csv)",
    )
    add("--plot", type=Path, metavar="PNG", help="(default: bench/out/ratios.png)")
    add("--list", action="store_true", help="list the workloads and stop")
    return parser


def leave_out_dear_ones(workloads: Sequence[Workload], options: argparse.Namespace) -> list[Workload]:
    """Without GPU workloads on a CPU and, in a quick run, dear ones; a workload called by its name stays."""

    def affordable(workload: Workload) -> bool:
        fits = options.device.type != "cpu" or workload.cpu
        return workload.name in options.workload or (fits and (not options.quick or workload.flops <= QUICK_FLOPS))

    kept = [workload for workload in workloads if affordable(workload)]
    left_out = [workload.name for workload in workloads if workload not in kept]
    if left_out:
        print(f"left out, too dear for this run (name one to run it): {', '.join(left_out)}\n")
    return kept


def print_list(workloads: Sequence[Workload], runs: Sequence[Workload]) -> None:
    for workload in workloads:
        layers = f"{workload.layers} × {'2 × ' if workload.bidirectional else ''}{workload.hidden}"
        print(
            f"{workload.name:20} {workload.mode:6} {workload.cell:5} {layers:>12}  input {workload.input:<5}"
            f" T {workload.time:<6} B {workload.batch:<5} {workload.flops / 1e9:>10.3f} GFLOP"
            f"  {'' if workload in runs else 'left out  '}{workload.source}"
        )


def make_jobs(workloads: Sequence[Workload], options: argparse.Namespace) -> list[Job]:
    seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    kinds = itertools.product(options.threads, options.dtype, options.backend, workloads)
    jobs, passed_over = [], {}
    for threads, dtype, backend, workload in kinds:
        if backend == flashrnn.NAME and (reason := flashrnn.objection(workload)):
            passed_over.setdefault(reason, []).append(workload.name)
            continue
        note = "quick" if options.quick else ""
        jobs.append(Job(workload, dtype, options.device, threads, backend, seconds, note))
    for reason, names in passed_over.items():
        print(f"not with FlashRNN, {reason}: {', '.join(dict.fromkeys(names))}\n")
    return jobs


def run_all(
    jobs: Sequence[Job], output: Path, stop_after: float | None = None
) -> tuple[list[results.Result], list[str]]:
    """Runs every job; a row is written as soon as it is measured. Returns the rows and what failed.

    After ``stop_after`` seconds no more is begun: the names of those left are printed.
    """
    rows, explained, failures = [], [], []
    begin = time.monotonic()
    # the GPU's machine may have torch alone
    try:
        from tqdm import tqdm
    except ImportError:
        tqdm = _Plain
    with tqdm(jobs, unit="row", leave=False) as progress:
        for number, job in enumerate(progress):
            if stop_after is not None and time.monotonic() - begin > stop_after:
                progress.write(f"no time left for: {', '.join(map(str, jobs[number:]))}\n")
                break
            progress.set_description(str(job))
            try:
                row, explanation = run(job)
            # Whatever goes wrong in one workload, the others are still measured and the exit code tells.
            except Exception as error:
                failures.append(f"FAILED {job}: {type(error).__name__}: {error}")
                progress.write(failures[-1], file=sys.stderr)
                continue
            results.append(output, [row])
            rows.append(row)
            if explanation:
                explained.append((row.workload, explanation))
    if explained:
        print(report.backends(explained))
    return rows, failures


class _Plain:
    """What is used of tqdm, where there is none: a line for each job."""

    def __init__(self, jobs, **_):
        self.jobs = jobs

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def __iter__(self):
        return iter(self.jobs)

    def set_description(self, text: str) -> None:
        print(text, file=sys.stderr)

    def write(self, text: str, file=None) -> None:
        print(text, file=file)


def draw(rows: Sequence[results.Result], path: Path) -> None:
    try:
        plot([results.as_text(row) for row in rows], path)
    except ImportError as error:
        print(f"no plot: {error} (pip install matplotlib)")
    else:
        print(f"plot: {path}")


if __name__ == "__main__":
    sys.exit(main())
