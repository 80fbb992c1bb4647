"""What holds for every recurrent layer, whatever its numbers: properties of ours alone, in float64."""

from typing import Any, NamedTuple

import pytest
import torch
from helpers import CPU_BACKENDS, FLOAT64_AGREEMENT, tensors_in
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

import fastrnn

backends = pytest.mark.parametrize("backend", CPU_BACKENDS)
examples = settings(max_examples=50, deadline=None, derandomize=True, database=None)


class Layer(NamedTuple):
    class_name: str
    arguments: dict[str, Any]
    seed: int

    def build(self, **changes):
        torch.manual_seed(self.seed)
        return getattr(fastrnn, self.class_name)(**self.arguments | changes, dtype=torch.float64)


@st.composite
def layers(draw, bidirectional=None):
    cell = draw(st.sampled_from(["tanh", "relu", "GRU", "LSTM", "projected"]))
    arguments = {
        "input_size": draw(st.integers(1, 9)),
        "hidden_size": draw(st.integers(2 if cell == "projected" else 1, 20)),
        "num_layers": draw(st.integers(1, 3)),
        "bias": draw(st.booleans()),
        "bidirectional": draw(st.booleans()) if bidirectional is None else bidirectional,
    }
    if cell in ("tanh", "relu"):
        arguments["nonlinearity"] = cell
    if cell == "projected":
        arguments["proj_size"] = draw(st.integers(1, arguments["hidden_size"] - 1))
    class_name = {"tanh": "RNN", "relu": "RNN", "projected": "LSTM"}.get(cell, cell)
    return Layer(class_name, arguments, draw(st.integers(0, 2**16)))


sizes = st.integers(1, 7)
lengths_of_batches = st.lists(st.integers(1, 9), min_size=1, max_size=7)


def random_input(layer, steps, batch):
    generator = torch.Generator().manual_seed(layer.seed + 1)
    return torch.randn(steps, batch, layer.arguments["input_size"], dtype=torch.float64, generator=generator)


def random_hx(layer, module, batch):
    generator = torch.Generator().manual_seed(layer.seed + 2)
    groups = module.num_layers * (1 + module.bidirectional)
    h, c = (
        torch.randn(groups, batch, size, dtype=torch.float64, generator=generator)
        for size in (module.proj_size or module.hidden_size, module.hidden_size)
    )
    return (h, c) if module.mode == "LSTM" else h


def over_state(function, *states):
    if isinstance(states[0], tuple):
        return tuple(function(*parts) for parts in zip(*states, strict=True))
    return function(*states)


def assert_agree(first, second):
    for mine, other in zip(tensors_in(first), tensors_in(second), strict=True):
        assert mine.shape == other.shape
        if mine.numel():
            scale = max(1.0, other.abs().max().item())
            assert (mine - other).abs().max().item() <= FLOAT64_AGREEMENT * scale


def gradients_of(module, *outputs):
    module.zero_grad()
    sum(tensor.square().sum() for output in outputs for tensor in tensors_in(output)).backward()
    return tuple(p.grad.clone() for p in module.parameters())


@backends
@examples
@given(layers(), lengths_of_batches)
def test_packed_input_equals_a_loop_over_sequences(backend, layer, lengths):
    module = layer.build()
    input, hx = random_input(layer, max(lengths), len(lengths)), random_hx(layer, module, len(lengths))
    with fastrnn.use_backend(backend):
        packed_output, packed_state = module(pack_padded_sequence(input, lengths, enforce_sorted=False), hx)
        packed_gradients = gradients_of(module, packed_output, packed_state)
        loop = [
            module(input[:length, row], over_state(lambda t, row=row: t[:, row], hx))
            for row, length in enumerate(lengths)
        ]
        gradients = gradients_of(module, *loop)
    padded, got_lengths = pad_packed_sequence(packed_output)
    assert got_lengths.tolist() == lengths
    for row, (output, state) in enumerate(loop):
        assert_agree(padded[: lengths[row], row], output)
        assert not padded[lengths[row] :, row].any()
        assert_agree(over_state(lambda t, row=row: t[:, row], packed_state), state)
    assert_agree(packed_gradients, gradients)


@backends
@examples
@given(layers(), sizes, sizes)
def test_packing_equal_lengths_changes_nothing(backend, layer, steps, batch):
    module = layer.build()
    input = random_input(layer, steps, batch)
    with fastrnn.use_backend(backend):
        dense, state = module(input)
        gradients = gradients_of(module, dense, state)
        packed, packed_state = module(pack_sequence(list(input.unbind(1))))
        packed_gradients = gradients_of(module, packed, packed_state)
    assert_agree(pad_packed_sequence(packed)[0], dense)
    assert_agree(packed_state, state)
    assert_agree(packed_gradients, gradients)


@backends
@examples
@given(layers(), sizes, st.integers(2, 40), st.randoms(use_true_random=False))
def test_permuting_the_batch_permutes_the_results(backend, layer, steps, batch, random):
    module = layer.build()
    order = list(range(batch))
    random.shuffle(order)
    input, hx = random_input(layer, steps, batch), random_hx(layer, module, batch)
    with fastrnn.use_backend(backend):
        output, state = module(input, hx)
        permuted = module(input[:, order], over_state(lambda t: t[:, order], hx))
    assert_agree(permuted, (output[:, order], over_state(lambda t: t[:, order], state)))


@backends
@examples
@given(layers(), sizes, st.integers(2, 20), st.data())
def test_the_rows_of_a_batch_know_nothing_of_each_other(backend, layer, steps, batch, data):
    module = layer.build()
    row = data.draw(st.integers(0, batch - 1))
    input = random_input(layer, steps, batch)
    spoiled = input.clone()
    spoiled[:, row] = float("nan")
    others = [index for index in range(batch) if index != row]
    with fastrnn.use_backend(backend):
        clean, broken = module(input), module(spoiled)
    assert broken[0][:, row].isnan().all()
    for tensor, expected in zip(tensors_in(broken), tensors_in(clean), strict=True):
        assert torch.equal(tensor[:, others], expected[:, others])


@backends
@examples
@given(layers(bidirectional=True), sizes, sizes)
def test_bidirectional_is_a_forward_and_a_flipped_reverse_run(backend, layer, steps, batch):
    module = layer.build(num_layers=1)
    forward, reverse = (layer.build(num_layers=1, bidirectional=False) for _ in range(2))
    weights = module.state_dict()
    forward.load_state_dict({name: value for name, value in weights.items() if not name.endswith("reverse")})
    reverse.load_state_dict(
        {name.removesuffix("_reverse"): value for name, value in weights.items() if name.endswith("reverse")}
    )
    input, hx = random_input(layer, steps, batch), random_hx(layer, module, batch)
    with fastrnn.use_backend(backend):
        output, state = module(input, hx)
        there, there_state = forward(input, over_state(lambda t: t[:1], hx))
        back, back_state = reverse(input.flip(0), over_state(lambda t: t[1:], hx))
    assert_agree(output, torch.cat([there, back.flip(0)], -1))
    assert_agree(state, over_state(lambda a, b: torch.cat([a, b]), there_state, back_state))


@backends
@examples
@given(layers(), sizes, sizes)
def test_layers_follow_one_another(backend, layer, steps, batch):
    """A stack of layers is each layer run on the output of the one below."""
    module = layer.build()
    input, hx = random_input(layer, steps, batch), random_hx(layer, module, batch)
    directions = 1 + module.bidirectional
    with fastrnn.use_backend(backend):
        output, state = module(input, hx)
        below, states = input, []
        for index in range(module.num_layers):
            single = layer.build(num_layers=1, input_size=below.shape[-1])
            suffixed = {name.replace("_l0", f"_l{index}"): name for name in single.state_dict()}
            single.load_state_dict({name: module.state_dict()[source] for source, name in suffixed.items()})
            groups = slice(index * directions, (index + 1) * directions)
            below, single_state = single(below, over_state(lambda t, groups=groups: t[groups], hx))
            states.append(single_state)
    assert_agree(output, below)
    assert_agree(state, over_state(lambda *parts: torch.cat(parts), *states))


@backends
@examples
@given(layers(bidirectional=False), st.integers(2, 12), sizes, st.data())
def test_two_runs_that_hand_on_the_state_are_one(backend, layer, steps, batch, data):
    module = layer.build()
    cut = data.draw(st.integers(1, steps - 1))
    input, hx = random_input(layer, steps, batch), random_hx(layer, module, batch)
    with fastrnn.use_backend(backend):
        whole, last = module(input, hx)
        gradients = gradients_of(module, whole, last)
        first, between = module(input[:cut], hx)
        second, end = module(input[cut:], between)
        split_gradients = gradients_of(module, first, second, end)
    assert_agree(torch.cat([first, second]), whole)
    assert_agree(end, last)
    assert_agree(split_gradients, gradients)


@backends
@examples
@given(layers(), sizes, st.booleans())
def test_unbatched_input_is_a_batch_of_one(backend, layer, steps, batch_first):
    module = layer.build(batch_first=batch_first)
    input, hx = random_input(layer, steps, 1), random_hx(layer, module, 1)
    with fastrnn.use_backend(backend):
        output, state = module(input[:, 0], over_state(lambda t: t[:, 0], hx))
        batched, batched_state = module(input.transpose(0, 1) if batch_first else input, hx)
    assert torch.equal(output, batched[0] if batch_first else batched[:, 0])
    for mine, other in zip(tensors_in(state), tensors_in(batched_state), strict=True):
        assert torch.equal(mine, other[:, 0])


@backends
@examples
@given(layers(), sizes, sizes)
def test_batch_first_only_turns_the_input_and_the_output(backend, layer, steps, batch):
    module, turned = layer.build(), layer.build(batch_first=True)
    input, hx = random_input(layer, steps, batch), random_hx(layer, module, batch)
    with fastrnn.use_backend(backend):
        output, state = module(input, hx)
        turned_output, turned_state = turned(input.transpose(0, 1), hx)
    assert_agree((turned_output.transpose(0, 1), turned_state), (output, state))


@backends
@examples
@given(layers(bidirectional=False), sizes, sizes)
def test_a_cell_repeated_is_a_layer(backend, layer, steps, batch):
    shared = {k: v for k, v in layer.arguments.items() if k not in ("num_layers", "bidirectional", "proj_size")}
    module = Layer(layer.class_name, shared, layer.seed).build()
    cell = Layer(f"{layer.class_name}Cell", shared, layer.seed).build()
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in module.state_dict().items()})
    input, hx = random_input(layer, steps, batch), random_hx(layer, module, batch)
    with fastrnn.use_backend(backend):
        output, last = module(input, hx)
        state, steps_out = over_state(lambda t: t[0], hx), []
        for step in input:
            state = cell(step, state)
            steps_out.append(state[0] if isinstance(state, tuple) else state)
    assert_agree(output, torch.stack(steps_out))
    assert_agree(over_state(lambda t: t[0], last), state)
