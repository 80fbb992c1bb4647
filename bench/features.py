"""What torch.nn's layers cannot do, against what people write instead: ``python -m bench.features``.

A training step each. resets: 1% of the steps begin an episode, beside a loop over torch's cell and torch's layer
without them. lengths: 30% of the batch is padding, beside torch's packed call. layer-norm: beside a loop of torch
operations. Results are compared in float64 before anything is timed; rows go to a table of their own.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn

from . import report, results, timer
from .floor import floor_seconds
from .machine import measure
from .workloads import Workload

OUTPUT = Path(__file__).parent / "results/features.csv"
RESETS_SIZES = ((8, 64, 128), (32, 64, 128), (8, 256, 128), (256, 128, 64))
PADDING_SIZES = (("LSTM", 32, 64, 100), ("LSTM", 32, 256, 200), ("GRU", 32, 256, 200), ("RNN", 32, 128, 100))
NORM_SIZES = ((1, 128, 100), (8, 64, 100), (16, 128, 100), (64, 256, 50))
RESETS, PADDING = 0.01, 0.3
# Loops and layers add up in different orders: to what they agree in float64, relative to the largest value.
AGREEMENT = 1e-10

# Gives the output and the parameters' gradients.
Call = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Feature:
    """Calls that do the same work: fastrnn's, and others by the name of what runs them.

    Those in ``differing`` leave out what they cannot do, and give other numbers.
    """

    workload: Workload
    ours: Call
    others: dict[str, Call]
    differing: tuple[str, ...] = ()


def training(module: nn.Module, run: Callable[[], Tensor], gradient: Tensor) -> Call:
    def call():
        output = run()
        return output, *torch.autograd.grad(output, list(module.parameters()), gradient)

    return call


def workload_of(name: str, cell: str, sizes: tuple[int, int, int], **options) -> Workload:
    batch, hidden, steps = sizes
    shape = {"input": hidden, "hidden": hidden, "batch": batch, "time": steps}
    return Workload(f"{name}-{cell.lower()}-b{batch}-h{hidden}", "a feature", cell, mode="train", **shape, **options)


def pair_of(cell: str, hidden: int, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    ours, theirs = (getattr(library, cell)(hidden, hidden, dtype=dtype) for library in (fastrnn, nn))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def with_resets(sizes: tuple[int, int, int], dtype: torch.dtype) -> Feature:
    batch, hidden, steps = sizes
    ours, theirs = pair_of("LSTM", hidden, dtype)
    input, gradient = torch.randn(steps, batch, hidden, dtype=dtype), torch.ones(steps, batch, hidden, dtype=dtype)
    resets = torch.rand(steps, batch) < RESETS
    cell = nn.LSTMCell(hidden, hidden, dtype=dtype)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in theirs.state_dict().items()})
    keep = (~resets).to(dtype)[:, :, None]

    def loop() -> Tensor:
        """What people write today: the state multiplied by 1 - done."""
        h = c = input.new_zeros(batch, hidden)
        outputs = []
        for x, kept in zip(input, keep, strict=True):
            h, c = cell(x, (h * kept, c * kept))
            outputs.append(h)
        return torch.stack(outputs)

    return Feature(
        workload_of("resets", "LSTM", sizes, resets=RESETS),
        training(ours, lambda: ours(input, resets=resets)[0], gradient),
        {
            "loop over nn.LSTMCell": training(cell, loop, gradient),
            "nn.LSTM": training(theirs, lambda: theirs(input)[0], gradient),
            "fastrnn.LSTM": training(ours, lambda: ours(input)[0], gradient),
        },
        differing=("nn.LSTM", "fastrnn.LSTM"),
    )


def with_padding(cell: str, sizes: tuple[int, int, int], dtype: torch.dtype) -> Feature:
    batch, hidden, steps = sizes
    ours, theirs = pair_of(cell, hidden, dtype)
    workload = workload_of("lengths", cell, sizes, variable=PADDING)
    input, gradient = torch.randn(steps, batch, hidden, dtype=dtype), torch.ones(steps, batch, hidden, dtype=dtype)
    lengths = torch.tensor(workload.lengths)[torch.randperm(batch)]

    def packed(module: nn.Module) -> Tensor:
        output, _ = module(pack_padded_sequence(input, lengths, enforce_sorted=False))
        return pad_packed_sequence(output)[0]

    return Feature(
        workload,
        training(ours, lambda: ours(input, lengths=lengths)[0], gradient),
        {
            f"nn.{cell}, packed": training(theirs, lambda: packed(theirs), gradient),
            f"fastrnn.{cell}, packed": training(ours, lambda: packed(ours), gradient),
            f"fastrnn.{cell}, padding as steps": training(ours, lambda: ours(input)[0], gradient),
        },
        differing=(f"fastrnn.{cell}, padding as steps",),
    )


def with_layer_norm(sizes: tuple[int, int, int], dtype: torch.dtype) -> Feature:
    batch, hidden, steps = sizes
    layer = fastrnn.LSTM(hidden, hidden, layer_norm=True, dtype=dtype)
    plain = fastrnn.LSTM(hidden, hidden, dtype=dtype)
    input, gradient = torch.randn(steps, batch, hidden, dtype=dtype), torch.ones(steps, batch, hidden, dtype=dtype)

    def loop() -> Tensor:
        h = c = input.new_zeros(batch, hidden)
        outputs = []
        for x in input:
            gates_x, gates_h = linear(x, layer.weight_ih_l0), linear(h, layer.weight_hh_l0)
            gates_x = layer_norm(gates_x, (4 * hidden,), layer.weight_ln_ih_l0, layer.bias_ln_ih_l0)
            gates_h = layer_norm(gates_h, (4 * hidden,), layer.weight_ln_hh_l0, layer.bias_ln_hh_l0)
            i, f, g, o = (gates_x + gates_h + layer.bias_ih_l0 + layer.bias_hh_l0).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * layer_norm(c, (hidden,), layer.weight_ln_c_l0, layer.bias_ln_c_l0).tanh()
            outputs.append(h)
        return torch.stack(outputs)

    return Feature(
        workload_of("layer-norm", "LSTM", sizes),
        training(layer, lambda: layer(input)[0], gradient),
        {
            "loop of torch operations": training(layer, loop, gradient),
            "fastrnn.LSTM": training(plain, lambda: plain(input)[0], gradient),
        },
        differing=("fastrnn.LSTM",),
    )


def features(dtype: torch.dtype) -> Iterator[Feature]:
    for sizes in RESETS_SIZES:
        yield with_resets(sizes, dtype)
    for cell, *sizes in PADDING_SIZES:
        yield with_padding(cell, tuple(sizes), dtype)
    for sizes in NORM_SIZES:
        yield with_layer_norm(sizes, dtype)


def check(feature: Feature) -> None:
    """Raises AssertionError if another call that does the same gives other numbers."""
    mine = feature.ours()
    for name in feature.others.keys() - set(feature.differing):
        for ours, theirs in zip(mine, feature.others[name](), strict=True):
            difference = (ours - theirs).abs().max() / theirs.abs().max()
            assert difference <= AGREEMENT, f"{feature.workload.name} differs from {name} by {difference:.1e}"


def rows(feature: Feature, threads: int, budget: float) -> Iterator[results.Result]:
    """A row for every other call, all timed in turn."""
    device, workload = torch.device("cpu"), feature.workload
    first_call = timer.seconds(feature.ours, device)
    timings = timer.compare({"ours": feature.ours, **feature.others}, device, budget)
    mine = timings.pop("ours")
    floor = floor_seconds(workload, torch.float32, device, measure(device, torch.float32, threads))
    for name, theirs in timings.items():
        yield results.row(
            workload,
            device,
            "float32",
            threads,
            backend="numba",
            first_call=first_call,
            ours=mine,
            torch_module=name,
            theirs=theirs,
            floor=floor,
            notes=["without the feature"] * (name in feature.differing),
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.features", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of samples, a feature (default: %(default)g)")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="CSV", help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    results.check_columns(options.output)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    measured = []
    with fastrnn.use_backend("numba"):
        for exact, feature in zip(features(torch.float64), features(torch.float32), strict=True):
            check(exact)
            found = list(rows(feature, options.threads, options.seconds))
            results.append(options.output, found)
            measured += found
            print(f"{feature.workload.name}: {report.duration(found[0].median_ms)}", file=sys.stderr)
    print(report.table(measured))
    return 0


if __name__ == "__main__":
    sys.exit(main())
