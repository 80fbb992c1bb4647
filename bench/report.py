"""What a run prints at its end: a table of the times, their means, and which backend ran what."""

from collections.abc import Callable, Sequence
from statistics import geometric_mean

import fastrnn

from .results import Result
from .workloads import MODES


def mark(note: str) -> str:
    """A sign behind a workload's name, explained below the table."""
    return "*" * ("not applied" in note) + "°" * ("without resets" in note)


# Header, alignment and how a cell is written.
COLUMNS: tuple[tuple[str, str, Callable[[Result], str]], ...] = (
    ("workload", "<", lambda row: row.workload + mark(row.note)),
    ("cell", "<", lambda row: row.cell),
    ("mode", "<", lambda row: row.mode),
    ("dtype", "<", lambda row: row.dtype),
    ("threads", ">", lambda row: str(row.threads)),
    ("backend", "<", lambda row: row.backend),
    ("ours", ">", lambda row: duration(row.median_ms)),
    ("torch", ">", lambda row: duration(row.torch_median_ms)),
    ("by", "<", lambda row: row.torch_module),
    ("ratio", ">", lambda row: f"{'~' if 'noisy' in row.note else ''}{row.ratio:.2f}×"),
    ("floor", ">", lambda row: duration(row.floor_ms)),
    ("of floor", ">", lambda row: f"{row.floor_share:.0%}"),
    ("first call", ">", lambda row: duration(row.first_call_ms)),
)


def table(rows: Sequence[Result]) -> str:
    """One line a row, then the geometric means of the ratios."""
    lines = [[title for title, _, _ in COLUMNS], *([write(row) for _, _, write in COLUMNS] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(f"{cell:{align}{width}}" for cell, (_, align, _), width in zip(line, COLUMNS, widths, strict=True))
        for line in lines
    ]
    text.insert(1, "  ".join("-" * width for width in widths))
    ratios = {mode: [row.ratio for row in rows if row.mode == mode] for mode in MODES}
    means = [f"{mode} {geometric_mean(values):.2f}×" for mode, values in ratios.items() if values]
    overall = geometric_mean([row.ratio for row in rows])
    text.append(f"\nratio = time of torch.nn / time of fastrnn; geometric mean {overall:.2f}× ({', '.join(means)})")
    if any("not applied" in row.note for row in rows):
        text.append("* without its layer_norm, on both sides: torch.nn has none")
    if any("without resets" in row.note for row in rows):
        text.append("° with its resets; torch's layer, which knows none, without")
    if any("noisy" in row.note for row in rows):
        text.append("~ noisy: other processes took the cores meanwhile; measure again on a quiet machine")
    return "\n".join(text)


def backends(explained: Sequence[tuple[str, fastrnn.Explanation]]) -> str:
    """Which backend ran each workload and why others were passed over, workloads of one answer together."""
    answers: dict[str, list[str]] = {}
    for name, explanation in explained:
        for layer in explanation.layers:
            reasons = "; ".join(f"{other}: {reason}" for other, reason in layer.passed_over)
            answer = layer.backend + (f" (passed over {reasons})" if reasons else "")
            names = answers.setdefault(answer, [])
            if name not in names:
                names.append(name)
    return "\n".join(f"{answer}: {', '.join(names)}" for answer, names in answers.items())


def duration(milliseconds: float) -> str:
    """Three significant digits in the unit that suits."""
    for unit, size in (("s", 1e3), ("ms", 1.0)):
        if milliseconds >= size:
            return f"{milliseconds / size:.3g} {unit}"
    return f"{1e3 * milliseconds:.3g} µs"
