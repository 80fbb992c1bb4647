"""``torch.export``, ``torch.jit`` and ``torch.fx``: whole graphs that leave Python, in float64 beside torch.nn."""

import io
import itertools

import pytest
import torch
from cases import (
    BATCH,
    FEATURES,
    HIDDEN,
    LAYERS,
    STEP_CELLS,
    STEPS,
    all_modules,
    assert_all_agree,
    draw,
    draw_inputs,
    layers,
    make,
)
from helpers import tensors_in
from torch import nn
from torch.export import Dim
from torch.utils._pytree import tree_map

import fastrnn

SIZES = ((2, 5), (1, 1), (7, 1), (1, 3), (12, 6))

strictness = pytest.mark.parametrize("strict", [True, False], ids=["strict", "not_strict"])


@pytest.fixture(autouse=True)
def numba_backend():
    """Never torch's own kernels in place of ours."""
    torch._dynamo.reset()
    with fastrnn.use_backend("numba"):
        yield


def scans_in(program):
    return sum("fastrnn.layer_forward" in str(node.target) for node in program.graph.nodes)


def dynamic_shapes(name, module, hx):
    batch, steps = Dim("batch", min=1, max=64), Dim("steps", min=1, max=64)
    if name in STEP_CELLS:
        return ({0: batch}, tree_map(lambda _: {0: batch}, hx))
    return ({0: batch, 1: steps} if module.batch_first else {0: steps, 1: batch}, tree_map(lambda _: {1: batch}, hx))


class Holder(nn.Module):
    """A model around one layer or cell."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input, hx):
        return self.inner(input, hx)


# torch.export


@all_modules
@strictness
def test_export_with_dynamic_sizes(name, strict):
    """One program for every length and batch: torch.nn's LSTM is held to the length that it was exported with."""
    arguments = {} if name in STEP_CELLS else {"num_layers": 2, "bidirectional": True, "batch_first": True}
    ours, theirs = make(name, **arguments)
    inputs = draw_inputs(theirs)
    shapes = dynamic_shapes(name, theirs, inputs[1])
    program = torch.export.export(ours, inputs, dynamic_shapes=shapes, strict=strict)
    assert scans_in(program) == (1 if name in STEP_CELLS else 2)
    module = program.module()
    for steps, batch in SIZES:
        inputs = draw_inputs(theirs, steps, batch)
        assert_all_agree(module(*inputs), theirs(*inputs))


@layers
@strictness
def test_export_without_a_state(name, strict):
    ours, theirs = make(name)
    shapes = {"input": {0: Dim("steps", min=1, max=64), 1: Dim("batch", min=1, max=64)}}
    program = torch.export.export(ours, (draw(STEPS, BATCH, FEATURES),), dynamic_shapes=shapes, strict=strict)
    for steps, batch in SIZES:
        input = draw(steps, batch, FEATURES)
        assert_all_agree(program.module()(input), theirs(input))


@layers
def test_export_with_fixed_sizes_keeps_to_them(name):
    ours, theirs = make(name)
    inputs = draw_inputs(theirs)
    module = torch.export.export(ours, inputs).module()
    assert_all_agree(module(*inputs), theirs(*inputs))
    with pytest.raises((AssertionError, RuntimeError), match="Guard failed"):
        module(*draw_inputs(theirs, steps=STEPS + 1))


@layers
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_run_decompositions(name):
    """Our operator stays whole; what stands around it becomes core ATen."""
    ours, theirs = make(name, bidirectional=True)
    inputs = draw_inputs(theirs)
    shapes = dynamic_shapes(name, theirs, inputs[1])
    program = torch.export.export(ours, inputs, dynamic_shapes=shapes).run_decompositions()
    assert scans_in(program) == 1
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any(target.startswith("aten.linear") for target in targets)
    for steps, batch in SIZES:
        inputs = draw_inputs(theirs, steps, batch)
        assert_all_agree(program.module()(*inputs), theirs(*inputs))


@layers
def test_save_and_load(name):
    ours, theirs = make(name, num_layers=2)
    inputs = draw_inputs(theirs)
    program = torch.export.export(ours, inputs, dynamic_shapes=dynamic_shapes(name, theirs, inputs[1]))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer)
    assert scans_in(loaded) == 2
    assert loaded.state_dict.keys() == theirs.state_dict().keys()
    for steps, batch in SIZES:
        inputs = draw_inputs(theirs, steps, batch)
        assert_all_agree(loaded.module()(*inputs), theirs(*inputs))


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *itertools.product(LAYERS | STEP_CELLS, ["exported", "traced", "symbolic"]),
        *itertools.product(["gru", "lstm_proj", "LSTMCell"], ["exported_and_compiled"]),
    ],
)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_program_trains(name, form):
    """Gradients flow through the operator that a program calls, as through torch.nn's."""
    arguments = {} if name in STEP_CELLS else {"bidirectional": True}
    ours, theirs = make(name, **arguments)
    inputs = tree_map(lambda tensor: tensor.requires_grad_(), draw_inputs(theirs))
    if form == "traced":
        program = torch.jit.trace(ours, inputs)
    elif form == "symbolic":
        program = torch.fx.symbolic_trace(Holder(ours))
    else:
        program = torch.export.export(ours, inputs).module()
    call = torch.compile(program, backend="aot_eager", fullgraph=True) if form.endswith("compiled") else program

    def gradients(call, module):
        leaves = [*tensors_in(inputs), *module.parameters()]
        return torch.autograd.grad(sum(result.sin().sum() for result in tensors_in(call(*inputs))), leaves)

    # a program may list its parameters in an order of its own
    order = [key.removeprefix("inner.") for key, _ in program.named_parameters()]
    count = len(list(tensors_in(inputs)))
    mine, torchs = gradients(call, program), gradients(theirs, theirs)
    by_name = dict(zip(order, mine[count:], strict=True))
    assert_all_agree((*mine[:count], *(by_name[key] for key, _ in theirs.named_parameters())), torchs)


def test_a_program_refuses_second_derivatives():
    """Loudly: the operator by itself has a first derivative only."""
    ours, theirs = make("lstm")
    inputs = tree_map(lambda tensor: tensor.requires_grad_(), draw_inputs(theirs))
    program = torch.export.export(ours, inputs).module()
    (gradient,) = torch.autograd.grad(program(*inputs)[0].sin().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


class Classifier(nn.Module):
    def __init__(self, library):
        super().__init__()
        self.encoder = library.LSTM(FEATURES, HIDDEN, batch_first=True, bidirectional=True)
        self.cell = library.GRUCell(2 * HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, 2)

    def forward(self, input):
        output, (h_n, _) = self.encoder(input)
        return self.head(self.cell(output[:, -1], h_n[0]).relu())


def make_classifiers():
    torch.manual_seed(0)
    theirs = Classifier(nn).double()
    ours = Classifier(fastrnn).double()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@strictness
def test_export_of_a_model(strict):
    ours, theirs = make_classifiers()
    shapes = ({0: Dim("batch", min=1, max=64), 1: Dim("steps", min=1, max=64)},)
    program = torch.export.export(ours, (draw(BATCH, STEPS, FEATURES),), dynamic_shapes=shapes, strict=strict)
    for steps, batch in SIZES:
        input = draw(batch, steps, FEATURES)
        assert_all_agree(program.module()(input), theirs(input))


def test_a_compiled_program():
    ours, theirs = make_classifiers()
    input = draw(BATCH, STEPS, FEATURES)
    program = torch.export.export(ours, (input,))
    compiled = torch.compile(program.module(), backend="aot_eager", fullgraph=True)
    assert_all_agree(compiled(input), theirs(input))


# torch.jit and torch.fx


@all_modules
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_jit_trace(name, grad):
    ours, theirs = make(name)
    inputs = draw_inputs(theirs)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(ours, inputs)
    assert "fastrnn::layer_forward" in str(traced.inlined_graph)
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    for steps, batch in SIZES:
        inputs = draw_inputs(theirs, steps, batch)
        assert_all_agree(traced(*inputs), theirs(*inputs))
        assert_all_agree(loaded(*inputs), theirs(*inputs))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_jit_trace_of_a_model():
    ours, theirs = make_classifiers()
    traced = torch.jit.trace(ours, draw(BATCH, STEPS, FEATURES))
    for steps, batch in SIZES:
        input = draw(batch, steps, FEATURES)
        assert_all_agree(traced(input), theirs(input))


def test_symbolic_trace_keeps_layers_whole():
    ours, theirs = make_classifiers()
    traced = torch.fx.symbolic_trace(ours)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["encoder", "cell", "head"]
    assert isinstance(traced.encoder, fastrnn.LSTM)
    for steps, batch in SIZES:
        input = draw(batch, steps, FEATURES)
        assert_all_agree(traced(input), theirs(input))


@all_modules
def test_symbolic_trace_passes_the_state_on(name):
    ours, theirs = make(name)
    inputs = draw_inputs(theirs)
    assert_all_agree(torch.fx.symbolic_trace(Holder(ours))(*inputs), theirs(*inputs))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_script_after_convert():
    """TorchScript compiles no Python of ours: torch's own modules take its place first."""
    ours, theirs = make_classifiers()
    scripted = torch.jit.script(fastrnn.convert(ours, to="torch"))
    for steps, batch in SIZES:
        input = draw(batch, steps, FEATURES)
        assert_all_agree(scripted(input), theirs(input))


@all_modules
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_script_of_each_module_after_convert(name):
    ours, theirs = make(name)
    input, _ = draw_inputs(theirs)
    # torch.nn's layers can be scripted as parts of a model only
    scripted = torch.jit.script(fastrnn.convert(nn.Sequential(ours), to="torch"))
    assert_all_agree(scripted(input), theirs(input))
