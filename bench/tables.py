"""Markdown tables of a results CSV, as docs/performance.md holds them: `python -m bench.tables results.csv`."""

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import geometric_mean

from .results import read
from .workloads import GATES, GRID_BATCHES, GRID_HIDDEN, MODES, Workload

Row = dict[str, str]


def latest(rows: Iterable[Row], dtype: str, threads: str) -> dict[str, Row]:
    """The last row of every workload, by its name."""
    return {row["workload"]: row for row in rows if row["dtype"] == dtype and row["threads"] == threads}


def ratio(row: Row) -> float:
    return float(row["ratio"])


def gigaflops(row: Row) -> float:
    """Of the matrix products of fastrnn's call, a second."""
    fields = {name: int(row[name]) for name in ("input", "hidden", "batch", "time", "layers")}
    workload = Workload(
        name=row["workload"],
        source="",
        cell=row["cell"],
        mode=row["mode"],
        bidirectional=row["bidirectional"] == "True",
        variable=float(row["padding"]),
        **fields,
    )
    return workload.flops / float(row["median_ms"]) / 1e6


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def grid_table(rows: dict[str, Row], mode: str, cell: str, value: Callable[[Row], str]) -> str:
    """Batch sizes down, hidden sizes across."""

    def cell_of(batch: int, hidden: int) -> str:
        row = rows.get(f"grid-{mode}-{cell.lower()}-b{batch}-h{hidden}")
        return "" if row is None else value(row)

    header = [f"{cell}, {mode}", *(f"H {hidden}" for hidden in GRID_HIDDEN)]
    lines = [[f"B {batch}", *(cell_of(batch, hidden) for hidden in GRID_HIDDEN)] for batch in GRID_BATCHES]
    return table(header, [line for line in lines if any(line[1:])])


def summary(rows: dict[str, Row]) -> str:
    """Geometric means and the slowest point, by mode and cell, the grid and the projects' workloads together."""
    lines = []
    for mode in MODES:
        for cell in (*GATES, "all"):
            chosen = [row for row in rows.values() if row["mode"] == mode and cell in (row["cell"], "all")]
            if chosen:
                worst = min(chosen, key=ratio)
                mean = geometric_mean(map(ratio, chosen))
                below = sum(ratio(row) < 1 for row in chosen)
                slowest = f"{ratio(worst):.2f}× ({worst['workload']})"
                lines.append([mode, cell, str(len(chosen)), f"{mean:.2f}×", slowest, str(below)])
    return table(["mode", "cell", "points", "geometric mean", "slowest", "under 1.0×"], lines)


def workloads(rows: dict[str, Row]) -> str:
    chosen = sorted((row for name, row in rows.items() if not name.startswith("grid-")), key=ratio, reverse=True)
    lines = [
        [
            row["workload"] + (" (packed)" if float(row["padding"]) else ""),
            f"{row['cell']}, {row['mode']}",
            f"{float(row['median_ms']):.3g} ms",
            f"{float(row['torch_median_ms']):.3g} ms",
            f"{'~' * ('noisy' in row['note'])}{ratio(row):.2f}×",
            f"{float(row['floor_share']):.0%}",
        ]
        for row in chosen
    ]
    return table(["workload", "cell, mode", "fastrnn", "torch.nn", "ratio", "of the floor"], lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tables", description=__doc__)
    parser.add_argument("csv", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", default="2")
    options = parser.parse_args(arguments)
    rows = latest(read(options.csv), options.dtype, options.threads)
    print(summary(rows))
    print(workloads(rows))
    for mode in MODES:
        for cell in GATES:
            print(grid_table(rows, mode, cell, lambda row: f"{ratio(row):.2f}×"))
    for mode in ("train", "infer"):
        for cell in GATES:
            print(f"GFLOP/s\n\n{grid_table(rows, mode, cell, lambda row: f'{gigaflops(row):.0f}')}")


if __name__ == "__main__":
    main()
