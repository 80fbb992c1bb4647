"""``torch.compile``: whole graphs, dynamic shapes, transforms inside, in float64 beside torch.nn run eagerly."""

import itertools
import os
import shutil

import pytest
import torch
from cases import (
    BATCH,
    FEATURES,
    HIDDEN,
    STEP_CELLS,
    STEPS,
    assert_all_agree,
    cells,
    draw,
    draw_inputs,
    layers,
    make,
)
from helpers import random_packed, tensors_in
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import fastrnn

SMALL = {"num_layers": 1}
LARGE = {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False}

inductor = pytest.param(
    "inductor",
    marks=pytest.mark.skipif(
        shutil.which(os.environ.get("CXX", "g++")) is None,
        reason="inductor needs a C++ compiler: g++, or what CXX names",
    ),
)
three_layers = pytest.mark.parametrize("name", ["rnn_tanh", "gru", "lstm"])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def results_and_gradients(call, module, *inputs):
    """What ``call`` returns, and the gradients of all inputs and parameters of ``module``."""
    leaves = [tensor.requires_grad_() for tensor in tensors_in(inputs)] + list(module.parameters())
    for leaf in leaves:
        leaf.grad = None
    results = list(tensors_in(call(*inputs)))
    sum(result.sin().sum() for result in results).backward()
    return [result.detach() for result in results] + [leaf.grad.clone() for leaf in leaves if leaf.grad is not None]


# Whole graphs


@layers
@pytest.mark.parametrize("arguments", [SMALL, LARGE], ids=["small", "large"])
def test_layers(name, arguments):
    ours, theirs = make(name, **arguments)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True, dynamic=False)
    inputs = draw_inputs(theirs)
    assert_all_agree(results_and_gradients(compiled, ours, *inputs), results_and_gradients(theirs, theirs, *inputs))


@three_layers
@pytest.mark.parametrize("form", ["without_hx", "unbatched"])
def test_forms_of_input(name, form):
    ours, theirs = make(name)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    input = draw(STEPS, BATCH, FEATURES) if form == "without_hx" else draw(STEPS, FEATURES)
    assert_all_agree(results_and_gradients(compiled, ours, input), results_and_gradients(theirs, theirs, input))


@cells
@pytest.mark.parametrize("with_hx", [False, True], ids=["zeros", "hx"])
def test_cells(name, with_hx):
    ours, theirs = make(name)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    inputs = draw_inputs(theirs)[: 2 if with_hx else 1]
    assert_all_agree(results_and_gradients(compiled, ours, *inputs), results_and_gradients(theirs, theirs, *inputs))


@cells
def test_cells_in_a_loop(name):
    """One graph for the whole loop, as the loop over a Python list of time steps unrolls."""
    ours, theirs = make(name)

    def loop(cell, input, hx):
        outputs = []
        for step in input:
            hx = cell(step, hx)
            outputs.append(hx[0] if isinstance(hx, tuple) else hx)
        return torch.stack(outputs)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loop, backend=counter, fullgraph=True)
    input, hx = draw(3, BATCH, FEATURES), draw_inputs(theirs)[1]
    assert_all_agree(
        results_and_gradients(lambda *inputs: compiled(ours, *inputs), ours, input, hx),
        results_and_gradients(lambda *inputs: loop(theirs, *inputs), theirs, input, hx),
    )
    assert counter.frame_count == 1


def test_compiled_cell_in_an_eager_loop():
    ours, theirs = make("LSTMCell")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, backend=counter, fullgraph=True)

    def loop(cell, input, hx):
        for step in input:
            hx = cell(step, hx)
        return hx

    input, hx = draw(6, BATCH, FEATURES), draw_inputs(theirs)[1]
    assert_all_agree(
        results_and_gradients(lambda *inputs: loop(compiled, *inputs), ours, input, hx),
        results_and_gradients(lambda *inputs: loop(theirs, *inputs), theirs, input, hx),
    )
    assert counter.frame_count <= 2  # the first step's state has no graph behind it, the others' has


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [("rnn_tanh", False), ("gru", False), ("lstm_proj", True), ("LSTMCell", False)],
)
@pytest.mark.parametrize("backend", [inductor])
def test_inductor(name, dynamic, backend):
    ours, theirs = make(name, **({} if name in STEP_CELLS else {"bidirectional": True}))
    compiled = torch.compile(ours, backend=backend, fullgraph=True, dynamic=dynamic)
    for batch, steps in ((BATCH, STEPS), (6, 7)) if dynamic else ((BATCH, STEPS),):
        inputs = draw_inputs(theirs, steps, batch)
        assert_all_agree(results_and_gradients(compiled, ours, *inputs), results_and_gradients(theirs, theirs, *inputs))


@three_layers
def test_the_graph_holds_our_operators(name):
    """One scan for each layer and pass; nothing of the layer is left to torch's kernels or unrolled."""
    ours, _ = make(name, num_layers=2, bidirectional=True)
    graphs = {}

    def keep(which):
        def compiler(graph, _):
            graphs[which] = [str(node.target) for node in graph.graph.nodes if "fastrnn" in str(node.target)]
            return make_boxed_func(graph)

        return compiler

    backend = torch._dynamo.backends.common.aot_autograd(fw_compiler=keep("forward"), bw_compiler=keep("backward"))
    torch.compile(ours, backend=backend, fullgraph=True)(draw(STEPS, BATCH, FEATURES))[0].sum().backward()
    assert graphs == {
        "forward": ["fastrnn.layer_forward.default"] * 2,
        "backward": ["fastrnn.layer_backward.default"] * 2,
    }


@three_layers
def test_dropout_draws_the_eager_masks(name):
    ours, _ = make(name, num_layers=2, dropout=0.5)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    input = draw(STEPS, BATCH, FEATURES)
    results = {}
    for training in (True, False):
        ours.train(training)
        for which, call in (("eager", ours), ("compiled", compiled)):
            torch.manual_seed(3)
            results[which, training] = results_and_gradients(call, ours, input)
        assert_all_agree(results["compiled", training], results["eager", training])
    assert not torch.equal(results["compiled", True][0], results["compiled", False][0])


class Tagger(nn.Module):
    """A layer among others: embedding, two recurrent layers, a residual connection and a linear map."""

    def __init__(self, library):
        super().__init__()
        self.embedding = nn.Embedding(10, FEATURES)
        self.encoder = library.GRU(FEATURES, HIDDEN, bidirectional=True)
        self.decoder = library.LSTM(2 * HIDDEN, 2 * HIDDEN)
        self.head = nn.Sequential(nn.LayerNorm(2 * HIDDEN), nn.Linear(2 * HIDDEN, FEATURES))

    def forward(self, tokens):
        encoded, _ = self.encoder(self.embedding(tokens))
        decoded, (_, c_n) = self.decoder(encoded)
        return self.head(decoded + encoded), c_n


def test_layers_inside_a_model():
    theirs = Tagger(nn).double()
    ours = Tagger(fastrnn).double()
    ours.load_state_dict(theirs.state_dict())
    tokens = torch.randint(10, (STEPS, BATCH), generator=torch.Generator().manual_seed(0))
    counter = CompileCounterWithBackend("aot_eager")
    results = []
    for model, call in ((ours, torch.compile(ours, backend=counter, fullgraph=True)), (theirs, theirs)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            logits, c_n = call(tokens)
            (logits.square().mean() + c_n.cos().mean()).backward()
            optimizer.step()
        results.append([logits.detach(), c_n.detach(), *(parameter.detach() for parameter in model.parameters())])
    assert_all_agree(*results)
    assert counter.frame_count == 1


def test_layers_inside_sequential():
    class Last(nn.Module):
        def forward(self, results):
            return results[0][-1]

    layer, twin = make("gru")
    ours, theirs = (nn.Sequential(part, Last(), nn.Linear(HIDDEN, 2).double()) for part in (layer, twin))
    ours.load_state_dict(theirs.state_dict())
    input = draw(STEPS, BATCH, FEATURES)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    assert_all_agree(results_and_gradients(compiled, ours, input), results_and_gradients(theirs, theirs, input))


def test_convert_then_compile():
    theirs = Tagger(nn).double()
    ours = Tagger(nn).double()
    ours.load_state_dict(theirs.state_dict())
    compiled = torch.compile(fastrnn.convert(ours), backend="aot_eager", fullgraph=True)
    tokens = torch.randint(10, (STEPS, BATCH), generator=torch.Generator().manual_seed(0))
    assert_all_agree(compiled(tokens), theirs(tokens))


# Without gradients


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["gru", "lstm", "LSTMCell"])
def test_without_grad(name, mode):
    """In one graph with grad mode on and off: the guard on it picks the right code."""
    ours, theirs = make(name)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    input, _ = draw_inputs(theirs)
    expected = list(tensors_in(theirs(input)))
    with mode():
        results = list(tensors_in(compiled(input)))
        assert not any(result.requires_grad for result in results)
        assert_all_agree(results, expected)
    results = list(tensors_in(compiled(input)))
    assert all(result.requires_grad for result in results)
    assert_all_agree(results, expected)


def test_nothing_is_kept_without_grad():
    """``save`` is the last argument of the operator."""
    ours, _ = make("lstm")
    saves = []

    def backend(graph, _):
        saves.extend(node.args[-1] for node in graph.graph.nodes if "layer_forward" in str(node.target))
        return make_boxed_func(graph)

    backend = torch._dynamo.backends.common.aot_autograd(fw_compiler=backend)
    with torch.no_grad():
        torch.compile(ours, backend=backend, fullgraph=True)(draw(STEPS, BATCH, FEATURES))
    assert saves == [False]


# Shapes


@pytest.mark.parametrize("name", ["rnn_tanh", "gru", "lstm", "lstm_proj"])
def test_dynamic_shapes_compile_once(name):
    ours, theirs = make(name, bidirectional=True)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, backend=counter, fullgraph=True, dynamic=True)
    results_and_gradients(compiled, ours, draw(STEPS, BATCH, FEATURES))
    once = counter.frame_count
    for steps, batch in itertools.product((2, 9), (2, 7)):
        input = draw(steps, batch, FEATURES)
        assert_all_agree(results_and_gradients(compiled, ours, input), results_and_gradients(theirs, theirs, input))
    for steps in range(10, 20):
        compiled(draw(steps, 3, FEATURES).requires_grad_())
    assert counter.frame_count == once


@three_layers
def test_shapes_become_dynamic_by_themselves(name):
    """With torch.compile's default the second length compiles again, and no further one does."""
    ours, theirs = make(name)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, backend=counter, fullgraph=True)
    counts = []
    for steps in (5, 6, 7, 8, 50):
        input = draw(steps, BATCH, FEATURES)
        assert_all_agree(results_and_gradients(compiled, ours, input), results_and_gradients(theirs, theirs, input))
        counts.append(counter.frame_count)
    assert counts == [1, 2, 2, 2, 2]


def test_marked_dimensions():
    ours, theirs = make("lstm")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, backend=counter, fullgraph=True)
    for steps, batch in ((5, 2), (6, 7), (8, 9)):
        input = draw(steps, batch, FEATURES)
        for dim in (0, 1):
            torch._dynamo.mark_dynamic(input, dim)  # raises if the layer made the size a constant
        assert_all_agree(compiled(input), theirs(input))
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["gru", "LSTMCell"])
def test_empty_and_single(name):
    ours, theirs = make(name)
    compiled = torch.compile(ours, backend="aot_eager", dynamic=True)
    for steps, batch in ((5, 2), (1, 2), (5, 1), (1, 1), (5, 0)):
        input, _ = draw_inputs(theirs, steps, batch)
        assert_all_agree(compiled(input), theirs(input))


# Derivatives inside


def per_sample_gradient(module):
    def loss(parameters, input):
        return sum(result.sin().sum() for result in tensors_in(functional_call(module, parameters, (input,))))

    return vmap(grad(loss), in_dims=(None, 1))


def detached_parameters(module):
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("name", ["rnn_relu", "gru", "lstm", "lstm_proj"])
def test_compiled_vmap_of_grad(name):
    ours, theirs = make(name, bidirectional=True)
    input = draw(STEPS, 3, BATCH, FEATURES)
    parameters = detached_parameters(ours)
    mine = torch.compile(per_sample_gradient(ours), backend="aot_eager", fullgraph=True)(parameters, input)
    by_loop = []
    for index in range(3):
        results = tensors_in(theirs(input[:, index]))
        by_loop.append(torch.autograd.grad(sum(result.sin().sum() for result in results), list(theirs.parameters())))
    assert_all_agree(list(mine.values()), [torch.stack(parts) for parts in zip(*by_loop, strict=True)])


def test_compiled_ensemble():
    pairs = [make("lstm", seed=seed) for seed in range(3)]
    parameters, _ = stack_module_state([ours for ours, _ in pairs])
    parameters = {name: parameter.detach() for name, parameter in parameters.items()}
    input = draw(STEPS, BATCH, FEATURES)

    def ensemble(parameters, input):
        def one(parameters):
            output = functional_call(pairs[0][0], parameters, (input,))[0]
            return output.sin().sum(), output

        return vmap(grad(one, has_aux=True))(parameters)

    gradients, outputs = torch.compile(ensemble, backend="aot_eager", fullgraph=True)(parameters, input)
    expected, expected_gradients = [], []
    for _, theirs in pairs:
        expected.append(theirs(input)[0])
        expected_gradients.append(torch.autograd.grad(expected[-1].sin().sum(), list(theirs.parameters())))
    assert_all_agree(outputs, torch.stack(expected))
    assert_all_agree(list(gradients.values()), [torch.stack(parts) for parts in zip(*expected_gradients, strict=True)])


@pytest.mark.parametrize("name", ["gru", "LSTMCell"])
@pytest.mark.parametrize("transform", ["jvp", "jacrev", "jacfwd", "hessian"])
def test_other_compiled_transforms(name, transform):
    """Beside themselves run eagerly, which has tests of its own."""
    ours, theirs = make(name)
    input, _ = draw_inputs(theirs, steps=2)
    parameters = detached_parameters(ours)

    def first(input):
        return next(tensors_in(functional_call(ours, parameters, (input,))))

    transformed = {
        "jvp": lambda input: jvp(first, (input,), (input.cos(),)),
        "jacrev": jacrev(first),
        "jacfwd": jacfwd(first),
        "hessian": hessian(lambda input: first(input).sin().sum()),
    }[transform]
    assert_all_agree(torch.compile(transformed, backend="aot_eager", fullgraph=True)(input), transformed(input))


@three_layers
def test_checkpointing_inside(name):
    ours, theirs = make(name)

    def checkpointed(input):
        return checkpoint(ours, input, use_reentrant=False)

    input = draw(STEPS, BATCH, FEATURES)
    compiled = torch.compile(checkpointed, backend="aot_eager", fullgraph=True)
    assert_all_agree(results_and_gradients(compiled, ours, input), results_and_gradients(theirs, theirs, input))


def test_double_backward_through_a_compiled_forward_is_refused():
    """By torch itself, with any model; ``torch.func.grad`` inside the compiled function is the way."""
    ours, _ = make("lstm")
    input = draw(STEPS, BATCH, FEATURES).requires_grad_()
    output, _ = torch.compile(ours, backend="aot_eager")(input)
    (gradient,) = torch.autograd.grad(output.sin().sum(), input, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        gradient.sum().backward()


@pytest.mark.parametrize("name", ["rnn_tanh", "gru", "lstm", "lstm_proj", "LSTMCell"])
def test_compiled_grad_of_grad(name):
    ours, theirs = make(name)
    input, _ = draw_inputs(theirs, steps=3)

    def total(module, parameters, input):
        return sum(result.sin().sum() for result in tensors_in(functional_call(module, parameters, (input,))))

    def second(parameters, input):
        def penalty(parameters):
            return grad(lambda input: total(ours, parameters, input))(input).square().sum()

        return grad(penalty)(parameters)

    mine = torch.compile(second, backend="aot_eager", fullgraph=True)(detached_parameters(ours), input)
    leaf = input.clone().requires_grad_()
    (first,) = torch.autograd.grad(total(theirs, dict(theirs.named_parameters()), leaf), leaf, create_graph=True)
    torchs = torch.autograd.grad(first.square().sum(), list(theirs.parameters()), materialize_grads=True)
    assert_all_agree(list(mine.values()), torchs)


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        pytest.param("rnn_tanh", *inductor.values, marks=inductor.marks),
        ("gru", "aot_eager"),
        ("lstm_proj", "aot_eager"),
    ],
)
def test_gradient_penalty_inside(name, backend):
    """The gradient of the input is part of the compiled loss; the weights' gradients come from ``backward`` outside."""
    ours, theirs = make(name)
    input = draw(2, BATCH, FEATURES)  # inductor compiles every step of the second derivative on its own

    def critic(input):
        first = grad(lambda input: ours(input)[0].sin().sum())(input)
        return (first.square().sum((0, 2)).sqrt() - 1).square().sum()

    torch.compile(critic, backend=backend, fullgraph=True)(input).backward()
    leaf = input.clone().requires_grad_()
    (first,) = torch.autograd.grad(theirs(leaf)[0].sin().sum(), leaf, create_graph=True)
    (first.square().sum((0, 2)).sqrt() - 1).square().sum().backward()
    assert_all_agree(
        [parameter.grad for parameter in ours.parameters()], [parameter.grad for parameter in theirs.parameters()]
    )


# Choice of the backend


def test_another_backend_compiles_again():
    ours, theirs = make("lstm")
    input = draw(STEPS, BATCH, FEATURES)
    graphs = []

    def backend(graph, _):
        graphs.append([node.args[0] for node in graph.graph.nodes if "layer_forward" in str(node.target)])
        return make_boxed_func(graph)

    backend = torch._dynamo.backends.common.aot_autograd(fw_compiler=backend)
    compiled = torch.compile(ours, backend=backend, fullgraph=True)
    expected = theirs(input)
    with fastrnn.use_backend("numba"):
        assert_all_agree(compiled(input), expected)
    with fastrnn.use_backend("reference"):
        assert_all_agree(compiled(input), expected)
    with fastrnn.use_backend("numba"):
        assert_all_agree(compiled(input), expected)
    assert graphs == [["numba"], []]


def test_a_backend_that_cannot_run_the_call_says_so():
    module = fastrnn.LSTM(FEATURES, HIDDEN, dtype=torch.complex64)
    compiled = torch.compile(module, backend="aot_eager")
    with fastrnn.use_backend("numba"), pytest.raises(RuntimeError, match=r"numba.*floating point"):
        compiled(torch.zeros(STEPS, BATCH, FEATURES, dtype=torch.complex64))


# Packed sequences: a graph break, never a wrong result


@three_layers
def test_packed_input(name):
    ours, theirs = make(name, bidirectional=True)
    compiled = torch.compile(ours, backend="aot_eager")
    for seed in range(2):
        input = random_packed(3, STEPS, FEATURES, torch.float64, seed)
        assert_all_agree(results_and_gradients(compiled, ours, input), results_and_gradients(theirs, theirs, input))


def test_packing_inside():
    ours, theirs = make("lstm")

    def masked(module, padded, lengths):
        packed = pack_padded_sequence(padded, lengths, enforce_sorted=False)
        output, (_, c_n) = module(packed)
        return pad_packed_sequence(output)[0] * 2, c_n

    compiled = torch.compile(masked, backend="aot_eager")
    for lengths in ([3, 5, 1], [5, 2, 2]):
        padded, lengths = draw(STEPS, 3, FEATURES), torch.tensor(lengths)
        assert_all_agree(
            results_and_gradients(lambda padded, n=lengths: compiled(ours, padded, n), ours, padded),
            results_and_gradients(lambda padded, n=lengths: masked(theirs, padded, n), theirs, padded),
        )
