"""Streaming inference: a Stream gives, one time step at a time, what its module gives for the whole sequence."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import (
    CELLS,
    LAYER_CLASSES,
    assert_same_as_torch,
    in_float64,
    make_pair,
    outcome,
    random_state,
    tensors_in,
)
from torch import nn
from torch.nn.utils import parametrizations

import fastrnn

FEATURES, HIDDEN, BATCH, STEPS = 4, 6, 3, 6
DTYPES = [torch.float32, torch.float64, torch.bfloat16]

layers = pytest.mark.parametrize("class_name", LAYER_CLASSES)
every_cell = pytest.mark.parametrize(("class_name", "arguments"), CELLS.values(), ids=CELLS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
batches = pytest.mark.parametrize("batch", [1, 3, 20])


@pytest.fixture
def threads():
    """torch.set_num_threads, undone at the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


class Streamed(nn.Module):
    """A layer's call taken one time step at a time by a stream."""

    def __init__(self, layer, batch):
        super().__init__()
        self.stream = fastrnn.Stream(layer, batch)
        self.time = 1 if layer.batch_first else 0
        self.nonlinearity = getattr(layer, "nonlinearity", None)

    def forward(self, input, hx=None):
        self.stream.state = hx
        return torch.stack([self.stream.step(x) for x in input.unbind(self.time)], self.time), self.stream.state


class UnderAutocast(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *args):
        with torch.autocast("cpu", torch.bfloat16):
            return self.layer(*args)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_layer(class_name, *sizes, **arguments):
    return make_pair(class_name, *(sizes or (FEATURES, HIDDEN, 2)), **arguments)[0]


def warm_stream(layer, batch=BATCH):
    """A stream two steps into its sequences."""
    stream = fastrnn.Stream(layer, batch)
    for seed in (50, 51):
        stream.step(draw(batch, layer.input_size, seed=seed, dtype=layer.weight_ih_l0.dtype))
    return stream


def drop_state(stream):
    stream.state = None


def map_state(function, state):
    return tuple(map(function, state)) if isinstance(state, tuple) else function(state)


def fill(state, value=float("nan")):
    for tensor in tensors_in(state):
        tensor.fill_(value)


def assert_equal_states(got, expected):
    for mine, other in zip(tensors_in(got), tensors_in(expected), strict=True):
        assert mine.dtype == other.dtype
        assert torch.equal(mine, other)


def assert_close(got, expected):
    tolerance = {"rtol": 0, "atol": 1e-12} if expected.dtype == torch.float64 else {}
    torch.testing.assert_close(got, expected.detach(), **tolerance)


def assert_next_step(stream, layer, state, x):
    """The stream's next step is the layer's from `state`, and so is the state after it."""
    with torch.no_grad():
        output, after = layer(x.unsqueeze(1 if layer.batch_first else 0), state)
    assert_close(stream.step(x), output.reshape(x.shape[0], -1))
    for mine, other in zip(tensors_in(stream.state), tensors_in(after), strict=True):
        assert_close(mine, other)


def sequence_case(class_name, arguments, batch, dtype, features=FEATURES, hidden=HIDDEN, train=False, with_hx=True):
    def make(seed):
        ours, theirs = make_pair(class_name, features, hidden, seed=seed, dtype=dtype, train=train, **arguments)
        shape = (batch, STEPS, features) if ours.batch_first else (STEPS, batch, features)
        hx = random_state(ours, batch, dtype, seed) if with_hx else None
        return Streamed(ours, batch), theirs.eval(), draw(*shape, seed=seed, dtype=dtype), hx

    return make


# Numbers

OPTIONS = ({}, {"bias": False}, {"num_layers": 3}, {"num_layers": 2, "bias": False, "batch_first": True})
PROJECTIONS = ({"proj_size": 2}, {"num_layers": 3, "proj_size": 5, "bias": False})


@dtypes
@batches
@pytest.mark.parametrize(
    ("cell", "options"),
    [(cell, options) for cell in CELLS for options in OPTIONS + PROJECTIONS * (cell == "lstm")],
    ids=str,
)
def test_steps_are_the_rows_of_the_sequence(cell, options, batch, dtype):
    class_name, arguments = CELLS[cell]
    for with_hx in (False, True):
        case = sequence_case(class_name, arguments | options, batch, dtype, with_hx=with_hx)
        assert_same_as_torch(case, backward=False)


@dtypes
@every_cell
@pytest.mark.parametrize("backend", ["torch", "reference", "numba"])
def test_every_backend(backend, class_name, arguments, dtype):
    case = sequence_case(class_name, arguments | {"num_layers": 2}, BATCH, dtype)
    assert_same_as_torch(case, backend=backend, backward=False)


@every_cell
def test_backend_changed_between_steps(class_name, arguments):
    layer = make_layer(class_name, dtype=torch.float64, **arguments)
    stream, x = fastrnn.Stream(layer, BATCH), draw(STEPS, BATCH, FEATURES, dtype=torch.float64)
    for row, expected, backend in zip(x, layer(x)[0], ["torch", "numba", "reference"] * 2, strict=True):
        with fastrnn.use_backend(backend):
            assert_close(stream.step(row), expected)


@layers
def test_training_mode_without_dropout(class_name):
    arguments = {"num_layers": 2, "dropout": 0.5}
    assert_same_as_torch(sequence_case(class_name, arguments, BATCH, torch.float32, train=True), backward=False)
    for training, dtype in ((True, torch.float32), (False, torch.float32), (True, torch.bfloat16)):
        layer = make_layer(class_name, FEATURES, HIDDEN, dtype=dtype, **arguments).train(training)
        random_numbers = torch.get_rng_state()
        stream = warm_stream(layer)
        for wrong in (draw(BATCH, FEATURES + 1, dtype=dtype), draw(BATCH, FEATURES, dtype=torch.float64)):
            with pytest.raises((RuntimeError, ValueError)):
                stream.step(wrong)
        assert layer.training is training
        assert torch.equal(torch.get_rng_state(), random_numbers)


@every_cell
@pytest.mark.parametrize("batch_first", [False, True])
def test_autocast(class_name, arguments, batch_first):
    """The rule, with the layer under autocast in torch's place: torch's own GRU returns float32 there."""
    layer = make_layer(class_name, batch_first=batch_first, train=False, **arguments)
    shape = (BATCH, STEPS, FEATURES) if batch_first else (STEPS, BATCH, FEATURES)

    def make(seed):
        return UnderAutocast(Streamed(layer, BATCH)), UnderAutocast(layer), draw(*shape, seed=seed), None

    assert_same_as_torch(make, exact=in_float64(layer), backward=False)


@layers
def test_autocast_on_and_off_between_steps(class_name):
    layer, x = make_layer(class_name), draw(STEPS, BATCH, FEATURES)
    stream, expected = fastrnn.Stream(layer, BATCH), layer(x)[0].detach()
    for index in range(STEPS):
        with torch.autocast("cpu", torch.bfloat16, enabled=index % 3 == 1):
            y = stream.step(x[index])
        assert y.dtype == (torch.bfloat16 if index % 3 == 1 else torch.float32)
        torch.testing.assert_close(y.float(), expected[index], rtol=0, atol=0.03)


@dtypes
@layers
def test_one_sequence_without_a_batch_dimension(class_name, dtype):
    layer = make_layer(class_name, dtype=dtype, **({"proj_size": 5} if class_name == "LSTM" else {}))
    batched, plain, mixed = (fastrnn.Stream(layer) for _ in range(3))
    for index, x in enumerate(draw(STEPS, FEATURES, dtype=dtype)):
        expected = batched.step(x[None])
        out = torch.empty_like(expected[0]) if index % 2 else None
        y = plain.step(x, out=out)
        assert out is None or y is out
        assert torch.equal(y, expected[0])
        assert torch.equal(mixed.step(x if index % 2 else x[None]).flatten(), y)
    assert_equal_states(plain.state, batched.state)


@dtypes
@layers
def test_input_of_any_strides(class_name, dtype):
    layer, x = make_layer(class_name, dtype=dtype), draw(BATCH, FEATURES, dtype=dtype)
    wide = torch.full((2 * BATCH, 2 * FEATURES + 1), float("nan"), dtype=dtype)
    wide[::2, 1::2] = x
    for strided in (x.t().contiguous().t(), wide[::2, 1::2], x[0].expand(BATCH, FEATURES)):
        stream, other = warm_stream(layer), warm_stream(layer)
        assert torch.equal(stream.step(strided), other.step(strided.contiguous()))
    assert torch.equal(warm_stream(layer, 1).step(wide[0, 1::2]), warm_stream(layer, 1).step(x[0]))


@layers
@pytest.mark.parametrize("features", [1, FEATURES])
def test_input_negated_lazily(class_name, features):
    """As the imaginary part of a conjugate is; with one feature it counts as contiguous."""
    layer = make_layer(class_name, features, HIDDEN)
    x = torch.complex(draw(1, features), draw(1, features, seed=1)).conj().imag
    assert x.is_neg()
    assert torch.equal(fastrnn.Stream(layer).step(x), fastrnn.Stream(layer).step(x.resolve_neg()))


# Threads


@batches
@pytest.mark.parametrize("hidden", [300, 520])
@every_cell
def test_large_layers_on_one_and_two_threads(class_name, arguments, hidden, batch, threads):
    arguments = {"num_layers": 2, **arguments}
    layer, x = make_layer(class_name, 70, hidden, **arguments), draw(STEPS, batch, 70)
    results = []
    for plan in ([1] * 6, [2] * 6, [1, 2] * 3, [2, 1, 1] * 2):
        stream, got = fastrnn.Stream(layer, batch), []
        for row, count in zip(x, plan, strict=True):
            threads(count)
            got.append(stream.step(row))
        results.append([*got, *tensors_in(stream.state)])
    assert all(torch.equal(*pair) for got in results for pair in zip(got, results[0], strict=True))
    threads(2)
    case = sequence_case(class_name, arguments, batch, torch.float32, 70, hidden)
    assert_same_as_torch(case, backward=False)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("hidden", [HIDDEN, 300])
@layers
def test_other_python_threads(class_name, hidden, count, threads):
    threads(count)
    layer, x = make_layer(class_name, FEATURES, hidden, 2), draw(30, BATCH, FEATURES)
    streams = [fastrnn.Stream(layer, BATCH) for _ in range(6)]

    def steps(stream):
        return torch.stack([stream.step(row) for row in x])

    expected = steps(streams[0])
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(got, expected) for got in pool.map(steps, streams[1:5]))
        for index, row in enumerate(x):
            got = pool.submit(streams[5].step, row).result() if index % 2 else streams[5].step(row)
            assert torch.equal(got, expected[index])


# Memory


@dtypes
@layers
@batches
def test_results_are_new_memory_and_no_part_of_the_state(class_name, batch, dtype):
    layer, x = make_layer(class_name, HIDDEN, HIDDEN, 2, dtype=dtype), draw(STEPS, batch, HIDDEN, dtype=dtype)
    stream, other, fed_back, fed_copies = (fastrnn.Stream(layer, batch) for _ in range(4))
    kept = [stream.step(row) for row in x]
    assert len({y.untyped_storage().data_ptr() for y in kept}) == STEPS
    fed = x[0]
    for row, expected in zip(x, kept, strict=True):
        y = other.step(row)
        assert torch.equal(y, expected)
        fill(y)
        y = fed_back.step(fed)
        assert torch.equal(y, fed_copies.step(fed.clone()))
        fed = y


@dtypes
@layers
def test_out(class_name, dtype):
    layer = make_layer(class_name, dtype=dtype)
    stream, other = warm_stream(layer), warm_stream(layer)
    out = torch.full((BATCH, HIDDEN), float("nan"), dtype=dtype)
    for index, x in enumerate(draw(STEPS, BATCH, FEATURES, dtype=dtype)):
        given = None if index % 3 == 2 else out
        got = stream.step(x, out=given)
        assert torch.isnan(out).all() if given is None else got is out
        assert torch.equal(got, other.step(x))
        out.fill_(float("nan"))
    assert_equal_states(stream.state, other.state)


@dtypes
@every_cell
@pytest.mark.parametrize("num_layers", [1, 3])
def test_out_shares_the_memory_of_x(class_name, arguments, num_layers, dtype):
    layer = make_layer(class_name, HIDDEN, HIDDEN, num_layers, dtype=dtype, **arguments)
    stream, other = warm_stream(layer, HIDDEN), warm_stream(layer, HIDDEN)
    size = HIDDEN * HIDDEN
    for seed, (first, second) in enumerate([(0, 0), (0, 3), (3, 0), (0, HIDDEN), (2 * HIDDEN, 0), (1, 0)]):
        buffer = draw(3 * size, seed=seed, dtype=dtype)
        x, out = (buffer[start : start + size].view(HIDDEN, HIDDEN) for start in (first, second))
        expected = other.step(x.clone())
        assert stream.step(x, out=out) is out
        assert torch.equal(out, expected)
    for x in (out, out.t()):
        expected = other.step(x.clone())
        assert torch.equal(stream.step(x, out=out), expected)


@dtypes
@layers
def test_state_is_copied_out_and_in(class_name, dtype):
    layer = make_layer(class_name, dtype=dtype, **({"proj_size": 5} if class_name == "LSTM" else {}))
    x = draw(BATCH, FEATURES, dtype=dtype)
    stream = warm_stream(layer)
    state, before = stream.state, map_state(torch.clone, stream.state)
    shapes = [(2, BATCH, 5), (2, BATCH, HIDDEN)] if class_name == "LSTM" else [(2, BATCH, HIDDEN)]
    assert isinstance(state, tuple) is (class_name == "LSTM")
    assert [tensor.shape for tensor in tensors_in(state)] == shapes
    stream.step(x)
    assert_equal_states(state, before)
    stream.state = state
    fill(state)
    assert_equal_states(stream.state, before)
    fill(stream.state)
    assert_next_step(stream, layer, before, x)
    given = random_state(layer, BATCH, dtype, 3)
    before = map_state(torch.clone, given)
    stream.state = given
    assert_next_step(stream, layer, before, x)
    assert_equal_states(given, before)
    stream.state = map_state(lambda t: t.transpose(0, 2).contiguous().transpose(0, 2).requires_grad_(), given)
    assert not any(tensor.requires_grad for tensor in tensors_in(stream.state))
    assert_next_step(stream, layer, before, x)


# State


@dtypes
@layers
def test_reset(class_name, dtype):
    layer, x = make_layer(class_name, dtype=dtype), draw(BATCH, FEATURES, dtype=dtype)
    fresh = fastrnn.Stream(layer, BATCH)
    zeros = fresh.state
    assert not any(tensor.any() for tensor in tensors_in(zeros))
    expected = fresh.step(x)
    for forget in (fastrnn.Stream.reset, lambda s: s.reset(torch.ones(BATCH, dtype=torch.bool)), drop_state):
        stream = warm_stream(layer)
        # NaN times zero is NaN still.
        stream.step(torch.full_like(x, float("nan")))
        forget(stream)
        assert_equal_states(stream.state, zeros)
        assert torch.equal(stream.step(x), expected)


@dtypes
@layers
@batches
def test_reset_of_some_sequences(class_name, batch, dtype):
    layer = make_layer(class_name, dtype=dtype)
    stream, clean = warm_stream(layer, batch), warm_stream(layer, batch)
    masks = draw(2 * batch, STEPS) > 0
    for index, x in enumerate(draw(STEPS, batch, FEATURES, dtype=dtype)):
        # A strided mask.
        mask = masks[::2, index]
        poisoned = x.masked_fill(mask[:, None], float("nan"))
        y, expected = stream.step(poisoned), clean.step(x)
        assert y[mask].isnan().all()
        assert torch.equal(y[~mask], expected[~mask])
        zeroed = map_state(lambda t, mask=mask: t.masked_fill(mask[:, None], 0), clean.state)
        stream.reset(mask)
        clean.reset(mask)
        assert_equal_states(stream.state, zeroed)
        assert_equal_states(clean.state, zeroed)


@layers
def test_calls_of_the_layer_in_between(class_name):
    layer, x = make_layer(class_name), draw(STEPS, BATCH, FEATURES)
    stream, alone = fastrnn.Stream(layer, BATCH), fastrnn.Stream(layer, BATCH)
    expected = [alone.step(row) for row in x]
    for index, row in enumerate(x):
        layer(draw(5, 2, FEATURES, seed=index))[0].sum().backward()
        with torch.no_grad():
            layer(draw(1, BATCH, FEATURES, seed=index))
        assert torch.equal(stream.step(row), expected[index])


@layers
def test_copies_of_the_layer(class_name):
    layer, x = make_layer(class_name), draw(STEPS, BATCH, FEATURES)
    names, stream, expected = list(layer.state_dict()), warm_stream(layer), layer(x)[0]
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert list(other.state_dict()) == list(layer.state_dict()) == names
        assert torch.equal(other(x)[0], expected)
        before = stream.state
        # The copy's weights are its own.
        CHANGES["data_copy"](other)
        warm_stream(other)
        assert_next_step(stream, layer, before, x[0])


# Autograd


@dtypes
@layers
def test_no_gradients_but_results_that_autograd_takes(class_name, dtype):
    layer = make_layer(class_name, dtype=dtype)
    stream, x = warm_stream(layer), draw(BATCH, FEATURES, dtype=dtype).requires_grad_()
    y = stream.step(x)
    assert torch.is_grad_enabled() and not y.requires_grad
    assert not any(tensor.requires_grad for tensor in tensors_in(stream.state))
    weight = torch.ones(HIDDEN, dtype=dtype, requires_grad=True)
    (y * weight).sum().backward()
    assert torch.equal(weight.grad, y.sum(0))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in [*layer.parameters(), x])


CALLS = {
    "make": lambda stream: None,
    "step": lambda stream: stream.step(draw(BATCH, FEATURES, dtype=stream.state[0].dtype)),
    "reset": fastrnn.Stream.reset,
    "mask": lambda stream: stream.reset(torch.tensor([True, False, True])),
    "assign": lambda stream: setattr(stream, "state", stream.state),
}


@dtypes
@layers
@pytest.mark.parametrize("inside", CALLS)
def test_inference_mode_on_and_off(class_name, inside, dtype):
    """Whatever was done in inference mode, everything works outside."""
    layer = make_layer(class_name, dtype=dtype)
    for outside in CALLS:
        with torch.inference_mode(inside == "make"):
            stream = fastrnn.Stream(layer, BATCH)
        expected = fastrnn.Stream(layer, BATCH)
        with torch.inference_mode():
            CALLS[inside](stream)
        CALLS[outside](stream)
        CALLS[inside](expected)
        CALLS[outside](expected)
        assert_equal_states(stream.state, expected.state)
        assert torch.equal(CALLS["step"](stream), CALLS["step"](expected))


@layers
def test_layer_made_in_inference_mode(class_name):
    with torch.inference_mode():
        layer = make_layer(class_name)
        stream = warm_stream(layer)
        # No version counter tells of this change.
        layer.weight_hh_l0.mul_(2)
    assert_next_step(stream, layer, stream.state, draw(BATCH, FEATURES))


# Changed weights


def in_place(layer):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1.5)


def data_assigned(layer):
    for parameter in layer.parameters():
        parameter.data = parameter.data * 1.5


def optimizer_step(layer):
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(layer.parameters(), lr=0.05).step()


def parametrized(layer):
    if not hasattr(layer, "parametrizations"):
        parametrizations.weight_norm(layer, "weight_hh_l0")
    layer.parametrizations.weight_hh_l0.original0.data.mul_(1.5)


def louder(layer):
    return {name: 1.5 * value for name, value in layer.state_dict().items()}


CHANGES = {
    "in_place": in_place,
    "data_copy": lambda layer: [p.data.copy_(p.data * 1.5) for p in layer.parameters()],
    "data_assigned": data_assigned,
    "other_strides": lambda layer: setattr(layer.weight_hh_l1, "data", (layer.weight_hh_l1.data * 1.5).t().clone().t()),
    "parameter": lambda layer: setattr(layer, "weight_hh_l1", nn.Parameter(layer.weight_hh_l1.detach() * 1.5)),
    "new_bias": lambda layer: setattr(layer, "bias_ih_l0", nn.Parameter(layer.bias_ih_l0.detach() + 0.5)),
    "flipped": lambda layer: layer.weight_ih_l1.data.copy_(layer.weight_ih_l1.data.flip(0, 1)),
    "last_element": lambda layer: layer.weight_hh_l1.data[-1, -1].add_(1),
    "last_bias": lambda layer: layer.bias_hh_l1.data[-1].add_(1),
    "state_dict": lambda layer: layer.load_state_dict(louder(layer)),
    "state_dict_assigned": lambda layer: layer.load_state_dict(louder(layer), assign=True),
    "optimizer_step": optimizer_step,
    "parametrized": parametrized,
}


@dtypes
@layers
@pytest.mark.parametrize("hidden", [HIDDEN, 64])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights(class_name, change, hidden, dtype):
    layer = make_layer(class_name, FEATURES, hidden, 2, dtype=dtype)
    stream = warm_stream(layer)
    for turn in range(2):
        before = stream.state
        unchanged = fastrnn.Stream(copy.deepcopy(layer), BATCH)
        unchanged.state = before
        CHANGES[change](layer)
        assert_equal_states(stream.state, before)
        x = draw(BATCH, FEATURES, seed=turn, dtype=dtype)
        assert_next_step(stream, layer, before, x)
        unchanged.step(x)
        assert not all(map(torch.equal, tensors_in(stream.state), tensors_in(unchanged.state)))


@dtypes
@layers
@pytest.mark.parametrize("before", DTYPES, ids=str)
def test_changed_dtype(class_name, before, dtype):
    layer = make_layer(class_name, dtype=before)
    stream, x = warm_stream(layer), draw(BATCH, FEATURES, dtype=dtype)
    state = map_state(lambda t: t.to(dtype), stream.state)
    assert_next_step(stream, layer.to(dtype), state, x)
    for reset in (fastrnn.Stream.reset, drop_state):
        stream = warm_stream(layer.to(before))
        layer.to(dtype)
        reset(stream)
        assert_next_step(stream, layer, None, x)


# Errors


def assert_refused(stream, call, errors=ValueError):
    """`call` raises one of `errors` and the state stays."""
    before = stream.state
    error = outcome(call)
    assert isinstance(error, errors), repr(error)
    assert_equal_states(stream.state, before)
    return str(error)


@pytest.mark.parametrize("module", [nn.RNN(4, 6), nn.GRU(4, 6), nn.LSTM(4, 6), nn.Linear(4, 6), None], ids=str)
def test_other_modules_are_refused(module):
    with pytest.raises(TypeError, match="convert"):
        fastrnn.Stream(module)
    with pytest.raises(TypeError, match="convert"):
        fastrnn.Stream(fastrnn.GRUCell(FEATURES, HIDDEN))


@layers
def test_arguments_that_are_refused(class_name):
    with pytest.raises(ValueError, match="bidirectional"):
        fastrnn.Stream(make_layer(class_name, bidirectional=True))
    for batch_size in (0, -1, 1.5, 2.0, "2", None, (2,)):
        with pytest.raises(ValueError, match="batch_size"):
            fastrnn.Stream(make_layer(class_name), batch_size)


@dtypes
@layers
def test_inputs_that_are_refused(class_name, dtype):
    layer = make_layer(class_name, dtype=dtype)
    stream, expected, single = warm_stream(layer), warm_stream(layer), warm_stream(layer, 1)
    for shape in ((2, 4), (3, 5), (0, 4), (1, 4), (4,), (12,), (), (1, 3, 4), (3, 1, 4), (3, 4, 1)):
        x = draw(*shape, dtype=dtype)
        message = assert_refused(stream, lambda x=x: stream.step(x))
        assert "3, 4" in message and ", ".join(map(str, shape)) in message.replace("3, 4", "", 1), message
    for shape in ((5,), (2, 4), (1, 5), (0, 4), (1, 1, 4), ()):
        x = draw(*shape, dtype=dtype)
        assert_refused(single, lambda x=x: single.step(x))
    for other in {*DTYPES, torch.int64} - {dtype}:
        x = draw(BATCH, FEATURES).to(other)
        assert_refused(stream, lambda x=x: stream.step(x), (RuntimeError, ValueError))
    x = draw(BATCH, FEATURES, dtype=dtype)
    assert torch.equal(stream.step(x), expected.step(x))


@dtypes
@layers
def test_outs_that_are_refused(class_name, dtype):
    layer = make_layer(class_name, dtype=dtype)
    stream, x, single = warm_stream(layer), draw(BATCH, FEATURES, dtype=dtype), warm_stream(layer, 1)
    shapes = ((3, 7), (4, 6), (1, 3, 6), (18,), (0,))
    for out in (
        *(torch.zeros(shape, dtype=dtype) for shape in shapes),
        torch.zeros(BATCH, HIDDEN, dtype=torch.float64 if dtype == torch.float32 else torch.float32),
        torch.zeros(HIDDEN, BATCH, dtype=dtype).t(),
        torch.zeros(BATCH, 2 * HIDDEN, dtype=dtype)[:, ::2],
        torch.zeros(1, HIDDEN, dtype=dtype).expand(BATCH, HIDDEN),
    ):
        assert_refused(stream, lambda out=out: stream.step(x, out=out))
        assert not out.any()
    assert_refused(single, lambda: single.step(x[0], out=torch.zeros(1, HIDDEN, dtype=dtype)))
    assert_refused(single, lambda: single.step(x[:1], out=torch.zeros(HIDDEN, dtype=dtype)))


@layers
def test_masks_that_are_refused(class_name):
    stream, yes = warm_stream(make_layer(class_name)), torch.ones(BATCH, dtype=torch.bool)
    wrong = (yes.long(), yes.byte(), yes.float(), yes[:2], yes[None], yes[:, None], yes[0], yes.repeat(2))
    for mask in (*wrong, [True] * BATCH, True, yes.numpy()):
        assert_refused(stream, lambda mask=mask: stream.reset(mask))


@layers
def test_states_that_are_refused(class_name):
    layer = make_layer(class_name, **({"proj_size": 5} if class_name == "LSTM" else {}))
    stream = warm_stream(layer)
    good = list(tensors_in(random_state(layer, BATCH, torch.float32, 0)))

    def assign(*tensors):
        stream.state = tensors if class_name == "LSTM" else tensors[0]

    for i, t in enumerate(good):
        for wrong in (t[:1], t[:, :1], t[..., :1], t[0], t[None], t.flatten(), t[:, :0]):
            assert_refused(stream, lambda i=i, wrong=wrong: assign(*good[:i], wrong, *good[i + 1 :]))
    forms = [good[0], (good[0],), (*good, good[0]), (good[0], None)] if class_name == "LSTM" else [(good[0],)]
    for form in [*forms, "zeros", 0]:
        assert_refused(stream, lambda form=form: setattr(stream, "state", form), (ValueError, TypeError))


@layers
@pytest.mark.parametrize("shape", [(3, 3), (HIDDEN,), (1, HIDDEN)], ids=str)
def test_weights_of_a_wrong_shape_are_not_read_past_their_end(class_name, shape):
    layer = make_layer(class_name)
    stream, x = warm_stream(layer), draw(BATCH, FEATURES)
    assert isinstance(outcome(lambda: layer(x[None])), tuple)
    layer.weight_hh_l1.data = torch.zeros(shape)
    assert isinstance(outcome(lambda: layer(x[None])), (RuntimeError, ValueError))
    assert_refused(stream, lambda: stream.step(x), (RuntimeError, ValueError))


def test_default_device_is_of_no_matter():
    """A default device that is set for what the user creates must not be taken for results or scratch."""
    layer = fastrnn.GRU(3, 5)
    stream, x = fastrnn.Stream(layer), torch.ones(3)
    expected = layer(torch.ones(1, 3))[0][0]
    with torch.device("meta"):
        assert torch.equal(stream.step(x), expected.detach())
        assert layer(torch.ones(1, 3, device="cpu"))[0].device.type == "cpu"


def test_own_forward_of_a_subclass_is_run():
    class Doubled(fastrnn.GRU):
        def forward(self, input, hx=None):
            output, final = super().forward(input, hx)
            return 2 * output, final

    layer, x = Doubled(3, 5), torch.ones(3)
    assert torch.equal(fastrnn.Stream(layer).step(x), layer(torch.ones(1, 3))[0][0].detach())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda stream: pickle.loads(pickle.dumps(stream))])
def test_stream_can_be_copied(duplicate):
    stream, x = fastrnn.Stream(fastrnn.LSTM(3, 5, num_layers=2)), torch.ones(3)
    stream.step(x)
    other = duplicate(stream)
    for _ in range(2):
        assert torch.equal(stream.step(x), other.step(x))
