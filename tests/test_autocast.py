"""Autocast: every layer and cell computes in its dtype (on a CPU, torch.nn's do so for the LSTM alone)."""

import copy

import pytest
import torch
from cases import FEATURES, LAYERS, STEPS, all_modules, assert_all_agree, draw, draw_inputs, layers
from cases import make as make_module
from helpers import random_packed, random_state, tensors_in
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map

import fastrnn

low_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


@pytest.fixture(autouse=True)
def numba_backend():
    """Never torch's own kernels in place of ours."""
    with fastrnn.use_backend("numba"):
        yield


def make(name, dtype=torch.float32):
    """Layers come as two of them with two directions."""
    return make_module(name, dtype=dtype, **({"num_layers": 2, "bidirectional": True} if name in LAYERS else {}))


def results_and_gradients(module, *inputs):
    """Results, and the gradients of inputs and weights, for incoming gradients of ones."""
    leaves = [tensor.requires_grad_() for tensor in tensors_in(inputs)] + list(module.parameters())
    results = list(tensors_in(module(*inputs)))
    return results, torch.autograd.grad(results, leaves, [torch.ones_like(result) for result in results])


def in_dtype(module, dtype):
    """A module of the same class and (rounded) weights in ``dtype``."""
    return copy.deepcopy(module).to(dtype)


@all_modules
@low_dtypes
def test_results_and_states_have_the_autocast_dtype(name, dtype):
    ours, _ = make(name)
    inputs = draw_inputs(ours, dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        for call in (lambda: ours(*inputs), lambda: ours(inputs[0])):
            assert {result.dtype for result in tensors_in(call())} == {dtype}
        with torch.no_grad():
            assert {result.dtype for result in tensors_in(ours(*inputs))} == {dtype}
    assert {result.dtype for result in tensors_in(ours(*inputs))} == {torch.float32}


@all_modules
@low_dtypes
def test_agrees_with_the_module_in_that_dtype(name, dtype):
    """Bit by bit: autocast is a cast of weights, input and state, and gradients come back through the same cast."""
    ours, _ = make(name)
    low = in_dtype(ours, dtype)
    inputs = draw_inputs(ours, dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        results, gradients = results_and_gradients(ours, *inputs)
    expected, low_gradients = results_and_gradients(low, *tree_map(lambda tensor: tensor.detach().to(dtype), inputs))
    assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))
    for gradient, low_gradient in zip(gradients, low_gradients, strict=True):
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, low_gradient.float())


@layers
@low_dtypes
def test_packed_sequences(name, dtype):
    ours, _ = make(name)
    low = in_dtype(ours, dtype)
    input = random_packed(3, STEPS, FEATURES, torch.float32, 0)
    hx = random_state(ours, 3, torch.float32, 0)
    with torch.autocast("cpu", dtype):
        output, state = ours(input, hx)
    assert isinstance(output, PackedSequence)
    expected = low(PackedSequence(input.data.to(dtype), *input[1:]), tree_map(lambda part: part.to(dtype), hx))
    for mine, theirs in zip(tensors_in((output, state)), tensors_in(expected), strict=True):
        assert torch.equal(mine, theirs)


@all_modules
@low_dtypes
def test_gradients_arrive_in_float32(name, dtype):
    """Also where the backward pass runs outside of autocast, as torch recommends, and where it runs inside."""
    ours, _ = make(name)
    gradients = []
    for inside in (False, True):
        inputs = draw_inputs(ours, dtype=torch.float32)
        leaves = [tensor.requires_grad_() for tensor in tensors_in(inputs)]
        ours.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = sum(result.float().sin().sum() for result in tensors_in(ours(*inputs)))
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        gradients.append([leaf.grad for leaf in [*leaves, *ours.parameters()]])
        assert {gradient.dtype for gradient in gradients[-1]} == {torch.float32}
        assert all(gradient.isfinite().all() for gradient in gradients[-1])
        assert any(gradient.any() for gradient in gradients[-1])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@all_modules
@low_dtypes
def test_float64_is_left_alone(name, dtype):
    ours, theirs = make(name, torch.float64)
    inputs = draw_inputs(ours)
    with torch.autocast("cpu", dtype):
        mine, gradients = results_and_gradients(ours, *inputs)
    torchs, torchs_gradients = results_and_gradients(theirs, *inputs)
    assert {tensor.dtype for tensor in (*mine, *gradients)} == {torch.float64}
    assert_all_agree((mine, gradients), (torchs, torchs_gradients))


@all_modules
def test_nested_autocast_switched_off(name):
    """``enabled=False`` inside gives float32 again, and an inner dtype takes the place of the outer one."""
    ours, _ = make(name)
    inputs = draw_inputs(ours, dtype=torch.float32)
    plain = list(tensors_in(ours(*inputs)))
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            inner = list(tensors_in(ours(*inputs)))
        with torch.autocast("cpu", torch.float16):
            assert {result.dtype for result in tensors_in(ours(*inputs))} == {torch.float16}
        assert {result.dtype for result in tensors_in(ours(*inputs))} == {torch.bfloat16}
    assert all(torch.equal(*pair) for pair in zip(inner, plain, strict=True))


@all_modules
@low_dtypes
def test_inputs_of_mixed_dtypes(name, dtype):
    """Under autocast an input in its dtype and a state in float32 go together, and the other way round."""
    ours, _ = make(name)
    input, hx = draw_inputs(ours, dtype=torch.float32)
    low_input, low_hx = tree_map(lambda tensor: tensor.to(dtype), (input, hx))
    with torch.autocast("cpu", dtype):
        expected = list(tensors_in(ours(low_input, low_hx)))
        for inputs in ((input, hx), (low_input, hx), (input, low_hx)):
            results = list(tensors_in(ours(*inputs)))
            assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))
    with pytest.raises((RuntimeError, ValueError)):
        ours(low_input, hx)


@all_modules
def test_weights_in_the_autocast_dtype(name):
    ours, _ = make(name, torch.bfloat16)
    input, hx = draw_inputs(ours, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert {result.dtype for result in tensors_in(ours(input, hx))} == {torch.bfloat16}


@all_modules
@low_dtypes
def test_double_backward(name, dtype):
    """A gradient penalty, the second derivative computed in the autocast dtype too; its gradient arrives in float32."""
    ours, _ = make(name)
    low = in_dtype(ours, dtype)
    penalties = []
    for module, inputs in ((ours, draw_inputs(ours, dtype=torch.float32)), (low, draw_inputs(ours, dtype=dtype))):
        leaf = inputs[0].requires_grad_()
        with torch.autocast("cpu", dtype, enabled=module is ours):
            output = next(tensors_in(module(leaf, inputs[1])))
            (gradient,) = torch.autograd.grad(output.float().sin().sum(), leaf, create_graph=True)
            penalty = gradient.float().square().sum()
        weights = list(module.parameters())
        penalties.append(torch.autograd.grad(penalty, weights, materialize_grads=True))
    assert {gradient.dtype for gradient in penalties[0]} == {torch.float32}
    assert all(gradient.isfinite().all() for gradient in penalties[0])
    for mine, expected in zip(*penalties, strict=True):
        assert torch.equal(mine.to(dtype), expected)


@all_modules
@low_dtypes
@pytest.mark.parametrize("forward_inside", [False, True], ids=["forward_outside", "forward_inside"])
def test_derivatives_computed_inside(name, dtype, forward_inside):
    """Both derivatives under autocast, of a forward pass under it or not: gradients keep the dtype of their tensors."""
    ours, _ = make(name)
    input, hx = draw_inputs(ours, dtype=torch.float32)
    leaves = [tensor.requires_grad_() for tensor in tensors_in((input, hx))] + list(ours.parameters())
    with torch.autocast("cpu", dtype, enabled=forward_inside):
        loss = sum(result.float().sin().sum() for result in tensors_in(ours(input, hx)))
    with torch.autocast("cpu", dtype):
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        penalty = sum(gradient.float().square().sum() for gradient in first)
        second = torch.autograd.grad(penalty, leaves)
    for gradient in (*first, *second):
        assert gradient.dtype == torch.float32
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", ["gru", "lstm", "LSTMCell"])
def test_compiled(name):
    torch._dynamo.reset()
    ours, _ = make(name)
    inputs = draw_inputs(ours, dtype=torch.float32)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for enabled in (True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            expected, results = list(tensors_in(ours(*inputs))), list(tensors_in(compiled(*inputs)))
        assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))


def test_a_model_trains_under_autocast():
    """With a gradient scaler's steps around it: the loss falls as in float32."""

    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = fastrnn.GRU(FEATURES, 8, bidirectional=True)
            self.decoder = fastrnn.LSTM(16, 8)
            self.head = nn.Linear(8, FEATURES)

        def forward(self, input):
            return self.head(self.decoder(self.encoder(input)[0])[0])

    input = draw(STEPS, 8, FEATURES, dtype=torch.float32)
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = Tagger()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        losses[dtype] = []
        for _ in range(30):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = nn.functional.mse_loss(model(input).float(), input)
            loss.backward()
            optimizer.step()
            losses[dtype].append(loss.item())
    assert losses[torch.float32][-1] < losses[torch.float32][0] / 2
    assert losses[torch.bfloat16][-1] < losses[torch.bfloat16][0] / 2
