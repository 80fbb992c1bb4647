"""Bad input raises what torch raises, type and message, and never crashes; NaN and infinity pass through."""

import math
from functools import partial

import pytest
import torch
from helpers import (
    CELL_CLASSES,
    CPU_BACKENDS,
    DTYPES,
    LAYER_CLASSES,
    assert_same_as_torch,
    assert_same_error,
    make_pair,
    outcome,
    random_state,
    run,
)
from torch.nn.utils.rnn import PackedSequence

import fastrnn

FEATURES, HIDDEN, BATCH, STEPS = 4, 6, 3, 5

backends = pytest.mark.parametrize("backend", CPU_BACKENDS)
layers = pytest.mark.parametrize("class_name", LAYER_CLASSES)
cells = pytest.mark.parametrize("class_name", CELL_CLASSES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def like_state(class_name, tensor):
    """A tensor where the class takes one, a pair of them for an LSTM."""
    return (tensor, tensor.clone()) if class_name.startswith("LSTM") else tensor


LAYER_INPUTS = {
    "1D": lambda: draw(FEATURES),
    "0D": lambda: draw(),
    "4D": lambda: draw(2, STEPS, BATCH, FEATURES),
    "features": lambda: draw(STEPS, BATCH, FEATURES + 1),
    "unbatched features": lambda: draw(STEPS, FEATURES - 1),
    "no features": lambda: draw(STEPS, BATCH, 0),
    "T 0": lambda: draw(0, BATCH, FEATURES),
    "T 0 unbatched": lambda: draw(0, FEATURES),
    "T 0 and B 0": lambda: draw(0, 0, FEATURES),
    "float64": lambda: draw(STEPS, BATCH, FEATURES).double(),
    "bfloat16": lambda: draw(STEPS, BATCH, FEATURES).bfloat16(),
    "int64": lambda: torch.ones(STEPS, BATCH, FEATURES, dtype=torch.int64),
    "bool": lambda: torch.ones(STEPS, BATCH, FEATURES, dtype=torch.bool),
    "complex64": lambda: torch.ones(STEPS, BATCH, FEATURES, dtype=torch.complex64),
    "meta": lambda: torch.empty(STEPS, BATCH, FEATURES, device="meta"),
    "wrong dtype and shape": lambda: draw(STEPS, BATCH, FEATURES + 1).double(),
    "None": lambda: None,
    "list": lambda: [draw(BATCH, FEATURES)],
    "array": lambda: draw(STEPS, BATCH, FEATURES).numpy(),
    "number": lambda: 3.0,
    "string": lambda: "input",
}


@layers
@pytest.mark.parametrize("batch_first", [False, True], ids=["time_first", "batch_first"])
@pytest.mark.parametrize("bad", LAYER_INPUTS)
def test_bad_input_of_layers(class_name, batch_first, bad):
    ours, theirs = make_pair(class_name, FEATURES, HIDDEN, 2, batch_first=batch_first)
    input = LAYER_INPUTS[bad]()
    if bad in ("T 0", "T 0 unbatched", "T 0 and B 0") and batch_first and input.dim() == 3:
        input = input.transpose(0, 1)
    assert_same_error(partial(ours, input), partial(theirs, input))


@backends
@layers
@pytest.mark.parametrize("bad", LAYER_INPUTS)
def test_a_forced_backend_raises_too(backend, class_name, bad):
    ours, theirs = make_pair(class_name, FEATURES, HIDDEN)
    input = LAYER_INPUTS[bad]()
    with fastrnn.use_backend(backend):
        got = outcome(partial(ours, input))
    expected = outcome(partial(theirs, input))
    assert isinstance(got, type(expected)), (got, expected)


@layers
def test_a_meta_module_with_input_on_the_cpu(class_name):
    ours, theirs = make_pair(class_name, FEATURES, HIDDEN, device="meta")
    input = draw(STEPS, BATCH, FEATURES)
    assert_same_error(partial(ours, input), partial(theirs, input))


STATES = {
    "2D": lambda: draw(BATCH, HIDDEN),
    "4D": lambda: draw(1, 1, BATCH, HIDDEN),
    "1D": lambda: draw(HIDDEN),
    "layers": lambda: draw(2, BATCH, HIDDEN),
    "batch": lambda: draw(1, BATCH + 1, HIDDEN),
    "batch of one": lambda: draw(1, 1, HIDDEN),
    "hidden": lambda: draw(1, BATCH, HIDDEN - 1),
    "empty": lambda: draw(1, BATCH, 0),
    "float64": lambda: draw(1, BATCH, HIDDEN).double(),
    "bfloat16": lambda: draw(1, BATCH, HIDDEN).bfloat16(),
    "int64": lambda: torch.ones(1, BATCH, HIDDEN, dtype=torch.int64),
    "meta": lambda: torch.empty(1, BATCH, HIDDEN, device="meta"),
}


@layers
@pytest.mark.parametrize("bad", STATES)
def test_bad_state_of_layers(class_name, bad):
    ours, theirs = make_pair(class_name, FEATURES, HIDDEN)
    hx = like_state(class_name, STATES[bad]())
    for input in (draw(STEPS, BATCH, FEATURES), draw(STEPS, FEATURES), draw(STEPS, 0, FEATURES)):
        assert_same_error(partial(ours, input, hx), partial(theirs, input, hx))


@pytest.mark.parametrize("bad", STATES)
@pytest.mark.parametrize("part", [0, 1], ids=["h_0", "c_0"])
def test_one_bad_half_of_an_lstms_state(bad, part):
    ours, theirs = make_pair("LSTM", FEATURES, HIDDEN)
    hx = [draw(1, BATCH, HIDDEN), draw(1, BATCH, HIDDEN)]
    hx[part] = STATES[bad]()
    input = draw(STEPS, BATCH, FEATURES)
    assert_same_error(partial(ours, input, tuple(hx)), partial(theirs, input, tuple(hx)))


@pytest.mark.parametrize("sizes", [(HIDDEN, HIDDEN), (2, 2), (HIDDEN, 2), (3, HIDDEN)], ids=str)
def test_state_sizes_with_a_projection(sizes):
    ours, theirs = make_pair("LSTM", FEATURES, HIDDEN, proj_size=2)
    input, hx = draw(STEPS, BATCH, FEATURES), tuple(draw(1, BATCH, size) for size in sizes)
    assert_same_error(partial(ours, input, hx), partial(theirs, input, hx))


WRONG_TYPES = {
    "number": lambda: 3,
    "string": lambda: "ab",
    "list of one": lambda: [draw(1, BATCH, HIDDEN)],
    "tuple of one": lambda: (draw(1, BATCH, HIDDEN),),
    "tuple of three": lambda: (draw(1, BATCH, HIDDEN),) * 3,
    "tuple of None": lambda: (None, None),
    "empty tuple": lambda: (),
    "dict": lambda: {0: draw(1, BATCH, HIDDEN), 1: draw(1, BATCH, HIDDEN)},
    "False": lambda: False,
}


@layers
@pytest.mark.parametrize("bad", WRONG_TYPES)
def test_state_of_a_wrong_type(class_name, bad):
    ours, theirs = make_pair(class_name, FEATURES, HIDDEN)
    for input in (draw(STEPS, BATCH, FEATURES), packed([3, 2, 1], torch.float32)):
        expected = outcome(partial(theirs, input, WRONG_TYPES[bad]()))
        got = outcome(partial(ours, input, WRONG_TYPES[bad]()))
        assert type(got) is type(expected), (got, expected)
        # Past the first line torch.nn lists the overloads of its own function.
        if "invalid combination of arguments" not in str(expected) and "argument 'hx'" not in str(expected):
            assert str(got) == str(expected)


def test_tensor_or_pair_where_the_other_belongs():
    input = draw(STEPS, BATCH, FEATURES)
    for class_name in ("RNN", "GRU"):
        ours, theirs = make_pair(class_name, FEATURES, HIDDEN)
        hx = (draw(1, BATCH, HIDDEN), draw(1, BATCH, HIDDEN))
        assert_same_error(partial(ours, input, hx), partial(theirs, input, hx))
    ours, theirs = make_pair("LSTM", FEATURES, HIDDEN)
    assert_same_error(partial(ours, input, draw(1, BATCH, HIDDEN)), partial(theirs, input, draw(1, BATCH, HIDDEN)))


@layers
@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"])
@pytest.mark.parametrize("shape", [(5, 5), (1,), (0,), (24, 3), (200, 200)], ids=str)
def test_weights_of_a_wrong_shape(class_name, name, shape):
    ours, theirs = make_pair(class_name, FEATURES, HIDDEN, dtype=torch.float64)
    for module in (ours, theirs):
        setattr(module, name, torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64)))
    input = draw(STEPS, BATCH, FEATURES).double()
    expected, got = outcome(partial(theirs, input)), outcome(partial(ours, input))
    if isinstance(expected, Exception):
        assert isinstance(got, (RuntimeError, ValueError)), got
    # A bias of one number is good for all gates.
    elif not isinstance(got, Exception):
        torch.testing.assert_close(got, expected)
    # In float32 torch.nn's LSTM reads past the end of such weights: ours goes without a comparison.
    got = outcome(partial(ours.float(), input.float()))
    assert isinstance(got, (RuntimeError, ValueError)) or not isinstance(expected, Exception)


@layers
@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0", "bias_hh_l0"])
def test_weights_of_different_dtypes(class_name, name):
    ours, _ = make_pair(class_name, FEATURES, HIDDEN)
    setattr(ours, name, torch.nn.Parameter(getattr(ours, name).detach().double()))
    with pytest.raises((RuntimeError, ValueError)):
        ours(draw(STEPS, BATCH, FEATURES))


# Packed sequences made by hand

ROWS = 6


def packed(batch_sizes, dtype=torch.float32, data=None):
    data = draw(ROWS, FEATURES).to(dtype) if data is None else data
    return PackedSequence(data, torch.tensor(batch_sizes, dtype=torch.int64))


BAD_BATCH_SIZES = {
    "negative": [3, 2, -1],
    "negative first": [-3, 2, 1],
    "all negative": [-1, -1],
    "very negative": [3, -(2**62)],
    "growing": [1, 2, 3],
    "growing later": [3, 1, 2],
    "too many rows": [3, 3, 3],
    "far too many rows": [2**40, 1],
    "more rows than int64 holds": [2**62, 2**62, 2**62, 2**62],
    "too few rows": [2, 1],
    "zero": [0],
    "zero later": [3, 3, 0],
    "zero between": [3, 0, 3],
    "none": [],
}


@layers
@pytest.mark.parametrize("with_hx", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "both"])
@pytest.mark.parametrize("bad", BAD_BATCH_SIZES)
def test_bad_batch_sizes(class_name, with_hx, bidirectional, bad):
    """torch.nn's exception where it raises one; where it computes something, ours does the same or raises."""
    # torch.nn's LSTM goes another way in float32, with other checks and messages of its own library.
    dtype = torch.float64
    ours, theirs = make_pair(class_name, FEATURES, HIDDEN, bidirectional=bidirectional, dtype=dtype)
    hx = random_state(ours, 3, dtype, 0) if with_hx else None
    expected = outcome(partial(theirs, packed(BAD_BATCH_SIZES[bad], dtype), hx))
    got = outcome(partial(ours, packed(BAD_BATCH_SIZES[bad], dtype), hx))
    if isinstance(expected, Exception):
        assert isinstance(got, Exception), f"torch raises {expected!r}"
        assert type(got) is type(expected), (got, expected)
        assert str(got) == str(expected)
    elif isinstance(got, Exception):
        assert isinstance(got, (RuntimeError, ValueError)), got
    else:
        torch.testing.assert_close(got[0].data, expected[0].data)
        torch.testing.assert_close(got[1], expected[1])


@backends
@layers
@dtypes
@pytest.mark.parametrize("bad", BAD_BATCH_SIZES)
def test_bad_batch_sizes_are_survived(backend, class_name, dtype, bad):
    """In every dtype, forward and backward, whatever torch.nn does."""
    for bidirectional in (False, True):
        ours, _ = make_pair(class_name, FEATURES, HIDDEN, bidirectional=bidirectional, dtype=dtype)
        for hx in (None, random_state(ours, 3, dtype, 0)):
            with fastrnn.use_backend(backend):
                got = outcome(lambda ours=ours, hx=hx: ours(packed(BAD_BATCH_SIZES[bad], dtype), hx))
                if not isinstance(got, Exception):
                    outcome(got[0].data.sum().backward)
                else:
                    assert isinstance(got, (RuntimeError, ValueError, IndexError)), got


def odd_sequences():
    data, sizes = draw(ROWS, FEATURES), torch.tensor([3, 2, 1])
    turned = torch.tensor([2, 0, 1])
    beyond = torch.tensor([0, 1, 7])
    return {
        "float batch sizes": (data, sizes.float()),
        "int32 batch sizes": (data, sizes.int()),
        "2D batch sizes": (data, sizes[None]),
        "0D batch sizes": (data, torch.tensor(6)),
        "list of batch sizes": (data, [3, 2, 1]),
        "3D data": (data[:, None], sizes),
        "1D data": (data[:, 0], sizes),
        "features": (draw(ROWS, FEATURES + 1), sizes),
        "float64 data": (data.double(), sizes),
        "meta data": (data.to("meta"), sizes),
        "no rows": (data[:0], sizes),
        "indices out of range": (data, sizes, beyond, beyond),
        "negative indices": (data, sizes, -turned, -turned),
        "too few indices": (data, sizes, turned[:2], turned[:2]),
    }


@layers
@pytest.mark.parametrize("bad", odd_sequences())
@pytest.mark.parametrize("with_hx", [False, True], ids=["zeros", "hx"])
def test_odd_packed_sequences(class_name, bad, with_hx):
    ours, theirs = make_pair(class_name, FEATURES, HIDDEN)
    hx = random_state(ours, 3, torch.float32, 0) if with_hx else None
    input = outcome(lambda: PackedSequence(*odd_sequences()[bad]))
    if isinstance(input, Exception):
        return
    expected, got = outcome(partial(theirs, input, hx)), outcome(partial(ours, input, hx))
    if isinstance(expected, Exception):
        assert type(got) is type(expected), (got, expected)
        # For packed input, torch.nn's LSTM leaves some checks to its kernels, which have words of their own.
        if class_name != "LSTM":
            assert str(got) == str(expected)
    else:
        assert not isinstance(got, Exception), got
        torch.testing.assert_close(got[0].data, expected[0].data)


# Cells

CELL_INPUTS = {
    "0D": lambda: draw(),
    "3D": lambda: draw(1, BATCH, FEATURES),
    "features": lambda: draw(BATCH, FEATURES + 1),
    "unbatched features": lambda: draw(FEATURES - 1),
    "float64": lambda: draw(BATCH, FEATURES).double(),
    "int64": lambda: torch.ones(BATCH, FEATURES, dtype=torch.int64),
    "meta": lambda: torch.empty(BATCH, FEATURES, device="meta"),
    "None": lambda: None,
    "list": lambda: [draw(FEATURES)],
    "array": lambda: draw(BATCH, FEATURES).numpy(),
}


@cells
@pytest.mark.parametrize("bad", CELL_INPUTS)
def test_bad_input_of_cells(class_name, bad):
    ours, theirs = make_pair(class_name, FEATURES, HIDDEN)
    assert_same_error(partial(ours, CELL_INPUTS[bad]()), partial(theirs, CELL_INPUTS[bad]()))


CELL_STATES = {
    "0D": lambda: draw(),
    "1D": lambda: draw(HIDDEN),
    "3D": lambda: draw(1, BATCH, HIDDEN),
    "batch": lambda: draw(BATCH + 1, HIDDEN),
    "batch of one": lambda: draw(1, HIDDEN),
    "hidden": lambda: draw(BATCH, HIDDEN - 1),
    "float64": lambda: draw(BATCH, HIDDEN).double(),
    "int64": lambda: torch.ones(BATCH, HIDDEN, dtype=torch.int64),
    "meta": lambda: torch.empty(BATCH, HIDDEN, device="meta"),
    "number": lambda: 3,
    "string": lambda: "ab",
}


@cells
@pytest.mark.parametrize("bad", CELL_STATES)
def test_bad_state_of_cells(class_name, bad):
    ours, theirs = make_pair(class_name, FEATURES, HIDDEN)
    hx = CELL_STATES[bad]()
    if isinstance(hx, torch.Tensor):
        hx = like_state(class_name, hx)
    inputs = [draw(BATCH, FEATURES)]
    if bad != "1D":
        inputs.append(draw(FEATURES))
    for input in inputs:
        assert_same_error_up_to_overloads(partial(ours, input, hx), partial(theirs, input, hx))


def assert_same_error_up_to_overloads(ours, theirs):
    expected, got = outcome(theirs), outcome(ours)
    assert isinstance(expected, Exception), "torch raises nothing"
    assert type(got) is type(expected), (got, expected)
    if "argument 'hx'" not in str(expected):
        assert str(got) == str(expected)


@pytest.mark.parametrize("bad", CELL_STATES)
@pytest.mark.parametrize("part", [0, 1], ids=["h", "c"])
def test_one_bad_half_of_an_lstm_cells_state(bad, part):
    ours, theirs = make_pair("LSTMCell", FEATURES, HIDDEN)
    hx = [draw(BATCH, HIDDEN), draw(BATCH, HIDDEN)]
    hx[part] = CELL_STATES[bad]()
    input = draw(BATCH, FEATURES)
    expected, got = outcome(partial(theirs, input, tuple(hx))), outcome(partial(ours, input, tuple(hx)))
    if isinstance(expected, Exception):
        assert_same_error_up_to_overloads(partial(ours, input, tuple(hx)), partial(theirs, input, tuple(hx)))
    else:
        torch.testing.assert_close(got, expected)


# NaN and infinities

SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "huge": 3e38}


def assert_same_specials(mine, torchs):
    mine, torchs = torch.utils._pytree.tree_leaves(mine), torch.utils._pytree.tree_leaves(torchs)
    for a, b in zip(mine, torchs, strict=True):
        assert torch.equal(a.isnan(), b.isnan()), (a, b)
        assert torch.equal(a.isinf(), b.isinf()), (a, b)
        assert torch.equal(a[a.isinf()], b[b.isinf()])


@backends
@pytest.mark.parametrize("cell", ["RNN", "relu", "GRU", "LSTM", "LSTM proj"])
@dtypes
@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("place", ["input", "hx", "weight_ih_l0", "weight_hh_l0", "bias_ih_l0"])
def test_specials_stand_where_torchs_stand(backend, cell, dtype, special, place):
    if special == "huge" and dtype is torch.float16:
        special = "inf"
    class_name, _, variant = cell.partition(" ")
    arguments = {"proj_size": 2} if variant else {}
    if cell == "relu":
        class_name, arguments = "RNN", {"nonlinearity": "relu"}
    pair = make_pair(class_name, FEATURES, 19, bidirectional=True, dtype=dtype, **arguments)
    input = draw(STEPS, BATCH, FEATURES).to(dtype)
    hx = random_state(pair[0], BATCH, dtype, 0)
    value = SPECIAL[special]
    if place == "input":
        input[2, 1, 0] = value
    elif place == "hx":
        (hx[0] if isinstance(hx, tuple) else hx)[0, 1, 0] = value
    else:
        for module in pair:
            with torch.no_grad():
                module.get_parameter(place).view(-1)[3] = value
    results = []
    for module in pair:
        leaf = input.clone().requires_grad_()
        with fastrnn.use_backend(backend):
            output, state = module(leaf, hx)
            output.sum().backward()
        results.append((output, state, leaf.grad, [p.grad for p in module.parameters()]))
    assert_same_specials(results[0][:2], results[1][:2])
    # Infinity times zero is NaN, but only where the product is formed: that is up to each backward pass.
    if special == "nan":
        assert_same_specials(results[0][2:], results[1][2:])


@backends
@cells
@pytest.mark.parametrize("special", SPECIAL)
def test_specials_in_cells(backend, class_name, special):
    pair = make_pair(class_name, FEATURES, 19)
    input = draw(BATCH, FEATURES)
    input[1, 2] = SPECIAL[special]
    with fastrnn.use_backend(backend):
        assert_same_specials(pair[0](input), pair[1](input))


@backends
@layers
@dtypes
def test_large_numbers_saturate(backend, class_name, dtype):
    """Far out on both sides the activations are -1, 0 or 1, with gradients of zero and no NaN."""
    for magnitude in (20.0, 90.0, 700.0, 1e4, 6e4):
        input = torch.tensor([[[magnitude]], [[-magnitude]]]).to(dtype)

        def make(seed, input=input):
            return *make_pair(class_name, 1, 19, dtype=dtype, seed=seed), input, None

        assert_same_as_torch(make, backend=backend, backward=magnitude < 100)
        with fastrnn.use_backend(backend):
            assert all(value.isfinite().all() for value in run(make(0)[0], input).values())
