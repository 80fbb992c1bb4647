"""First, second and third derivatives, and what autograd offers around them, in float64."""

import collections
import gc
import threading
import warnings
import weakref

import pytest
import torch
from cases import BATCH, FEATURES, HIDDEN, STEP_CELLS, all_modules, assert_all_agree, draw_inputs, layers, make
from helpers import random_packed, random_state, tensors_in
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastrnn

STEPS = 3

both_forms = pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])


@pytest.fixture(autouse=True)
def numba_backend():
    """Never torch's own kernels in place of ours."""
    with fastrnn.use_backend("numba"):
        yield


def make_case(name, packed=False, **arguments):
    """Our module, torch's, the input and hx."""
    pair = make(name, **arguments)
    if packed:
        input = random_packed(BATCH + 1, STEPS, FEATURES, torch.float64, 0)
        return *pair, input, random_state(pair[0], BATCH + 1, torch.float64, 0)
    return *pair, *draw_inputs(pair[0], STEPS)


def as_function(module, input, hx):
    """``module`` as a function of tensors that returns a tuple, and its arguments: input, state and every weight."""
    names = [name for name, _ in module.named_parameters()]

    def function(data, *rest):
        state, weights = rest[: -len(names)], dict(zip(names, rest[-len(names) :], strict=True))
        data = PackedSequence(data, *input[1:]) if isinstance(input, PackedSequence) else data
        return tuple(tensors_in(functional_call(module, weights, (data, state if len(state) == 2 else state[0]))))

    leaves = (*tensors_in(input), *tensors_in(hx), *module.parameters())
    return function, tuple(leaf.detach().clone().requires_grad_() for leaf in leaves)


def gradient_penalty(function, leaves, wanted=None):
    """Gradients of a loss made of outputs and their gradients: every second derivative takes part."""
    loss = sum(output.sin().sum() for output in function(*leaves))
    gradients = torch.autograd.grad(loss, leaves if wanted is None else wanted, create_graph=True)
    penalty = sum(gradient.square().sum() for gradient in gradients)
    return torch.autograd.grad(loss + penalty, leaves if wanted is None else wanted)


# Derivatives against differences


@layers
@both_forms
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "both"])
def test_first_derivatives(name, packed, bias, bidirectional):
    ours, _, input, hx = make_case(name, packed, bias=bias, bidirectional=bidirectional)
    function, leaves = as_function(ours, input, hx)
    # every entry of the Jacobian with one direction, a random projection of it with two
    assert gradcheck(function, leaves, fast_mode=bidirectional, check_forward_ad=True, check_batched_grad=True)


@layers
@both_forms
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "both"])
def test_second_derivatives(name, packed, bias, bidirectional):
    ours, _, input, hx = make_case(name, packed, bias=bias, bidirectional=bidirectional)
    function, leaves = as_function(ours, input, hx)
    assert gradgradcheck(function, leaves, fast_mode=True, gen_non_contig_grad_outputs=True)


@pytest.mark.parametrize("name", STEP_CELLS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_derivatives_of_cells(name, bias):
    ours, _, input, hx = make_case(name, bias=bias)
    function, leaves = as_function(ours, input, hx)
    assert gradcheck(function, leaves, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, leaves, fast_mode=True, gen_non_contig_grad_outputs=True)


@layers
def test_derivatives_through_two_layers(name):
    ours, _, input, hx = make_case(name, num_layers=2, bidirectional=True, batch_first=True)
    function, leaves = as_function(ours, input, hx)
    assert gradcheck(function, leaves, fast_mode=True, check_forward_ad=True, check_batched_grad=True)


@pytest.mark.parametrize("name", ["rnn_tanh", "gru", "lstm_proj"])
def test_batched_second_derivatives(name):
    ours, _, input, hx = make_case(name)
    function, leaves = as_function(ours, input[:2], hx)
    assert gradgradcheck(function, leaves, fast_mode=True, check_batched_grad=True)


@layers
def test_second_derivatives_of_some_results(name):
    """Incoming gradients that are absent: of the output alone, of each final state alone."""
    ours, _, input, hx = make_case(name)
    function, leaves = as_function(ours, input, hx)
    for which in range(len(function(*leaves))):
        assert gradcheck(lambda *args, which=which: function(*args)[which], leaves, fast_mode=True)
        assert gradgradcheck(lambda *args, which=which: function(*args)[which], leaves, fast_mode=True)


# Derivatives against torch.nn


@all_modules
def test_gradient_penalty(name):
    arguments = {} if name in STEP_CELLS else {"num_layers": 2, "bidirectional": True}
    ours, theirs, input, hx = make_case(name, **arguments)
    mine, torchs = (gradient_penalty(*as_function(module, input, hx)) for module in (ours, theirs))
    assert_all_agree(mine, torchs)


@layers
def test_gradient_penalty_packed(name):
    ours, theirs, input, hx = make_case(name, packed=True, bidirectional=True)
    mine, torchs = (gradient_penalty(*as_function(module, input, hx)) for module in (ours, theirs))
    assert_all_agree(mine, torchs)


@layers
@pytest.mark.parametrize("leaf", ["input", "h_0", "weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"])
def test_gradient_penalty_of_one_leaf(name, leaf):
    """All but one frozen: as a WGAN's critic differentiates by its input alone."""
    ours, theirs, input, hx = make_case(name, num_layers=2)
    results = []
    for module in (ours, theirs):
        function, leaves = as_function(module, input, hx)
        names = ["input", "h_0", "c_0"][: 1 + len(list(tensors_in(hx)))] + [
            name for name, _ in module.named_parameters()
        ]
        wanted = leaves[names.index(leaf)]
        for other in leaves:
            other.requires_grad_(other is wanted)
        results.append(gradient_penalty(function, leaves, [wanted]))
    assert_all_agree(*results)


@layers
def test_penalty_on_the_input_trains_the_weights(name):
    ours, theirs, input, hx = make_case(name)
    results = []
    for module in (ours, theirs):
        leaf = input.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(module(leaf, hx)[0].square().sum(), leaf, create_graph=True)
        module.zero_grad()
        (gradient.norm() - 1).square().backward()
        results.append([parameter.grad for parameter in module.parameters()])
    assert_all_agree(*results)


@all_modules
def test_third_derivatives(name):
    """And second ones that keep a graph: their own inputs depend on one another."""
    ours, theirs, input, hx = make_case(name)
    results = []
    for module in (ours, theirs):
        function, leaves = as_function(module, input, hx)
        value = sum(output.sin().sum() for output in function(*leaves))
        derivatives = []
        for order in (1, 2, 3):
            gradients = torch.autograd.grad(value, leaves, create_graph=order < 3)
            derivatives += [gradient.detach() for gradient in gradients]
            value = sum(gradient.square().sum() for gradient in gradients)
        results.append(derivatives)
    assert_all_agree(*results)


def test_hessian_vector_product_by_double_backward():
    ours, theirs, input, hx = make_case("gru")
    results = []
    for module in (ours, theirs):
        function, leaves = as_function(module, input, hx)
        gradients = torch.autograd.grad(function(*leaves)[0].sin().sum(), leaves, create_graph=True)
        torch.manual_seed(0)
        results.append(torch.autograd.grad(gradients, leaves, [torch.randn_like(leaf) for leaf in leaves]))
    assert_all_agree(*results)


# What autograd offers


@layers
@pytest.mark.parametrize("leaf", ["input", "h_0", "weight_hh_l0"])
def test_gradients_may_be_changed_in_place(name, leaf):
    """Also those with a graph, as a penalty that clips them first does."""
    ours, theirs, input, hx = make_case(name)
    results = []
    for module in (ours, theirs):
        function, leaves = as_function(module, input, hx)
        names = ["input", "h_0", "c_0"][: 1 + len(list(tensors_in(hx)))] + [
            name for name, _ in module.named_parameters()
        ]
        wanted = leaves[names.index(leaf)]
        (gradient,) = torch.autograd.grad(function(*leaves)[0].sin().sum(), wanted, create_graph=True)
        gradient.mul_(3).sin_()
        results.append(torch.autograd.grad(gradient.sum(), leaves))
    assert_all_agree(*results)


@all_modules
@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_share_no_memory(name, create_graph):
    """An optimizer or a clipping that works in place must not change two of them at once."""
    ours, _, input, hx = make_case(name)
    function, leaves = as_function(ours, input, hx)
    loss = sum(output.sin().sum() for output in function(*leaves))
    gradients = torch.autograd.grad(loss, leaves, create_graph=create_graph)
    assert len({gradient.untyped_storage().data_ptr() for gradient in gradients}) == len(leaves)


class Recorder(TorchDispatchMode):
    """Counts the calls of every operator."""

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()
        self.needs = None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).split(".")[1]
        self.calls[name] += 1
        if name == "layer_backward":
            self.needs = args[-1]
        return function(*args, **(kwargs or {}))


@layers
def test_frozen_weights_cost_no_products(name):
    """The product for a gradient that nobody asks for is left out."""
    ours, _, input, hx = make_case(name)
    products = []
    for frozen in (False, True):
        ours.requires_grad_(not frozen)
        loss = ours(input.requires_grad_(), hx)[0].sum()
        with Recorder() as recorder:
            loss.backward()
        assert recorder.calls["layer_backward"] == 1
        products.append(recorder.needs)
    count = 6 if name == "lstm_proj" else 5
    assert [sum(needs) for needs in products] == [count, 1]


@layers
def test_unused_inputs(name):
    ours, _, input, hx = make_case(name)
    input.requires_grad_()
    unused = torch.ones(1, requires_grad=True)
    output, _ = ours(input, hx)
    with pytest.raises(RuntimeError, match="appears to not have been used"):
        torch.autograd.grad(output.sum(), [input, unused], retain_graph=True)
    gradient, absent = torch.autograd.grad(output.sum(), [input, unused], allow_unused=True, retain_graph=True)
    assert absent is None
    (again, zeros) = torch.autograd.grad(output.sum(), [input, unused], materialize_grads=True)
    assert torch.equal(gradient, again)
    assert torch.equal(zeros, torch.zeros(1, dtype=zeros.dtype))


@layers
def test_retain_graph_through_a_second_backward(name):
    ours, _, input, hx = make_case(name)
    function, leaves = as_function(ours, input, hx)
    loss = function(*leaves)[0].sin().sum()
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    penalty = sum(gradient.square().sum() for gradient in first)
    second = torch.autograd.grad(penalty, leaves, retain_graph=True)
    assert all(torch.equal(*pair) for pair in zip(second, torch.autograd.grad(penalty, leaves), strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(penalty, leaves)


@layers
@both_forms
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved_tensors", "reentrant"])
def test_checkpointing(name, packed, use_reentrant):
    ours, _, input, hx = make_case(name, packed, num_layers=2, dropout=0.5)
    function, leaves = as_function(ours, input, hx)

    def gradients(call):
        for leaf in leaves:
            leaf.grad = None
        torch.manual_seed(1)
        sum(result.sin().sum() for result in call()).backward()
        return [leaf.grad for leaf in leaves]

    kept = gradients(lambda: function(*leaves))
    recomputed = gradients(lambda: checkpoint(function, *leaves, use_reentrant=use_reentrant))
    assert all(torch.equal(*pair) for pair in zip(kept, recomputed, strict=True))


@layers
def test_double_backward_through_a_checkpoint(name):
    ours, _, input, hx = make_case(name)
    function, leaves = as_function(ours, input, hx)
    kept = gradient_penalty(function, leaves)
    recomputed = gradient_penalty(lambda *leaves: checkpoint(function, *leaves, use_reentrant=False), leaves)
    assert_all_agree(recomputed, kept)


@layers
def test_backward_in_many_threads(name):
    """Graphs of one module run backward at the same time, and so do two threads on one graph."""
    ours, _, input, hx = make_case(name, num_layers=2)
    function, leaves = as_function(ours, input, hx)
    expected = torch.autograd.grad(sum(result.sin().sum() for result in function(*leaves)), leaves)
    shared = sum(result.sin().sum() for result in function(*leaves))
    results, errors = [], []

    def work(loss):
        try:
            for _ in range(10):
                here = sum(result.sin().sum() for result in function(*leaves)) if loss is None else loss
                results.append(torch.autograd.grad(here, leaves, retain_graph=True))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(loss,)) for loss in (None, None, shared, shared)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert len(results) == 40
    for gradients in results:
        assert all(torch.equal(*pair) for pair in zip(gradients, expected, strict=True))


@layers
def test_gradients_accumulated_from_many_threads(name):
    """Hogwild: every thread calls backward and adds to the same .grad."""
    ours, _, input, hx = make_case(name)
    ours(input, hx)[0].sum().backward()
    once = [parameter.grad.clone() for parameter in ours.parameters()]
    ours.zero_grad()
    threads = [threading.Thread(target=lambda: ours(input, hx)[0].sum().backward()) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert_all_agree([parameter.grad for parameter in ours.parameters()], [4 * gradient for gradient in once])


@layers
def test_anomaly_mode(name):
    ours, _, input, hx = make_case(name)
    function, leaves = as_function(ours, input, hx)
    expected = gradient_penalty(function, leaves)
    with warnings.catch_warnings(record=True) as warned, torch.autograd.detect_anomaly():
        warnings.simplefilter("always")
        found = gradient_penalty(function, leaves)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
        with pytest.raises(RuntimeError, match="returned nan values"):
            (function(*leaves)[0] * torch.nan).sum().backward()
    assert any("Traceback of forward call" in str(warning.message) for warning in warned)


@layers
def test_saved_tensors_hooks(name):
    """Everything kept for the backward pass passes through the hooks: tensors can be moved away or packed."""
    ours, _, input, hx = make_case(name, num_layers=2)
    function, leaves = as_function(ours, input, hx)
    expected = gradient_penalty(function, leaves)
    with torch.autograd.graph.save_on_cpu():
        found = gradient_penalty(function, leaves)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))

    packed = []

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor.numpy(force=True).copy()

    with torch.autograd.graph.saved_tensors_hooks(pack, torch.from_numpy):
        results = function(*leaves)
    size = HIDDEN * {"gru": 4, "lstm": 4}.get(name.removesuffix("_proj"), 1)
    assert packed.count((STEPS * BATCH, 1, size)) >= 2  # the gates of both layers
    loss = sum(result.sin().sum() for result in results)
    plain = sum(result.sin().sum() for result in function(*leaves))
    found, expected = torch.autograd.grad(loss, leaves), torch.autograd.grad(plain, leaves)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@layers
def test_hooks_on_tensors_see_the_gradients(name):
    ours, _, input, hx = make_case(name)
    input.requires_grad_()
    seen = []
    output, _ = ours(input, hx)
    output.register_hook(lambda gradient: gradient * 2)
    ours.weight_hh_l0.register_hook(seen.append)
    output.sum().backward()
    doubled = input.grad
    input.grad = None
    ours(input, hx)[0].sum().backward()
    assert len(seen) == 2
    assert torch.equal(doubled, 2 * input.grad)


@all_modules
def test_the_graph_is_freed_with_the_results(name):
    """No cycle keeps what was saved alive until the garbage collector comes by."""
    ours, _, input, hx = make_case(name)
    input = input * 1
    results = ours(input, hx)
    saved = weakref.ref(input)
    gc.disable()
    try:
        del input
        assert saved() is not None
        del results
        assert saved() is None
    finally:
        gc.enable()
