"""backend × cell × shape × dtype: outputs and every gradient keep the tolerance rule."""

import itertools
from typing import NamedTuple

import pytest
import torch
from helpers import (
    CPU_BACKENDS,
    DTYPES,
    assert_same_as_torch,
    make_pair,
    random_packed,
    random_state,
    run,
)

import fastrnn


class Shape(NamedTuple):
    hidden: int
    batch: int
    steps: int
    features: int
    layers: int
    bidirectional: bool
    packed: bool
    hx: bool
    bias: bool
    batch_first: bool

    def __str__(self):
        words = [
            f"H{self.hidden}",
            f"B{self.batch}",
            f"T{self.steps}",
            f"I{self.features}",
            f"L{self.layers}",
        ]
        words += ["both" if self.bidirectional else "one", "packed" if self.packed else "dense"]
        flags = ["hx" * self.hx, "nobias" * (not self.bias), "batch_first" * self.batch_first]
        return "-".join([*words, *filter(None, flags)])


LEVELS = Shape(
    hidden=(1, 7, 18, 33),
    batch=(1, 3, 97),
    steps=(1, 2, 31),
    features=(1, 13),
    layers=(1, 2),
    bidirectional=(False, True),
    packed=(False, True),
    hx=(False, True),
    bias=(False, True),
    batch_first=(False, True),
)

# Every pair of levels occurs in some row.
SHAPES = [
    #      H   B   T   I  L  both   packed hx     bias   batch_first
    Shape(1, 1, 2, 1, 1, False, False, True, False, True),
    Shape(1, 3, 31, 13, 2, True, False, True, True, False),
    Shape(1, 97, 1, 13, 2, True, True, False, False, True),
    Shape(7, 1, 1, 13, 1, False, True, False, False, True),
    Shape(7, 3, 2, 13, 1, True, True, True, True, False),
    Shape(7, 97, 31, 1, 2, False, False, True, False, True),
    Shape(18, 1, 1, 1, 2, False, False, True, True, False),
    Shape(18, 1, 31, 13, 2, True, True, False, False, False),
    Shape(18, 3, 1, 1, 2, False, False, False, True, True),
    Shape(18, 97, 2, 1, 1, True, False, False, True, True),
    Shape(33, 1, 1, 13, 1, True, False, False, True, False),
    Shape(33, 3, 31, 1, 1, False, False, False, False, True),
    Shape(33, 97, 2, 1, 2, False, True, True, False, False),
]

CELLS = ("rnn_tanh", "rnn_relu", "gru", "lstm", "lstm_proj")

# A projection is smaller than the hidden state, which one hidden unit cannot have.
CELL_SHAPES = [
    (cell, shape) for cell, shape in itertools.product(CELLS, SHAPES) if not (cell == "lstm_proj" and shape.hidden == 1)
]

backends = pytest.mark.parametrize("backend", CPU_BACKENDS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
cell_shapes = pytest.mark.parametrize(("cell", "shape"), CELL_SHAPES, ids=str)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fills what torch.empty returns with NaN, so that a number nobody wrote is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def make_case(cell, shape, dtype, seed):
    class_name, _, variant = cell.partition("_")
    arguments = {
        "num_layers": shape.layers,
        "bias": shape.bias,
        "batch_first": shape.batch_first,
        "bidirectional": shape.bidirectional,
        "dtype": dtype,
    }
    if variant == "proj":
        arguments["proj_size"] = (shape.hidden + 1) // 2
    elif variant:
        arguments["nonlinearity"] = variant
    ours, theirs = make_pair(class_name.upper(), shape.features, shape.hidden, seed=seed, **arguments)
    if shape.packed:
        input = random_packed(shape.batch, shape.steps, shape.features, dtype, seed)
    else:
        generator = torch.Generator().manual_seed(seed)
        input = torch.randn(shape.steps, shape.batch, shape.features, generator=generator).to(dtype)
        if shape.batch_first:
            input = input.transpose(0, 1).contiguous()
    hx = random_state(theirs, shape.batch, dtype, seed) if shape.hx else None
    return ours, theirs, input, hx


def test_shapes_cover_every_pair_of_levels():
    for (i, first), (j, second) in itertools.combinations(enumerate(LEVELS), 2):
        seen = {(shape[i], shape[j]) for shape in SHAPES}
        assert seen == set(itertools.product(first, second)), (Shape._fields[i], Shape._fields[j])


def test_the_backends_are_available():
    available = {info.name: info.reason for info in fastrnn.backends() if info.available}
    assert set(CPU_BACKENDS) <= set(available), fastrnn.backends()


@backends
@dtypes
@cell_shapes
def test_outputs_and_gradients(backend, cell, shape, dtype):
    assert_same_as_torch(lambda seed: make_case(cell, shape, dtype, seed), backend=backend)


@backends
@dtypes
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("shape", [SHAPES[3], SHAPES[4], SHAPES[11]], ids=str)
def test_outputs_without_grad(backend, cell, shape, dtype):
    assert_same_as_torch(lambda seed: make_case(cell, shape, dtype, seed), backend=backend, backward=False)


@backends
@dtypes
@pytest.mark.parametrize("cell", CELLS)
def test_the_same_call_gives_the_same_bits(backend, cell, dtype):
    shape = Shape(33, 97, 7, 13, 2, True, True, True, True, False)
    ours, _, input, hx = make_case(cell, shape, dtype, seed=0)
    with fastrnn.use_backend(backend):
        first = run(ours, input, hx)
        second = run(ours, input, hx)
    for name in first:
        assert torch.equal(first[name], second[name]), name
