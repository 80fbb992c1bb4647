"""What a module is: constructor, parameters, state, copies, and changes made to its weights."""

import copy
import inspect
import io
import pickle
import typing
import warnings
from functools import partial

import pytest
import torch
from helpers import (
    CELL_CLASSES,
    LAYER_CLASSES,
    assert_same_as_torch,
    assert_same_error,
    in_float64,
    make_pair,
    random_state,
    run,
)
from torch import nn
from torch.nn.modules.rnn import RNNCellBase
from torch.nn.utils import parametrizations, parametrize

import fastrnn

ALL_CLASSES = LAYER_CLASSES + CELL_CLASSES

layers = pytest.mark.parametrize("class_name", LAYER_CLASSES)
everything = pytest.mark.parametrize("class_name", ALL_CLASSES)


def variants(class_name):
    """Constructor arguments that between them give every set of parameters."""
    if class_name in CELL_CLASSES:
        shared = [{}, {"bias": False}]
        return shared + [{"nonlinearity": "relu"}] * (class_name == "RNNCell")
    shared = [
        {},
        {"bias": False},
        {"num_layers": 3, "dropout": 0.25},
        {"num_layers": 2, "bidirectional": True, "batch_first": True},
    ]
    if class_name == "LSTM":
        shared += [{"proj_size": 2}, {"num_layers": 2, "bias": False, "bidirectional": True, "proj_size": 3}]
    if class_name == "RNN":
        shared += [{"nonlinearity": "relu", "num_layers": 2}]
    return shared


every_variant = pytest.mark.parametrize(
    ("class_name", "arguments"),
    [(class_name, arguments) for class_name in ALL_CLASSES for arguments in variants(class_name)],
    ids=str,
)
layer_variants = pytest.mark.parametrize(
    ("class_name", "arguments"),
    [(class_name, arguments) for class_name in LAYER_CLASSES for arguments in variants(class_name)],
    ids=str,
)


def input_for(class_name, seed=0):
    torch.manual_seed(seed)
    return torch.randn(3, 4) if class_name in CELL_CLASSES else torch.randn(5, 3, 4)


def pair_and_input(class_name, seed=0, **arguments):
    return *make_pair(class_name, 4, 6, seed=seed, **arguments), input_for(class_name, seed)


def assert_pair_agrees(ours, theirs, class_name, exact=None):
    """The two modules, after the same change to both, still give the same outputs and gradients."""
    assert_same_as_torch(lambda seed: (ours, theirs, input_for(class_name, seed), None), exact=exact)


def assert_equal_outputs(first, second, input):
    for name, value in run(first, input, backward=False).items():
        assert torch.equal(value, run(second, input, backward=False)[name]), name


# Construction


@everything
def test_signature_is_torchs(class_name):
    torch_class = getattr(nn, class_name)
    overloads = typing.get_overloads(torch_class.__init__)
    expected = inspect.signature(overloads[0] if overloads else torch_class.__init__).parameters
    got = inspect.signature(getattr(fastrnn, class_name).__init__).parameters
    described = [(p.name, p.kind, p.default) for p in got.values()]
    assert described[: len(expected)] == [(p.name, p.kind, p.default) for p in expected.values()]
    extra = {p.kind for p in list(got.values())[len(expected) :]}
    assert extra <= {inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD}


@pytest.mark.parametrize(
    ("class_name", "arguments"),
    [
        ("RNN", (4, 6, 2, "relu", False, True, 0.5, True)),
        ("GRU", (4, 6, 2, False, True, 0.5, True)),
        ("LSTM", (4, 6, 2, False, True, 0.5, True, 3, "cpu", torch.float64)),
        ("RNNCell", (4, 6, False, "relu", "cpu", torch.float64)),
        ("GRUCell", (4, 6, False, "cpu", torch.float64)),
        ("LSTMCell", (4, 6, False, "cpu", torch.float64)),
    ],
)
def test_positional_arguments(class_name, arguments):
    ours, theirs = make_pair(class_name, *arguments)
    assert repr(ours) == repr(theirs)
    for name in getattr(theirs, "__constants__", ()):
        assert getattr(ours, name) == getattr(theirs, name)
        assert type(getattr(ours, name)) is type(getattr(theirs, name))
    for mine, torchs in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert mine.dtype == torchs.dtype


@every_variant
def test_parameters_names_order_and_shapes(class_name, arguments):
    ours, theirs = make_pair(class_name, 4, 6, **arguments)
    described = [(name, value.shape, value.dtype) for name, value in ours.named_parameters()]
    assert described == [(name, value.shape, value.dtype) for name, value in theirs.named_parameters()]
    assert list(ours.named_buffers()) == []


@every_variant
def test_same_seed_same_weights(class_name, arguments):
    torch.manual_seed(7)
    theirs = getattr(nn, class_name)(4, 6, **arguments)
    after_theirs = torch.get_rng_state()
    torch.manual_seed(7)
    ours = getattr(fastrnn, class_name)(4, 6, **arguments)
    assert torch.equal(torch.get_rng_state(), after_theirs)
    for (name, mine), torchs in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, torchs), name
    torch.manual_seed(8)
    theirs.reset_parameters()
    torch.manual_seed(8)
    ours.reset_parameters()
    for (name, mine), torchs in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, torchs), name


@every_variant
def test_repr(class_name, arguments):
    ours, theirs = make_pair(class_name, 4, 6, **arguments)
    assert repr(ours) == repr(theirs)
    assert ours.extra_repr() == theirs.extra_repr()


@everything
def test_base_classes(class_name):
    ours = getattr(fastrnn, class_name)(4, 6)
    assert isinstance(ours, RNNCellBase if class_name in CELL_CLASSES else nn.RNNBase)
    # Dynamo refuses isinstance checks against torch's own layers, so ours are none.
    assert not isinstance(ours, getattr(nn, class_name))


@everything
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_device_and_dtype(class_name, dtype):
    ours = getattr(fastrnn, class_name)(4, 6, device="meta", dtype=dtype)
    assert {(p.device.type, p.dtype) for p in ours.parameters()} == {("meta", dtype)}
    ours = ours.to_empty(device="cpu")
    assert {(p.device.type, p.dtype) for p in ours.parameters()} == {("cpu", dtype)}


@everything
def test_default_dtype(class_name):
    torch.set_default_dtype(torch.float64)
    try:
        ours, theirs, input = pair_and_input(class_name)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in ours.parameters()} == {torch.float64}
    assert_same_as_torch(lambda seed: (ours, theirs, input, None))


@everything
def test_skip_init(class_name):
    """torch's own layers cannot do this: their signature does not name `device`."""
    before = torch.get_rng_state()
    ours = nn.utils.skip_init(getattr(fastrnn, class_name), 4, 6, bias=False)
    assert torch.equal(torch.get_rng_state(), before)
    theirs = getattr(nn, class_name)(4, 6, bias=False)
    ours.load_state_dict(theirs.state_dict())
    assert_pair_agrees(ours, theirs, class_name)


BAD_LAYER_ARGUMENTS = [
    {"input_size": 0},
    {"input_size": -1},
    {"input_size": 4.0},
    {"input_size": "4"},
    {"input_size": None},
    {"hidden_size": 0},
    {"hidden_size": -3},
    {"hidden_size": 6.0},
    {"hidden_size": None},
    {"num_layers": 0},
    {"num_layers": -1},
    {"num_layers": 1.5},
    {"num_layers": "2"},
    {"bias": 0},
    {"bias": "True"},
    {"bias": None},
    {"batch_first": 1},
    {"batch_first": None},
    {"dropout": -0.1},
    {"dropout": 1.1},
    {"dropout": True},
    {"dropout": "a"},
    {"dropout": "0.5"},
    {"dropout": None},
    {"dropout": float("nan")},
    {"proj_size": 2},
    {"proj_size": -1},
    {"proj_size": 6},
    {"proj_size": 7},
    {"proj_size": 0},
    {"device": "nowhere"},
    {"dtype": torch.int32},
    {"dtype": "float32"},
    # Several at once: the first check that fails speaks.
    {"input_size": 0, "hidden_size": "6"},
    {"bias": 0, "dropout": 2},
    {"num_layers": 0, "proj_size": -1},
]


@layers
@pytest.mark.parametrize("bad", BAD_LAYER_ARGUMENTS, ids=str)
def test_bad_layer_arguments(class_name, bad):
    arguments = {"input_size": 4, "hidden_size": 6} | bad
    if class_name == "LSTM" and bad.get("proj_size") in (0, 2) and len(bad) == 1:
        assert repr(fastrnn.LSTM(**arguments)) == repr(nn.LSTM(**arguments))
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same_error(
            lambda: getattr(fastrnn, class_name)(**arguments),
            lambda: getattr(nn, class_name)(**arguments),
        )


@pytest.mark.parametrize("nonlinearity", ["sigmoid", "TANH", None, 1], ids=str)
def test_bad_nonlinearity(nonlinearity):
    assert_same_error(
        lambda: fastrnn.RNN(4, 6, nonlinearity=nonlinearity), lambda: nn.RNN(4, 6, nonlinearity=nonlinearity)
    )
    # A cell says so when it is called.
    ours, theirs = make_pair("RNNCell", 4, 6, nonlinearity=nonlinearity)
    input = input_for("RNNCell")
    assert_same_error(lambda: ours(input), lambda: theirs(input))


@pytest.mark.parametrize("class_name", CELL_CLASSES)
@pytest.mark.parametrize(
    "bad",
    [
        {"hidden_size": -1},
        {"input_size": -1},
        {"hidden_size": 6.0},
        {"input_size": "4"},
        {"hidden_size": None},
        {"device": "nowhere"},
        {"dtype": torch.int32},
    ],
    ids=str,
)
def test_bad_cell_arguments(class_name, bad):
    arguments = {"input_size": 4, "hidden_size": 6} | bad
    assert_same_error(lambda: getattr(fastrnn, class_name)(**arguments), lambda: getattr(nn, class_name)(**arguments))


@everything
def test_wrong_number_or_names_of_arguments(class_name):
    for arguments, keywords in (
        ((), {}),
        ((4,), {}),
        ((4, 6), {"hiden_size": 6}),
        ((4, 6), {"input_size": 4}),
    ):
        with pytest.raises(TypeError):
            getattr(fastrnn, class_name)(*arguments, **keywords)


@layers
def test_dropout_with_one_layer_warns(class_name):
    caught = []
    for module in (fastrnn, nn):
        with warnings.catch_warnings(record=True) as records:
            warnings.simplefilter("always")
            getattr(module, class_name)(4, 6, dropout=0.5)
        caught.append([(record.category, str(record.message)) for record in records])
    assert caught[0] == caught[1]
    assert len(caught[0]) == 1


# State


@every_variant
def test_state_dict_both_ways(class_name, arguments):
    ours = getattr(fastrnn, class_name)(4, 6, **arguments)
    theirs = getattr(nn, class_name)(4, 6, **arguments)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.state_dict()._metadata == theirs.state_dict()._metadata
    assert str(theirs.load_state_dict(ours.state_dict())) == "<All keys matched successfully>"
    assert_pair_agrees(ours.eval(), theirs.eval(), class_name)
    theirs.reset_parameters()
    assert str(ours.load_state_dict(theirs.state_dict())) == "<All keys matched successfully>"
    assert_pair_agrees(ours, theirs, class_name)


@everything
def test_load_state_dict_by_assignment(class_name):
    theirs = getattr(nn, class_name)(4, 6)
    ours = getattr(fastrnn, class_name)(4, 6, device="meta")
    ours.load_state_dict(theirs.state_dict(), assign=True)
    assert_pair_agrees(ours, theirs, class_name)


@everything
def test_bad_state_dicts(class_name):
    ours, theirs, _ = pair_and_input(class_name)
    state = theirs.state_dict()
    first = next(iter(state))
    for bad in (
        {key: value for key, value in state.items() if key != first},
        {**state, "more": torch.zeros(1)},
        {**state, first: torch.zeros(1, 2)},
    ):
        assert_same_error(lambda bad=bad: ours.load_state_dict(bad), lambda bad=bad: theirs.load_state_dict(bad))


@every_variant
def test_pickle_and_deepcopy(class_name, arguments):
    ours, _, input = pair_and_input(class_name, **arguments)
    # A copy is asked for after the module was used, as in practice.
    run(ours, input)
    ours.eval()
    for twin in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        assert type(twin) is type(ours)
        assert repr(twin) == repr(ours)
        assert not twin.training
        assert_equal_outputs(twin, ours, input)
        for mine, copied in zip(ours.parameters(), twin.parameters(), strict=True):
            assert mine.data_ptr() != copied.data_ptr()
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.add_(1)
        changed = run(twin, input, backward=False)["output[0]"]
        assert not torch.equal(changed, run(ours, input, backward=False)["output[0]"])


@every_variant
def test_save_and_load_of_the_module(class_name, arguments):
    ours, theirs, input = pair_and_input(class_name, **arguments)
    file = io.BytesIO()
    torch.save(ours.eval(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert_equal_outputs(loaded, ours, input)
    assert_pair_agrees(loaded, theirs.eval(), class_name)


OLD_ARGUMENTS = [{}, {"bias": False}, {"num_layers": 2, "bidirectional": True}]


def restored(module, state):
    module = type(module).__new__(type(module))
    module.__setstate__(state)
    return module


@layers
@pytest.mark.parametrize("arguments", OLD_ARGUMENTS, ids=str)
def test_state_before_proj_size(class_name, arguments):
    """Modules that were pickled before torch 1.8 have no proj_size."""
    ours, theirs, _ = pair_and_input(class_name, **arguments)
    state = ours.__getstate__()
    state.pop("proj_size", None)
    ours = restored(ours, state)
    assert ours.proj_size == 0
    assert_pair_agrees(ours, theirs, class_name)


@layers
@pytest.mark.parametrize("arguments", [{}, {"bias": False}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_state_with_tensors_in_all_weights(class_name, arguments):
    """Modules that were pickled before torch 0.4 list their weights, not the names of these."""
    ours, theirs, _ = pair_and_input(class_name, **arguments)
    weights = ours.all_weights
    for key in ("proj_size", "_flat_weights", "_flat_weights_names", "_flat_weight_refs", "_all_weights"):
        ours.__dict__.pop(key, None)
    state = {**ours.__dict__, "all_weights": weights}
    ours = restored(ours, state)
    assert [len(names) for names in ours._all_weights] == [len(tensors) for tensors in weights]
    assert_pair_agrees(ours, theirs, class_name)


@layer_variants
def test_state_of_torchs_module(class_name, arguments):
    """The pickled state of torch's module makes a module of ours."""
    ours, theirs, _ = pair_and_input(class_name, **arguments)
    assert_pair_agrees(restored(ours, copy.deepcopy(theirs).__getstate__()), theirs, class_name)


@layer_variants
def test_flat_weights_and_all_weights(class_name, arguments):
    ours, theirs, input = pair_and_input(class_name, **arguments)
    assert ours._flat_weights_names == theirs._flat_weights_names
    assert ours._all_weights == theirs._all_weights

    def check():
        assert isinstance(ours._flat_weights, list)
        parameters = dict(ours.named_parameters())
        for mine, name in zip(ours._flat_weights, ours._flat_weights_names, strict=True):
            assert mine is parameters[name]
        nested = [[parameters[name] for name in names] for names in ours._all_weights]
        assert len(ours.all_weights) == len(nested)
        for mine, expected in zip(ours.all_weights, nested, strict=True):
            assert len(mine) == len(expected)
            assert all(a is b for a, b in zip(mine, expected, strict=True))

    check()
    ours.double()
    check()
    ours.float()
    run(ours, input)
    check()


@layers
def test_flatten_parameters_does_nothing(class_name):
    ours, theirs, _ = pair_and_input(class_name, num_layers=2)
    before = [(id(p), p.data_ptr()) for p in ours.parameters()]
    assert ours.flatten_parameters() is None
    assert before == [(id(p), p.data_ptr()) for p in ours.parameters()]
    assert_pair_agrees(ours, theirs, class_name)


@everything
def test_moving_to_another_dtype(class_name):
    ours, theirs, input = pair_and_input(class_name)
    run(ours, input)
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.float32):

        def make(seed, dtype=dtype):
            return ours.to(dtype), theirs.to(dtype), input_for(class_name, seed).to(dtype), None

        assert_same_as_torch(make)


# Changes to the weights


@layers
def test_weight_tying(class_name):
    ours, theirs, _ = pair_and_input(class_name, num_layers=2)
    for module in (ours, theirs):
        module.weight_hh_l1 = module.weight_hh_l0
    assert len(list(ours.parameters())) == len(list(theirs.parameters())) == 7
    assert_pair_agrees(ours, theirs, class_name)
    assert_pair_agrees(copy.deepcopy(ours), theirs, class_name)
    assert len(list(copy.deepcopy(ours).parameters())) == 7


def test_weight_tying_between_cells():
    ours, theirs, _ = pair_and_input("LSTMCell")
    other, other_theirs = make_pair("LSTMCell", 4, 6, seed=1)
    other.weight_ih, other_theirs.weight_ih = ours.weight_ih, theirs.weight_ih
    assert_pair_agrees(other, other_theirs, "LSTMCell")
    assert ours.weight_ih.grad is other.weight_ih.grad


@everything
def test_assigning_a_new_weight(class_name):
    ours, theirs, input = pair_and_input(class_name)
    run(ours, input)
    name = "weight_hh" if class_name in CELL_CLASSES else "weight_hh_l0"
    new = torch.randn_like(getattr(ours, name))
    for module in (ours, theirs):
        setattr(module, name, nn.Parameter(new.clone()))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_pair_agrees(ours, theirs, class_name)
    if class_name in LAYER_CLASSES:
        assert ours._flat_weights[1] is ours.weight_hh_l0


@everything
def test_assigning_no_parameter(class_name):
    ours, theirs, _ = pair_and_input(class_name)
    name = "weight_hh" if class_name in CELL_CLASSES else "weight_hh_l0"
    for value in (torch.zeros(2, 2), 3, "weight"):
        assert_same_error(partial(setattr, ours, name, value), partial(setattr, theirs, name, value))


@layers
def test_removed_weights(class_name):
    ours, theirs, input = pair_and_input(class_name)
    for module in (ours, theirs):
        module.weight_ih_l0 = None
    assert_same_error(lambda: ours(input), lambda: theirs(input))


def change_in_place(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.5)


def change_data_in_place(module):
    # Unlike the above, this leaves no trace in the version counter.
    for parameter in module.parameters():
        parameter.data.mul_(0.5)


def replace_data(module):
    for parameter in module.parameters():
        parameter.data = parameter.data * 0.5


def load_other_weights(module):
    module.load_state_dict({name: value * 0.5 for name, value in module.state_dict().items()})


def set_through_numpy(module):
    for parameter in module.parameters():
        parameter.detach().numpy()[...] *= 0.5


def reset(module):
    torch.manual_seed(3)
    module.reset_parameters()


def step_an_optimizer(module):
    torch.manual_seed(3)
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    torch.optim.Adam(module.parameters(), lr=0.1, fused=True).step()


@everything
@pytest.mark.parametrize(
    "change",
    [
        change_in_place,
        change_data_in_place,
        replace_data,
        load_other_weights,
        set_through_numpy,
        reset,
        step_an_optimizer,
    ],
    ids=lambda change: change.__name__,
)
def test_changed_weights_are_used(class_name, change):
    """Nothing that a backend keeps of the weights may outlive them, in training and in inference."""
    ours, theirs, input = pair_and_input(class_name)
    run(ours, input)
    run(ours, input, backward=False)
    change(ours)
    change(theirs)
    assert_same_as_torch(lambda seed: (ours, theirs, input_for(class_name, seed), None), backward=False)
    assert_pair_agrees(ours, theirs, class_name)


NORMS = {
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "parametrizations.weight_norm": parametrizations.weight_norm,
    "parametrizations.spectral_norm": parametrizations.spectral_norm,
    "parametrizations.orthogonal": parametrizations.orthogonal,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@everything
@pytest.mark.parametrize("norm", NORMS)
def test_norms_of_weights(class_name, norm):
    ours, theirs, input = pair_and_input(class_name)
    exact = in_float64(theirs)
    name = "weight_hh" if class_name in CELL_CLASSES else "weight_hh_l0"
    for module in (ours, theirs, exact):
        # The spectral norm's power iteration begins at random and goes on in each forward pass in training.
        torch.manual_seed(1)
        NORMS[norm](module, name)
        module.eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for _ in range(2):
        exact.load_state_dict(theirs.state_dict())
        assert_pair_agrees(ours, theirs, class_name, exact)
        for module in (ours, theirs):
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.mul_(0.75)
    # In training the power iteration takes a step each time that a module looks at its weight: the numbers may differ.
    results = [run(module.train(), input) for module in (ours, theirs)]
    assert results[0].keys() == results[1].keys()
    assert all(value.isfinite().all() for value in results[0].values())


@layers
def test_parametrized_module_can_be_copied_after_use(class_name):
    """torch.nn cannot do this: it keeps the computed weight, which is no leaf."""
    ours, _, input = pair_and_input(class_name)
    parametrizations.weight_norm(ours, "weight_hh_l0")
    run(ours, input)
    assert_equal_outputs(copy.deepcopy(ours), ours, input)


@layers
def test_parametrization_comes_and_goes(class_name):
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    ours, theirs, _ = pair_and_input(class_name, num_layers=2)
    exact = in_float64(theirs)
    for module in (ours, theirs, exact):
        parametrize.register_parametrization(module, "weight_ih_l1", Double())
    assert_pair_agrees(ours, theirs, class_name, exact)
    for module in (ours, theirs):
        parametrize.remove_parametrizations(module, "weight_ih_l1", leave_parametrized=False)
    assert type(ours) is getattr(fastrnn, class_name)
    assert_pair_agrees(ours, theirs, class_name)


@everything
def test_functional_call(class_name):
    ours, theirs, input = pair_and_input(class_name)
    before = run(ours, input)
    results = []
    for module in (ours, theirs):
        torch.manual_seed(5)
        weights = {
            name: (value.detach() + 0.1 * torch.randn_like(value)).requires_grad_()
            for name, value in module.named_parameters()
        }
        output = torch.func.functional_call(module, weights, (input,))
        output = output[0] if isinstance(output, tuple) else output
        results.append((output, torch.autograd.grad(output.square().sum(), list(weights.values()))))
    torch.testing.assert_close(results[0], results[1])
    # The module's own weights are back in their place.
    after = run(ours, input)
    for name in before:
        assert torch.equal(before[name], after[name]), name


@everything
def test_frozen_parameters(class_name):
    ours, theirs, _ = pair_and_input(class_name)
    for name in list(dict(ours.named_parameters()))[::2]:
        ours.get_parameter(name).requires_grad_(False)
        theirs.get_parameter(name).requires_grad_(False)
    assert_pair_agrees(ours, theirs, class_name)


@everything
def test_weights_of_any_strides(class_name):
    ours, theirs, _ = pair_and_input(class_name)
    for module in (ours, theirs):
        for name, value in list(module.named_parameters()):
            wide = torch.zeros(*value.shape[:-1], 2 * value.shape[-1])
            wide[..., ::2] = value.detach()
            strided = wide[..., ::2] if value.dim() == 1 else value.detach().t().contiguous().t()
            setattr(module, name, nn.Parameter(strided))
    assert not any(p.is_contiguous() for p in ours.parameters())
    assert_pair_agrees(ours, theirs, class_name)


@everything
def test_shared_memory(class_name):
    ours, theirs, _ = pair_and_input(class_name)
    ours.share_memory()
    assert all(p.is_shared() for p in ours.parameters())
    assert_pair_agrees(ours, theirs, class_name)


@layers
def test_replica_for_data_parallel(class_name):
    ours, theirs, input = pair_and_input(class_name)
    replica = ours._replicate_for_data_parallel()
    for name, value in ours.named_parameters():
        setattr(replica, name, value.detach().clone())
    output, _ = replica(input)
    expected, _ = theirs(input)
    torch.testing.assert_close(output, expected)


@layers
def test_hooks(class_name):
    ours, theirs, input = pair_and_input(class_name)
    seen = []
    for module in (ours, theirs):
        module.register_forward_pre_hook(lambda module, arguments: seen.append(len(arguments)))
        module.register_forward_hook(lambda module, arguments, output: (output[0] * 2, output[1]))
        module.register_full_backward_hook(lambda module, into, out: seen.append(len(out)))
    assert_pair_agrees(ours, theirs, class_name)
    hx = random_state(ours, 3, torch.float32, 0)
    torch.testing.assert_close(ours(input, hx)[0], theirs(input, hx)[0])
    assert seen
