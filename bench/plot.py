"""Draws the ratios of a results CSV: `python -m bench.plot results.csv -o out.png`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from .results import read
from .workloads import MODES

SERIES = ("dtype", "threads", "backend", "device")
COLOURS = {"train": "tab:blue", "infer": "tab:orange", "step": "tab:green"}


def plot(rows: Sequence[dict[str, str]], path: Path) -> None:
    """A bar a workload, grouped by mode, on a logarithmic axis: how many times as fast as torch.nn.

    rows: of the CSV; of several rows for the same thing the last one counts.
    Raises ValueError if there are none.
    """
    if not rows:
        raise ValueError("no results to draw")
    # Drawn to a file, on machines without a display.
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    latest = {(row["workload"], *(row[name] for name in SERIES)): row for row in rows}.values()
    varying = [name for name in SERIES if len({row[name] for row in latest}) > 1]
    common = ", ".join(describe(name, next(iter(latest))[name]) for name in SERIES if name not in varying)
    groups = {mode: [row for row in latest if row["mode"] == mode] for mode in MODES}
    groups = {mode: sorted(group, key=lambda row: float(row["ratio"])) for mode, group in groups.items() if group}

    sizes = [len(group) for group in groups.values()]
    figure, axes = pyplot.subplots(
        len(groups),
        sharex=True,
        squeeze=False,
        figsize=(9, 1.6 + 0.32 * sum(sizes)),
        height_ratios=sizes,
        layout="constrained",
    )
    for (mode, group), axis in zip(groups.items(), axes[:, 0], strict=True):
        ratios = [float(row["ratio"]) for row in group]
        labels = [" ".join([row["workload"], *(describe(name, row[name]) for name in varying)]) for row in group]
        # Bars from 1.0, so that a slower one points to the left.
        bars = axis.barh(range(len(group)), [ratio - 1 for ratio in ratios], left=1, color=COLOURS[mode], height=0.7)
        axis.bar_label(bars, [f"{ratio:.2f}×" for ratio in ratios], padding=3, fontsize=8)
        axis.set_yticks(range(len(group)), labels, fontsize=8)
        axis.set_ylabel(mode)
        axis.axvline(1.0, color="black", linewidth=1)
        axis.grid(axis="x", which="both", alpha=0.3)
        axis.set_axisbelow(True)
    bottom = axes[-1, 0]
    bottom.set_xscale("log", base=2)
    bottom.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    low, high = bottom.get_xlim()
    bottom.set_xlim(min(low, 0.7) / 1.2, max(high, 1.4) * 1.3)  # room for the labels at the bars' ends
    bottom.set_xlabel("time of torch.nn / time of fastrnn: right of 1 is faster")
    figure.suptitle(f"fastrnn against torch.nn\n{common}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150 if sum(sizes) < 60 else 80)
    pyplot.close(figure)


def describe(name: str, value: str) -> str:
    return f"{value} thread{'s' if value != '1' else ''}" if name == "threads" else value


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    parser.add_argument("csv", type=Path, help="results of python -m bench")
    parser.add_argument("-o", "--output", type=Path, default=Path("ratios.png"), help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        plot(read(options.csv), options.output)
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"{options.csv}: {error}")
    print(options.output)


if __name__ == "__main__":
    main()
