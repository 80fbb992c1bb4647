"""convert: torch's recurrent layers become fastrnn's inside any model, in place, and back."""

import copy
import pickle
import warnings

import pytest
import torch
from helpers import CELL_CLASSES, LAYER_CLASSES, assert_same_as_torch, run
from torch import nn

import fastrnn

ALL_CLASSES = LAYER_CLASSES + CELL_CLASSES
everything = pytest.mark.parametrize("class_name", ALL_CLASSES)
SHAPES = {name: (3, 4) if name in CELL_CLASSES else (5, 3, 4) for name in ALL_CLASSES}

CONFIGURATIONS = [
    ("RNN", {"num_layers": 2, "nonlinearity": "relu", "bidirectional": True}),
    ("GRU", {"num_layers": 2, "batch_first": True, "dropout": 0.25}),
    ("LSTM", {"num_layers": 2, "bias": False, "bidirectional": True}),
    ("LSTM", {"proj_size": 2}),
    ("RNNCell", {"nonlinearity": "relu"}),
    ("GRUCell", {"bias": False}),
    ("LSTMCell", {}),
]


class Model(nn.Module):
    """Every way in which a module may hold another."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.lstm = nn.LSTM(4, 6, 2, bidirectional=True)
        self.stages = nn.ModuleList([nn.GRU(12, 6), nn.Sequential(nn.Linear(6, 6), nn.Tanh())])
        self.cells = nn.ModuleDict({"rnn": nn.RNNCell(6, 6), "gru": nn.GRUCell(6, 6), "lstm": nn.LSTMCell(6, 6)})
        self.rnn = nn.Sequential(nn.RNN(6, 6, nonlinearity="relu"))
        self.decoder = nn.Linear(6, 11)
        self.absent = None
        self.register_module("empty", None)

    def forward(self, tokens):
        x, _ = self.lstm(self.embedding(tokens))
        x, _ = self.stages[0](x)
        x = self.stages[1](x)
        step = self.cells["gru"](self.cells["rnn"](x[-1]))
        step, _ = self.cells["lstm"](step)
        x, _ = self.rnn(x + step)
        return self.decoder(x)


class Holder(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, input: torch.Tensor):
        return self.layer(input)


TOKENS = torch.arange(21).view(7, 3) % 11


def make_model(seed=0):
    torch.manual_seed(seed)
    return Model()


def parameter_ids(model):
    return [(name, id(parameter)) for name, parameter in model.named_parameters(remove_duplicate=False)]


def recurrent_types(model):
    return {
        name: type(module)
        for name, module in model.named_modules()
        if isinstance(module, (nn.RNNBase, nn.modules.rnn.RNNCellBase))
    }


def convert_quietly(model, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return fastrnn.convert(model, **kwargs)


def test_everything_inside_a_model_is_replaced_in_place():
    model, twin = make_model(), make_model()
    before = parameter_ids(model)
    assert convert_quietly(model) is model
    assert recurrent_types(model) == {
        "lstm": fastrnn.LSTM,
        "stages.0": fastrnn.GRU,
        "cells.rnn": fastrnn.RNNCell,
        "cells.gru": fastrnn.GRUCell,
        "cells.lstm": fastrnn.LSTMCell,
        "rnn.0": fastrnn.RNN,
    }
    assert parameter_ids(model) == before
    assert list(model.state_dict()) == list(twin.state_dict())
    assert repr(model) == repr(twin)
    assert model.absent is None
    assert model.empty is None
    torch.testing.assert_close(model(TOKENS), twin(TOKENS))


def test_the_weights_in_use_are_the_shared_ones():
    model = convert_quietly(make_model())
    before = model(TOKENS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    after = model(TOKENS)
    twin = make_model()
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(after, twin(TOKENS))
    assert not torch.allclose(before, after)


@pytest.mark.parametrize("to", ["fastrnn", "torch"])
@pytest.mark.parametrize(("class_name", "arguments"), CONFIGURATIONS, ids=str)
def test_a_single_module_is_returned_anew(class_name, arguments, to):
    source, target = (nn, fastrnn) if to == "fastrnn" else (fastrnn, nn)
    torch.manual_seed(0)
    module = getattr(source, class_name)(4, 6, **arguments)
    converted = convert_quietly(module, to=to)
    assert type(converted) is getattr(target, class_name)
    assert repr(converted) == repr(module)
    assert parameter_ids(converted) == parameter_ids(module)
    for name in module.__constants__:
        assert getattr(converted, name) == getattr(module, name)
    ours, theirs = (converted, module) if to == "fastrnn" else (module, converted)

    def make(seed):
        generator = torch.Generator().manual_seed(seed)
        return ours, copy.deepcopy(theirs), torch.randn(SHAPES[class_name], generator=generator), None

    assert_same_as_torch(make)
    for twin in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert type(twin) is type(converted)
        input = torch.randn(SHAPES[class_name])
        torch.testing.assert_close(run(twin, input), run(converted, input), rtol=0, atol=0)


@everything
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtype_and_device_are_kept(class_name, dtype):
    for device in ("cpu", "meta"):
        module = getattr(nn, class_name)(4, 6, dtype=dtype, device=device)
        converted = convert_quietly(module)
        assert {(p.dtype, p.device.type) for p in converted.parameters()} == {(dtype, device)}
        back = convert_quietly(converted, to="torch")
        assert {(p.dtype, p.device.type) for p in back.parameters()} == {(dtype, device)}


def test_there_and_back_again():
    model, twin = make_model(), make_model()
    before, types = parameter_ids(model), recurrent_types(model)
    assert convert_quietly(convert_quietly(model), to="torch") is model
    assert recurrent_types(model) == types
    assert parameter_ids(model) == before
    assert torch.equal(model(TOKENS), twin(TOKENS))
    assert repr(model) == repr(twin)


def test_converting_twice_changes_nothing_more():
    model = convert_quietly(make_model())
    modules = dict(model.named_modules())
    convert_quietly(model)
    assert all(modules[name] is module for name, module in model.named_modules())
    model = make_model()
    modules = dict(model.named_modules())
    convert_quietly(model, to="torch")
    assert all(modules[name] is module for name, module in model.named_modules())


def test_an_optimizer_made_before_goes_on():
    histories = []
    for convert in (True, False):
        model = make_model().double()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        losses = []
        for step in range(6):
            if convert and step == 2:
                convert_quietly(model)
            if convert and step == 4:
                convert_quietly(model, to="torch")
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.flatten())
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        histories.append(losses)
    assert histories[0] == pytest.approx(histories[1], rel=1e-9)
    assert histories[0][-1] < histories[0][0]


def test_ties_hold():
    model = nn.ModuleDict({"a": nn.GRU(4, 6), "b": nn.GRU(4, 6), "cell": nn.GRUCell(4, 6)})
    model["b"].weight_hh_l0 = model["a"].weight_hh_l0
    model["cell"].weight_hh = model["a"].weight_hh_l0
    convert_quietly(model)
    assert model["b"].weight_hh_l0 is model["a"].weight_hh_l0 is model["cell"].weight_hh
    input = torch.randn(5, 3, 4)
    sum(layer(input)[0].sum() for layer in (model["a"], model["b"])).backward()
    alone = copy.deepcopy(model["a"])
    alone.zero_grad()
    alone(input)[0].sum().backward()
    assert not torch.allclose(alone.weight_hh_l0.grad, model["a"].weight_hh_l0.grad)
    convert_quietly(model, to="torch")
    assert model["b"].weight_hh_l0 is model["a"].weight_hh_l0 is model["cell"].weight_hh


@pytest.mark.parametrize("to", ["fastrnn", "torch"])
def test_a_module_used_twice_stays_one_module(to):
    source, target = (nn, fastrnn) if to == "fastrnn" else (fastrnn, nn)
    shared = source.LSTM(4, 4)
    model = nn.Module()
    model.first = shared
    model.inner = nn.Sequential(nn.Identity(), nn.ModuleList([shared]))
    model.second = shared
    convert_quietly(model, to=to)
    assert type(model.first) is target.LSTM
    assert model.first is model.second is model.inner[1][0]
    assert len(list(model.parameters())) == 4


def test_a_model_that_holds_itself_in_a_cycle_ends():
    model = nn.Module()
    model.child = nn.Module()
    model.child.parent = model
    model.child.gru = nn.GRU(4, 6)
    convert_quietly(model)
    assert type(model.child.gru) is fastrnn.GRU
    assert model.child.parent is model


@everything
def test_hooks_and_flags_are_kept(class_name):
    calls = []
    module = getattr(nn, class_name)(4, 6)
    module.register_forward_pre_hook(lambda *_: calls.append("pre"))
    module.register_forward_hook(lambda *_: calls.append("post"))
    module.register_full_backward_hook(lambda *_: calls.append("backward"))
    module.register_load_state_dict_post_hook(lambda *_: calls.append("load"))
    module.eval()
    module.note = {"kept": True}
    names = [name for name, _ in module.named_parameters()]
    module.get_parameter(names[1]).requires_grad_(False)
    module.get_parameter(names[0]).grad = torch.ones_like(module.get_parameter(names[0]))
    module.register_buffer("statistics", torch.arange(3.0))
    converted = convert_quietly(nn.Sequential(module))[0]
    assert type(converted) is getattr(fastrnn, class_name)
    assert not converted.training
    assert converted.note == {"kept": True}
    assert not converted.get_parameter(names[1]).requires_grad
    assert converted.get_parameter(names[0]).grad is not None
    assert converted.statistics.tolist() == [0, 1, 2]
    result = converted(torch.randn(SHAPES[class_name], requires_grad=True))
    (result[0] if isinstance(result, tuple) else result).sum().backward()
    converted.load_state_dict(converted.state_dict())
    assert calls == ["pre", "post", "backward", "load"]


def test_subclasses_are_left_alone_with_a_warning():
    class MyLSTM(nn.LSTM):
        def forward(self, input, hx=None):
            return super().forward(2 * input, hx)

    class MyCell(nn.GRUCell):
        def __init__(self):
            super().__init__(4, 6)
            self.inner = nn.GRU(4, 6)

    model = nn.ModuleDict({"mine": MyLSTM(4, 6), "cell": MyCell(), "plain": nn.LSTM(4, 6)})
    mine, cell = model["mine"], model["cell"]
    with pytest.warns(UserWarning) as records:
        fastrnn.convert(model)
    text = "\n".join(str(record.message) for record in records)
    assert "MyLSTM" in text
    assert "MyCell" in text
    assert model["mine"] is mine
    assert model["cell"] is cell
    assert type(model["plain"]) is fastrnn.LSTM
    assert type(model["cell"].inner) is fastrnn.GRU
    with pytest.warns(UserWarning, match="MyLSTM"):
        assert fastrnn.convert(mine) is mine


def test_subclasses_of_ours_are_left_alone_with_a_warning():
    class MyGRU(fastrnn.GRU):
        pass

    model = nn.Sequential(MyGRU(4, 6))
    mine = model[0]
    with pytest.warns(UserWarning, match="MyGRU"):
        fastrnn.convert(model, to="torch")
    assert model[0] is mine


def test_an_unknown_target():
    model = make_model()
    types = recurrent_types(model)
    with pytest.raises(ValueError, match="tensorflow"):
        fastrnn.convert(model, to="tensorflow")
    assert recurrent_types(model) == types


def test_a_model_without_recurrent_layers():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
    assert convert_quietly(model) is model
    linear = nn.Linear(4, 6)
    assert convert_quietly(linear) is linear


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_weight_norm_by_hooks_is_kept():
    module = nn.utils.weight_norm(nn.GRU(4, 6), "weight_hh_l0")
    input = torch.randn(5, 3, 4)
    expected = module(input)[0]
    converted = convert_quietly(nn.Sequential(module))[0]
    assert [name for name, _ in converted.named_parameters()] == [name for name, _ in module.named_parameters()]
    with torch.no_grad():
        converted.weight_hh_l0_g.mul_(2)
    changed = converted(input)[0]
    assert not torch.allclose(changed, expected)
    torch.testing.assert_close(changed, module(input)[0])
    changed.sum().backward()
    assert converted.weight_hh_l0_g.grad is not None


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_parametrized_module_gives_the_same_numbers():
    """Its class is a subclass that torch makes: replaced or left alone, it must stay parametrized."""
    module = nn.utils.parametrizations.weight_norm(nn.GRU(4, 6), "weight_hh_l0")
    input = torch.randn(5, 3, 4)
    expected = module(input)[0]
    model = fastrnn.convert(nn.Sequential(module))
    torch.testing.assert_close(model(input)[0], expected)
    assert len(list(model.parameters())) == 5
    model(input)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*torch.jit.*:FutureWarning")
@pytest.mark.parametrize(("class_name", "arguments"), CONFIGURATIONS, ids=str)
def test_torch_jit_script_after_converting_back(class_name, arguments):
    torch.manual_seed(0)
    module = getattr(fastrnn, class_name)(4, 6, **arguments)
    input = torch.randn(SHAPES[class_name])
    expected = module.eval()(input)
    # TorchScript calls no module by itself whose forward has overloads.
    model = convert_quietly(Holder(module), to="torch")
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(input), model(input))
    torch.testing.assert_close(scripted(input), expected)


@pytest.mark.parametrize(("class_name", "arguments"), CONFIGURATIONS, ids=str)
def test_what_comes_back_is_whole(class_name, arguments):
    """A real torch module with all that its own constructor sets."""
    torch.manual_seed(0)
    expected = getattr(nn, class_name)(4, 6, **arguments)
    torch.manual_seed(0)
    back = convert_quietly(getattr(fastrnn, class_name)(4, 6, **arguments), to="torch")
    assert type(back) is type(expected)
    assert set(expected.__dict__) <= set(back.__dict__)
    input = torch.randn(SHAPES[class_name]).double()
    back, expected = back.double().eval(), expected.double().eval()
    for name, value in run(expected, input).items():
        assert torch.equal(value, run(back, input)[name]), name
    torch.manual_seed(1)
    back.reset_parameters()
    torch.manual_seed(1)
    expected.reset_parameters()
    for mine, torchs in zip(back.parameters(), expected.parameters(), strict=True):
        assert torch.equal(mine, torchs)
    assert type(copy.deepcopy(back)) is type(expected)
