"""``fastrnn.init``: every gate's block by itself, nothing else touched, torch.nn's modules and cells too."""

import math

import pytest
import torch
from torch import nn

import fastrnn

FEATURES, HIDDEN = 5, 7
GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
KINDS = [*GATES, *(f"{name}Cell" for name in GATES)]
kinds = pytest.mark.parametrize("kind", KINDS)
libraries = pytest.mark.parametrize("library", [fastrnn, nn], ids=["fastrnn", "torch"])


def make(library, kind, **options):
    if not kind.endswith("Cell"):
        options = {"num_layers": 2, "bidirectional": True, **options}
    return getattr(library, kind)(FEATURES, HIDDEN, **options)


def blocks_of(module, kind, role):
    """Every gate's block of all parameters of a role: (name, gate, block)."""
    return [
        (name, gate, block)
        for name, parameter in module.named_parameters()
        if name.startswith(role)
        for gate, block in enumerate(parameter.detach().chunk(GATES[kind.removesuffix("Cell")]))
    ]


def changed(module, before):
    return {name for name, parameter in module.named_parameters() if not torch.equal(parameter, before[name])}


def copied(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


@libraries
@kinds
def test_orthogonal(kind, library):
    module = make(library, kind, dtype=torch.float64)
    before = copied(module)
    assert fastrnn.init.orthogonal_(module, gain=1.5) is module
    assert changed(module, before) == {name for name in before if name.startswith("weight_hh")}
    blocks = blocks_of(module, kind, "weight_hh")
    for _, _, block in blocks:
        torch.testing.assert_close(block @ block.T, 1.5**2 * torch.eye(HIDDEN).double(), rtol=0, atol=1e-12)
    assert len({block.flatten()[0].item() for _, _, block in blocks}) == len(blocks)  # each one drawn anew


def test_orthogonal_projection():
    layer = fastrnn.LSTM(FEATURES, HIDDEN, proj_size=3, dtype=torch.float64)
    fastrnn.init.orthogonal_(layer)
    for block in layer.weight_hh_l0.detach().chunk(4):
        torch.testing.assert_close(block.T @ block, torch.eye(3).double(), rtol=0, atol=1e-12)
    weight_hr = layer.weight_hr_l0.detach()
    torch.testing.assert_close(weight_hr @ weight_hr.T, torch.eye(3).double(), rtol=0, atol=1e-12)


@libraries
@kinds
def test_xavier(kind, library):
    module = make(library, kind)
    before = copied(module)
    fastrnn.init.xavier_(module)
    assert changed(module, before) == {name for name in before if name.startswith("weight_ih")}
    tanh_gate = {"RNN": 0, "GRU": 2, "LSTM": 2}[kind.removesuffix("Cell")]
    for _, gate, block in blocks_of(module, kind, "weight_ih"):
        bound = (5 / 3 if gate == tanh_gate else 1) * math.sqrt(6 / sum(block.shape))
        assert 0.7 * bound < block.abs().max() <= bound
    fastrnn.init.xavier_(module, gain=0.1)
    for _, _, block in blocks_of(module, kind, "weight_ih"):
        assert block.abs().max() <= 0.1 * math.sqrt(6 / sum(block.shape))


def test_xavier_of_relu():
    layer = fastrnn.RNN(50, 50, nonlinearity="relu")
    fastrnn.init.xavier_(layer)
    assert 0.95 * math.sqrt(2 * 6 / 100) < layer.weight_ih_l0.abs().max() <= math.sqrt(2 * 6 / 100)


@libraries
@pytest.mark.parametrize("kind", ["GRU", "LSTM", "GRUCell", "LSTMCell"])
def test_forget_bias(kind, library):
    module = make(library, kind)
    before = copied(module)
    fastrnn.init.forget_bias_(module, 2.0)
    for role, value in (("bias_ih", 2.0), ("bias_hh", 0.0)):
        for name, gate, block in blocks_of(module, kind, role):
            if gate == 1:
                assert (block == value).all()
            else:
                assert torch.equal(block, before[name].chunk(GATES[kind.removesuffix("Cell")])[gate])
    assert all(name.startswith("bias") for name in changed(module, before))


def test_what_forget_bias_is_for():
    """The effect, not the numbers: with a large bias the cell state stays what it was."""
    for kind in ("LSTM", "GRU"):
        layer = make(fastrnn, kind, num_layers=1, bidirectional=False)
        fastrnn.init.forget_bias_(layer, 50.0)
        state = torch.randn(1, 3, HIDDEN)
        hx = (torch.zeros_like(state), state) if kind == "LSTM" else state
        with torch.no_grad():
            for name in ("weight_ih_l0", "weight_hh_l0"):  # the LSTM's new content would be added
                getattr(layer, name).zero_()
            layer.bias_ih_l0.chunk(GATES[kind])[2].zero_()
            layer.bias_hh_l0.chunk(GATES[kind])[2].zero_()
            final = layer(torch.randn(20, 3, FEATURES), hx)[1]
        torch.testing.assert_close(final[1] if kind == "LSTM" else final, state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_generators(dtype):
    draws = []
    for _ in range(2):
        layer = fastrnn.GRU(FEATURES, HIDDEN, dtype=dtype)
        generator = torch.Generator().manual_seed(3)
        fastrnn.init.xavier_(fastrnn.init.orthogonal_(layer, generator=generator), generator=generator)
        draws.append([layer.weight_ih_l0.detach(), layer.weight_hh_l0.detach()])
    assert all(torch.equal(*pair) for pair in zip(*draws, strict=True))
    block = draws[0][1].float()[:HIDDEN]
    assert (block @ block.T - torch.eye(HIDDEN)).abs().max() < 4 * torch.finfo(dtype).eps


def test_models():
    model = nn.Sequential(nn.Linear(3, FEATURES), fastrnn.LSTM(FEATURES, HIDDEN), nn.ModuleList([nn.GRUCell(3, 4)]))
    linear = model[0].weight.detach().clone()
    fastrnn.init.forget_bias_(fastrnn.init.xavier_(fastrnn.init.orthogonal_(model)))
    assert torch.equal(model[0].weight, linear)
    for weight, gates in ((model[1].weight_hh_l0, 4), (model[2][0].weight_hh, 3)):
        for block in weight.detach().chunk(gates):
            torch.testing.assert_close(block @ block.T, torch.eye(len(block)))
    assert (model[1].bias_ih_l0[HIDDEN : 2 * HIDDEN] == 1).all()


def test_errors():
    for function in (fastrnn.init.orthogonal_, fastrnn.init.xavier_, fastrnn.init.forget_bias_):
        with pytest.raises(TypeError, match=r"expected a recurrent layer or cell .* got Linear"):
            function(nn.Linear(3, 4))
    with pytest.raises(TypeError, match="RNN has no gate that forgets"):
        fastrnn.init.forget_bias_(fastrnn.RNN(3, 4))
    with pytest.raises(ValueError, match="has no biases"):
        fastrnn.init.forget_bias_(fastrnn.LSTM(3, 4, bias=False))
    layer = fastrnn.LSTM(3, 4)
    nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0")
    with pytest.raises(ValueError, match=r"weight_hh_l0 of .* is no parameter but computed"):
        fastrnn.init.orthogonal_(layer)
