"""``torch.func`` over layers and cells, in float64, beside torch.nn where torch supports it, or a loop."""

import copy

import pytest
import torch
from cases import BATCH, FEATURES, HIDDEN, LAYERS, STEP_CELLS, all_modules, assert_all_agree, draw, layers
from cases import make as make_module
from helpers import random_packed, random_state, tensors_in
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    grad,
    grad_and_value,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence
from torch.utils._pytree import tree_map

import fastrnn

STEPS = 3
EXAMPLES, MODELS = 3, 2


@pytest.fixture(autouse=True)
def numba_backend():
    """Never torch's own kernels in place of ours."""
    with fastrnn.use_backend("numba"):
        yield


def make(name, seed=0, **arguments):
    """Layers have two directions, unless something else is asked for."""
    return make_module(name, seed, **({"bidirectional": True} if name in LAYERS else {}) | arguments)


def draw_input(name, *leading, seed=0):
    """An input and a state as ``name`` takes them, ``leading`` dimensions before the batch: (T, *leading, B, I)."""
    if name in STEP_CELLS:
        h, c = draw(2, *leading, BATCH, HIDDEN, seed=seed + 1)
        return draw(*leading, BATCH, FEATURES, seed=seed), (h, c) if name == "LSTMCell" else h
    size = 2 if name == "lstm_proj" else HIDDEN
    h, c = draw(2, *leading, BATCH, size, seed=seed + 1), draw(2, *leading, BATCH, HIDDEN, seed=seed + 2)
    return draw(STEPS, *leading, BATCH, FEATURES, seed=seed), (h, c) if name.startswith("lstm") else h


def example_dim(name):
    """Where ``draw_input`` puts the first of its leading dimensions."""
    return 0 if name in STEP_CELLS else 1


def detached_parameters(module):
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def call(module, parameters, input, hx):
    return functional_call(module, parameters, (input, hx))


def loss(module, parameters, input, hx):
    return sum(result.sin().sum() for result in tensors_in(call(module, parameters, input, hx)))


def stacked(results, dim=0):
    """A list of trees to a tree of stacked tensors: what a loop gives in place of ``vmap``."""
    return tree_map(lambda *tensors: torch.stack(tensors, dim), *results)


def select(tree, index, dim):
    return tree_map(lambda tensor: tensor.select(dim, index), tree)


# Derivatives


@all_modules
def test_grad(name):
    input, hx = draw_input(name)
    results = [
        grad(lambda *args, module=module: loss(module, *args), argnums=(0, 1, 2))(
            detached_parameters(module), input, hx
        )
        for module in make(name)
    ]
    assert_all_agree(*results)


@all_modules
def test_grad_and_value_with_aux(name):
    input, hx = draw_input(name)
    results = []
    for module in make(name):

        def loss_and_results(parameters, module=module):
            results = call(module, parameters, input, hx)
            return sum(result.square().sum() for result in tensors_in(results)), results

        results.append(grad_and_value(loss_and_results, has_aux=True)(detached_parameters(module)))
    assert_all_agree(*results)


@all_modules
def test_vjp(name):
    input, hx = draw_input(name)
    results = []
    for module in make(name):
        outputs, pull_back = vjp(
            lambda *args, module=module: call(module, *args), detached_parameters(module), input, hx
        )
        results.append((outputs, pull_back(tree_map(torch.cos, outputs))))
    assert_all_agree(*results)


@all_modules
@pytest.mark.parametrize("jacobian", [jacrev, jacfwd], ids=["jacrev", "jacfwd"])
def test_jacobians(name, jacobian):
    input, hx = draw_input(name)
    ours, theirs = make(name)
    argnums = (0, 1, 2)
    mine = jacobian(lambda *args: call(ours, *args), argnums=argnums)(detached_parameters(ours), input, hx)
    torchs = jacrev(lambda *args: call(theirs, *args), argnums=argnums)(detached_parameters(theirs), input, hx)
    assert_all_agree(mine, torchs)


def test_jacrev_in_chunks():
    input, hx = draw_input("lstm")
    ours, _ = make("lstm")
    whole = jacrev(lambda input: call(ours, detached_parameters(ours), input, hx))(input)
    chunks = jacrev(lambda input: call(ours, detached_parameters(ours), input, hx), chunk_size=5)(input)
    assert_all_agree(chunks, whole)


@all_modules
@pytest.mark.parametrize(
    "second",
    [hessian, lambda f: jacrev(jacrev(f)), lambda f: jacrev(grad(f))],
    ids=["hessian", "jacrev_jacrev", "jacrev_grad"],
)
def test_hessians(name, second):
    """Of the input and of a weight, by torch.nn's double backward."""
    input, hx = draw_input(name)
    input = input[:, :1] if name in LAYERS else input[:1]
    hx = tree_map(lambda part: part[:, :1] if name in LAYERS else part[:1], hx)
    ours, theirs = make(name)
    weight = "weight_hh_l0" if name in LAYERS else "weight_hh"

    def objective(module):
        parameters = detached_parameters(module)
        return lambda leaves: loss(module, parameters | {weight: leaves[1]}, leaves[0], hx)

    leaves = (input, getattr(theirs, weight).detach())
    torchs = torch.autograd.functional.hessian(lambda *leaves: objective(theirs)(leaves), leaves)
    assert_all_agree(second(objective(ours))(leaves), torchs)


@all_modules
def test_jvp_and_linearize(name):
    input, hx = draw_input(name)
    tangents = draw_input(name, seed=7)
    ours, theirs = make(name)
    parameters = detached_parameters(ours)
    directions = (tree_map(torch.cos, parameters), *tangents)
    outputs, mine = jvp(lambda *args: call(ours, *args), (parameters, input, hx), directions)
    # torch.nn has no forward mode: two reverse ones make it
    expected, pull_back = vjp(lambda *args: call(theirs, *args), parameters, input, hx)
    zeros = tree_map(torch.zeros_like, expected)
    (torchs,) = vjp(lambda cotangents: pull_back(cotangents), zeros)[1](directions)
    assert_all_agree((outputs, mine), (expected, torchs))
    outputs, push_forward = linearize(lambda *args: call(ours, *args), parameters, input, hx)
    assert_all_agree((outputs, push_forward(*directions)), (expected, torchs))


@all_modules
def test_hessian_vector_product_forward_over_reverse(name):
    input, hx = draw_input(name)
    ours, theirs = make(name)
    parameters = detached_parameters(ours)
    directions = tree_map(torch.cos, parameters)
    _, mine = jvp(grad(lambda parameters: loss(ours, parameters, input, hx)), (parameters,), (directions,))
    leaves = list(theirs.parameters())
    gradients = torch.autograd.grad(loss(theirs, dict(theirs.named_parameters()), input, hx), leaves, create_graph=True)
    torchs = torch.autograd.grad(gradients, leaves, list(directions.values()))
    assert_all_agree(mine, torchs)


@all_modules
def test_dual_numbers(name):
    """Forward mode by ``torch.autograd.forward_ad``, then backward through the tangent."""
    input, hx = draw_input(name)
    tangent = draw_input(name, seed=7)[0]
    ours, _ = make(name)
    input.requires_grad_()
    with forward_ad.dual_level():
        results = ours(forward_ad.make_dual(input, tangent), hx)
        parts = [forward_ad.unpack_dual(result) for result in tensors_in(results)]
    plain = ours(input, hx)
    assert_all_agree([part.primal for part in parts], list(tensors_in(plain)))
    parameters = detached_parameters(ours)
    _, expected = jvp(lambda input: call(ours, parameters, input, hx), (input.detach(),), (tangent,))
    tangents = [part.tangent for part in parts]
    assert_all_agree(tangents, expected)
    # the gradient of (gradient of the loss) · tangent, the other way round
    (mine,) = torch.autograd.grad(sum(part.sum() for part in tangents), input)
    (first,) = torch.autograd.grad(sum(result.sum() for result in tensors_in(plain)), input, create_graph=True)
    (torchs,) = torch.autograd.grad((first * tangent).sum(), input)
    assert_all_agree(mine, torchs)


@all_modules
def test_grad_of_grad(name):
    input, hx = draw_input(name)
    ours, theirs = make(name)

    def penalty(module):
        parameters = detached_parameters(module)
        first = grad(lambda input, parameters: loss(module, parameters, input, hx))
        return grad(lambda parameters: first(input, parameters).square().sum())(parameters)

    leaf = input.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(theirs, dict(theirs.named_parameters()), leaf, hx), leaf, create_graph=True)
    torchs = torch.autograd.grad(first.square().sum(), list(theirs.parameters()), materialize_grads=True)
    assert_all_agree(penalty(ours), torchs)


def test_third_derivative():
    ours, theirs = make("gru", bidirectional=False)
    parameters = detached_parameters(ours)
    input = draw(2, 1, FEATURES)

    def third(along):
        def objective(scale):
            return loss(ours, parameters, scale * input, None)

        return grad(grad(grad(objective)))(along)

    def theirs_third(along):
        along.requires_grad_()
        value = loss(theirs, parameters, along * input, None)
        for _ in range(3):
            (value,) = torch.autograd.grad(value, along, create_graph=True)
        return value.detach()

    along = torch.tensor(0.7, dtype=torch.float64)
    assert_all_agree(third(along), theirs_third(along.clone()))


# Examples and models side by side


@all_modules
def test_vmap_without_grad(name):
    input, hx = draw_input(name, EXAMPLES)
    ours, theirs = make(name)
    dim = example_dim(name)
    with torch.no_grad():
        mine = vmap(ours, in_dims=(dim, dim), out_dims=dim)(input, hx)
        torchs = stacked([theirs(*select((input, hx), index, dim)) for index in range(EXAMPLES)], dim)
    assert_all_agree(mine, torchs)


@all_modules
@pytest.mark.parametrize("mapped", ["input", "state"])
def test_vmap_over_one_of_input_and_state(name, mapped):
    dim = example_dim(name)
    many, many_states = draw_input(name, EXAMPLES)
    one, one_state = draw_input(name, seed=5)
    ours, theirs = make(name)
    input, hx = (many, one_state) if mapped == "input" else (one, many_states)
    in_dims = (dim, None) if mapped == "input" else (None, dim)

    def gradient(module):
        parameters = detached_parameters(module)
        return lambda input, hx: grad(lambda *args: loss(module, *args), argnums=(0, 1, 2))(parameters, input, hx)

    mine = vmap(gradient(ours), in_dims=in_dims)(input, hx)
    torchs = stacked(
        [
            gradient(theirs)(input.select(dim, index), hx)
            if mapped == "input"
            else gradient(theirs)(input, select(hx, index, dim))
            for index in range(EXAMPLES)
        ]
    )
    assert_all_agree(mine, torchs)


@all_modules
@pytest.mark.parametrize("form", ["batch", "unbatched"])
def test_per_sample_gradients(name, form):
    """Shared weights, a gradient of every weight for every example: each a batch of its own, or a single sequence."""
    dim = example_dim(name)
    input, hx = draw_input(name, EXAMPLES)
    if form == "unbatched":
        input, hx = tree_map(lambda tensor: tensor.select(dim + 1, 0), (input, hx))
    ours, theirs = make(name)

    def gradient(module):
        return grad(lambda *args: loss(module, *args), argnums=(0, 1, 2))

    parameters = detached_parameters(ours)
    mine = vmap(gradient(ours), in_dims=(None, dim, dim))(parameters, input, hx)
    torchs = stacked([gradient(theirs)(parameters, *select((input, hx), index, dim)) for index in range(EXAMPLES)])
    assert_all_agree(mine, torchs)


@layers
@pytest.mark.parametrize("arguments", [{"num_layers": 2}, {"bias": False}, {"batch_first": True}], ids=str)
def test_per_sample_gradients_of_other_layers(name, arguments):
    input, _ = draw_input(name, EXAMPLES)
    ours, theirs = make(name, **arguments)

    def gradient(module):
        return grad(lambda parameters, input: loss(module, parameters, input, None))

    parameters = detached_parameters(ours)
    mine = vmap(gradient(ours), in_dims=(None, 1))(parameters, input)
    torchs = stacked([gradient(theirs)(parameters, input[:, index]) for index in range(EXAMPLES)])
    assert_all_agree(mine, torchs)


@layers
@pytest.mark.parametrize("dim", [-1, 2])
def test_per_sample_gradients_along_any_dimension(name, dim):
    input = draw(EXAMPLES, STEPS, BATCH, FEATURES).movedim(0, dim)
    ours, theirs = make(name)

    def gradient(module):
        return grad(lambda parameters, input: loss(module, parameters, input, None), argnums=(0, 1))

    parameters = detached_parameters(ours)
    mine = vmap(gradient(ours), in_dims=(None, dim), out_dims=1)(parameters, input)
    torchs = stacked([gradient(theirs)(parameters, input.select(dim, index)) for index in range(EXAMPLES)], 1)
    assert_all_agree(mine, torchs)


@layers
def test_per_sample_gradients_of_packed_sequences(name):
    """All examples have the same lengths, as ``vmap`` asks for."""
    ours, theirs = make(name)
    example = random_packed(BATCH + 1, STEPS, FEATURES, torch.float64, 0)
    data = draw(EXAMPLES, *example.data.shape)

    def of_data(parameters, data):
        return loss(ours, parameters, PackedSequence(data, *example[1:]), None)

    mine = vmap(grad(of_data, argnums=(0, 1)), in_dims=(None, 0))(detached_parameters(ours), data)
    torchs = []
    for one in data:
        # torch.nn takes no packed sequence inside a transform
        leaves = [one.clone().requires_grad_(), *theirs.parameters()]
        value = loss(theirs, dict(theirs.named_parameters()), PackedSequence(leaves[0], *example[1:]), None)
        of_input, *of_weights = torch.autograd.grad(value, leaves)
        torchs.append((of_weights, of_input))
    assert_all_agree(mine, stacked(torchs))


@all_modules
def test_per_sample_gradients_in_chunks(name):
    dim = example_dim(name)
    input, hx = draw_input(name, 5)
    ours, _ = make(name)
    parameters = detached_parameters(ours)
    gradient = grad(lambda *args: loss(ours, *args))
    whole = vmap(gradient, in_dims=(None, dim, dim))(parameters, input, hx)
    chunks = vmap(gradient, in_dims=(None, dim, dim), chunk_size=2)(parameters, input, hx)
    assert_all_agree(chunks, whole)


@all_modules
@pytest.mark.parametrize("own_input", [False, True], ids=["shared_input", "own_input"])
def test_ensembles(name, own_input):
    """Stacked weights: results and gradients of every model."""
    dim = example_dim(name)
    input, hx = draw_input(name, MODELS)
    if not own_input:
        input, hx = select((input, hx), 0, dim)
    pairs = [make(name, seed=seed) for seed in range(MODELS)]
    parameters, buffers = stack_module_state([ours for ours, _ in pairs])
    parameters = tree_map(torch.Tensor.detach, parameters)
    base = copy.deepcopy(pairs[0][0]).to("meta")

    def results_and_gradient(module):
        def loss_and_results(parameters, input, hx):
            results = functional_call(module, (parameters, buffers), (input, hx))
            return sum(result.sin().sum() for result in tensors_in(results)), results

        return grad(loss_and_results, argnums=(0, 1, 2), has_aux=True)

    data_dim = dim if own_input else None
    mine = vmap(results_and_gradient(base), in_dims=(0, data_dim, data_dim))(parameters, input, hx)
    torchs = stacked(
        [
            results_and_gradient(theirs)(
                detached_parameters(theirs), *(select((input, hx), index, dim) if own_input else (input, hx))
            )
            for index, (_, theirs) in enumerate(pairs)
        ]
    )
    assert_all_agree(mine, torchs)


@all_modules
def test_ensembles_trained_by_plain_autograd(name):
    """``vmap`` over models inside, ``backward`` and double backward outside."""
    dim = example_dim(name)
    input, hx = draw_input(name, MODELS)
    pairs = [make(name, seed=seed) for seed in range(MODELS)]
    parameters, _ = stack_module_state([ours for ours, _ in pairs])
    results = vmap(lambda *args: call(pairs[0][0], *args), in_dims=(0, dim, dim))(parameters, input, hx)
    total = sum(result.sin().sum() for result in tensors_in(results))
    gradients = torch.autograd.grad(total, list(parameters.values()), create_graph=True)
    second = torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), list(parameters.values()))
    expected, expected_second = [], []
    for index, (_, theirs) in enumerate(pairs):
        leaves = list(theirs.parameters())
        value = loss(theirs, dict(theirs.named_parameters()), *select((input, hx), index, dim))
        expected.append(torch.autograd.grad(value, leaves, create_graph=True))
        expected_second.append(torch.autograd.grad(sum(part.square().sum() for part in expected[-1]), leaves))
    assert_all_agree([part.detach() for part in gradients], tree_map(torch.Tensor.detach, stacked(expected)))
    assert_all_agree(second, stacked(expected_second))


@layers
def test_one_weight_of_its_own(name):
    """Only the recurrent weight is mapped: all others are shared by the models."""
    input, hx = draw_input(name)
    ours, theirs = make(name)
    parameters = detached_parameters(ours)
    weights = draw(MODELS, *ours.weight_hh_l0.shape)

    def gradient(module):
        return grad(
            lambda weight, parameters: loss(module, parameters | {"weight_hh_l0": weight}, input, hx), argnums=(0, 1)
        )

    mine = vmap(gradient(ours), in_dims=(0, None))(weights, parameters)
    assert_all_agree(mine, stacked([gradient(theirs)(weight, parameters) for weight in weights]))


@all_modules
@pytest.mark.parametrize("order", ["models_outside", "examples_outside"])
def test_per_sample_gradients_of_ensembles(name, order):
    dim = example_dim(name)
    input, hx = draw_input(name, EXAMPLES)
    pairs = [make(name, seed=seed) for seed in range(MODELS)]
    parameters, _ = stack_module_state([ours for ours, _ in pairs])
    parameters = tree_map(torch.Tensor.detach, parameters)

    def gradient(module):
        return grad(lambda *args: loss(module, *args), argnums=(0, 1, 2))

    one = gradient(pairs[0][0])
    if order == "models_outside":
        mine = vmap(vmap(one, in_dims=(None, dim, dim)), in_dims=(0, None, None))(parameters, input, hx)
    else:
        mine = vmap(vmap(one, in_dims=(0, None, None)), in_dims=(None, dim, dim), out_dims=1)(parameters, input, hx)
    torchs = stacked(
        [
            stacked(
                [
                    gradient(theirs)(detached_parameters(theirs), *select((input, hx), index, dim))
                    for index in range(EXAMPLES)
                ]
            )
            for _, theirs in pairs
        ]
    )
    assert_all_agree(mine, torchs)


@all_modules
def test_nested_vmap(name):
    dim = example_dim(name)
    input, hx = draw_input(name, 2, EXAMPLES)
    ours, theirs = make(name)

    def gradient(module):
        return grad(lambda *args: loss(module, *args), argnums=(0, 1, 2))

    parameters = detached_parameters(ours)
    mine = vmap(vmap(gradient(ours), in_dims=(None, dim, dim)), in_dims=(None, dim, dim))(parameters, input, hx)
    torchs = stacked(
        [
            stacked(
                [
                    gradient(theirs)(parameters, *select(select((input, hx), outer, dim), inner, dim))
                    for inner in range(EXAMPLES)
                ]
            )
            for outer in range(2)
        ]
    )
    assert_all_agree(mine, torchs)


def second_derivative_by_loop(module, parameters, input, hx):
    """Gradient of the squared input gradient by every weight, with torch.nn's double backward."""
    leaves = {name: parameter.detach().requires_grad_() for name, parameter in parameters.items()}
    input = input.detach().requires_grad_()
    (first,) = torch.autograd.grad(loss(module, leaves, input, hx), input, create_graph=True)
    return torch.autograd.grad(first.square().sum(), list(leaves.values()), materialize_grads=True)


def second_derivative(module, parameters, input, hx):
    def penalty(parameters):
        return grad(lambda input: loss(module, parameters, input, hx))(input).square().sum()

    return list(grad(penalty)(parameters).values())


@all_modules
def test_grad_of_grad_per_sample(name):
    dim = example_dim(name)
    input, hx = draw_input(name, EXAMPLES)
    ours, theirs = make(name)
    parameters = detached_parameters(ours)
    mine = vmap(lambda *args: second_derivative(ours, parameters, *args), in_dims=(dim, dim))(input, hx)
    torchs = [
        second_derivative_by_loop(theirs, parameters, *select((input, hx), index, dim)) for index in range(EXAMPLES)
    ]
    assert_all_agree(mine, stacked(torchs))


@all_modules
def test_grad_of_grad_of_ensembles(name):
    dim = example_dim(name)
    input, hx = draw_input(name, MODELS)
    pairs = [make(name, seed=seed) for seed in range(MODELS)]
    parameters, _ = stack_module_state([ours for ours, _ in pairs])
    parameters = tree_map(torch.Tensor.detach, parameters)
    mine = vmap(lambda *args: second_derivative(pairs[0][0], *args), in_dims=(0, dim, dim))(parameters, input, hx)
    torchs = [
        second_derivative_by_loop(theirs, detached_parameters(theirs), *select((input, hx), index, dim))
        for index, (_, theirs) in enumerate(pairs)
    ]
    assert_all_agree(mine, stacked(torchs))


@all_modules
def test_grad_through_per_sample_gradients(name):
    """The norm of every example's gradient as a loss: a derivative outside ``vmap(grad)``."""
    dim = example_dim(name)
    input, hx = draw_input(name, EXAMPLES)
    ours, theirs = make(name)

    def total(module):
        def of_parameters(parameters):
            one = grad(lambda parameters, input, hx: loss(module, parameters, input, hx))
            per_sample = vmap(one, in_dims=(None, dim, dim))(parameters, input, hx)
            return sum(part.square().sum((*range(1, part.dim()),)).sqrt().sum() for part in per_sample.values())

        return of_parameters

    def total_by_loop(parameters):
        result = 0
        for index in range(EXAMPLES):
            value = loss(theirs, parameters, *select((input, hx), index, dim))
            parts = torch.autograd.grad(value, list(parameters.values()), create_graph=True)
            result = result + sum(part.square().sum().sqrt() for part in parts)
        return result

    parameters = {name: parameter.detach().requires_grad_() for name, parameter in theirs.named_parameters()}
    torchs = torch.autograd.grad(total_by_loop(parameters), list(parameters.values()))
    assert_all_agree(list(grad(total(ours))(detached_parameters(ours)).values()), torchs)
    leaves = {name: parameter.detach().requires_grad_() for name, parameter in ours.named_parameters()}
    assert_all_agree(torch.autograd.grad(total(ours)(leaves), list(leaves.values())), torchs)


def test_vmap_of_jvp():
    ours, theirs = make("lstm")
    input, hx = draw_input("lstm")
    tangents = draw(EXAMPLES, *input.shape, seed=3)
    parameters = detached_parameters(ours)

    def push(tangent):
        return jvp(lambda input: call(ours, parameters, input, hx)[0], (input,), (tangent,))[1]

    jacobian = jacrev(lambda input: call(theirs, parameters, input, hx)[0])(input)
    torchs = torch.stack([torch.tensordot(jacobian, tangent, 3) for tangent in tangents])
    assert_all_agree(vmap(push)(tangents), torchs)


@layers
def test_vmap_with_dropout_in_eval_mode_and_in_training(name):
    ours, theirs = make(name, num_layers=2, dropout=0.5)
    input, hx = draw(STEPS, EXAMPLES, BATCH, FEATURES), None
    mine = vmap(ours.eval(), in_dims=1, out_dims=1)(input)
    assert_all_agree(mine[0], torch.stack([theirs.eval()(input[:, i], hx)[0] for i in range(EXAMPLES)], 1))
    same_input = input[:, :1].expand_as(input)
    different = vmap(ours.train(), in_dims=1, randomness="different")(same_input)[0]
    same = vmap(ours.train(), in_dims=1, randomness="same")(same_input)[0]
    assert not torch.equal(different[0], different[1])
    assert_all_agree(same[0], same[1])


@all_modules
def test_functional_call(name):
    input, hx = draw_input(name)
    ours, theirs = make(name)
    other = detached_parameters(make(name, seed=9)[0])
    before = detached_parameters(ours)
    assert_all_agree(call(ours, other, input, hx), call(theirs, other, input, hx))
    assert_all_agree(ours(input, hx), call(theirs, before, input, hx))


def test_vmap_over_a_packed_sequence_padded_outside():
    """``pad_packed_sequence`` of a mapped result."""
    ours, theirs = make("gru")
    example = random_packed(BATCH + 1, STEPS, FEATURES, torch.float64, 0)
    hx = torch.stack([random_state(theirs, BATCH + 1, torch.float64, seed) for seed in range(EXAMPLES)])
    mine = vmap(lambda hx: pad_packed_sequence(ours(example, hx)[0])[0])(hx)
    torchs = torch.stack([pad_packed_sequence(theirs(example, part)[0])[0] for part in hx])
    assert_all_agree(mine, torchs)
