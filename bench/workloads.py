"""The workloads: recurrent layers as public projects use them, read from workloads.toml."""

import itertools
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path

WORKLOADS_FILE = Path(__file__).with_name("workloads.toml")

MODES = ("train", "infer", "step")
GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


@dataclass(frozen=True)
class Workload:
    """One recurrent module and the shape of its input; the fields are those of workloads.toml."""

    name: str
    source: str
    cell: str
    input: int
    hidden: int
    batch: int
    time: int
    mode: str
    layers: int = 1
    bidirectional: bool = False
    variable: float = 0.0
    resets: float = 0.0
    layer_norm: bool = False
    cpu: bool = False

    def __post_init__(self) -> None:
        if self.cell not in GATES or self.mode not in MODES or not 0 <= self.variable < 0.5:
            raise ValueError(
                f"workload {self.name!r}: cell must be one of {', '.join(GATES)}, mode one of"
                f" {', '.join(MODES)} and variable in [0, 0.5), got {self.cell!r}, {self.mode!r} and {self.variable}"
            )
        if self.resets and (self.bidirectional or self.variable or self.mode == "step"):
            raise ValueError(f"workload {self.name!r}: resets go with sequences of one length and one direction")

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def layer_inputs(self) -> list[int]:
        """The input size of each layer."""
        return [self.input] + [self.directions * self.hidden] * (self.layers - 1)

    @property
    def lengths(self) -> list[int] | None:
        """The length of each sequence, longest first; None where there is no padding.

        Evenly spread from `time` down to (1 - 2·variable)·time, so that the share of padding is `variable`.
        """
        if not self.variable:
            return None
        shortest = (1 - 2 * self.variable) * self.time
        spread = (self.time - shortest) / max(1, self.batch - 1)
        return [max(1, round(self.time - b * spread)) for b in range(self.batch)]

    @cached_property
    def rows(self) -> int:
        """Time steps of all sequences, padding not counted."""
        return self.batch * self.time if self.lengths is None else sum(self.lengths)

    @property
    def flops(self) -> int:
        """Of the input projections and the recurrent products, for each layer and direction.

        A multiply-add counts 2. Training counts three times: backward has a product of the same size for the
        gradient of the input and one for that of the weight.
        """
        gates = GATES[self.cell] * self.hidden
        forward = sum(2 * self.rows * self.directions * gates * (size + self.hidden) for size in self.layer_inputs)
        return 3 * forward if self.mode == "train" else forward

    @property
    def left_out(self) -> list[str]:
        """What the project has that one side or none runs here, for torch.nn has no such thing."""
        return ["torch without resets"] * bool(self.resets) + ["layer_norm not applied"] * self.layer_norm


def load(path: Path = WORKLOADS_FILE) -> list[Workload]:
    """Every workload of a TOML file, in its order."""
    with path.open("rb") as file:
        return [Workload(**fields) for fields in tomllib.load(file)["workload"]]


GRID_BATCHES, GRID_HIDDEN = (1, 8, 32, 128), (32, 64, 128, 256, 512, 1024)
# Steps of a grid's sequences, and of those whose batch x hidden size is beyond the limit: seconds a call otherwise.
GRID_TIME, GRID_SHORT_TIME, GRID_LIMIT = 64, 24, 32 << 10


def grid() -> list[Workload]:
    """Every cell, batch and hidden size (the input's too) in every mode; single steps of small batches only."""
    return [
        Workload(
            name=f"grid-{mode}-{cell.lower()}-b{batch}-h{hidden}",
            source="a grid over sizes",
            cell=cell,
            input=hidden,
            hidden=hidden,
            batch=batch,
            time=1 if mode == "step" else GRID_TIME if batch * hidden <= GRID_LIMIT else GRID_SHORT_TIME,
            mode=mode,
            cpu=True,
        )
        for mode, cell, batch, hidden in itertools.product(MODES, GATES, GRID_BATCHES, GRID_HIDDEN)
        if mode != "step" or batch <= 8
    ]


def select(
    workloads: Sequence[Workload],
    patterns: Sequence[str] = (),
    cells: Sequence[str] = (),
    modes: Sequence[str] = (),
) -> list[Workload]:
    """The workloads whose name matches a pattern (`*`, `?`), of these cells and modes; empty: all of them.

    Raises ValueError for a pattern that matches no name.
    """
    for pattern in patterns:
        if not any(fnmatchcase(workload.name, pattern) for workload in workloads):
            names = ", ".join(workload.name for workload in workloads)
            raise ValueError(f"no workload is called {pattern!r}; there are: {names}")
    return [
        workload
        for workload in workloads
        if (not patterns or any(fnmatchcase(workload.name, pattern) for pattern in patterns))
        and (not cells or workload.cell in cells)
        and (not modes or workload.mode in modes)
    ]
