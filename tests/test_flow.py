"""``fastrnn.gradient_flow``: the norms that a chain of torch's cells gives, and what they show."""

import subprocess
import sys

import pytest
import torch
from cases import LAYERS, draw, layers
from helpers import FLOAT64_AGREEMENT, make_pair, random_packed, random_state
from torch import nn

import fastrnn

FEATURES, HIDDEN, BATCH, STEPS = 3, 4, 5, 7


def chain_of_layers(layer, input, loss):
    """The specification: torch's layer called step by step, one layer and one direction at a time."""
    modules, states = [], []
    for number in range(layer.num_layers):
        directions = []
        for suffix in ("", "_reverse")[: 2 if layer.bidirectional else 1]:
            width = input.shape[-1] if not modules else len(modules[-1]) * (layer.proj_size or HIDDEN)
            options = {"proj_size": layer.proj_size} if layer.mode == "LSTM" else {}
            options |= {"nonlinearity": layer.nonlinearity} if layer.mode.startswith("RNN") else {}
            module = type(layer)(width, HIDDEN, dtype=torch.float64, **options)
            own = {name.replace("l0", f"l{number}{suffix}"): parameter for name, parameter in module.named_parameters()}
            for name, parameter in own.items():
                parameter.data.copy_(layer.get_parameter(name))
            directions.append(module)
        modules.append(directions)
    rows = list(input.detach().split(1))
    for directions in modules:
        outputs = []
        for number, module in enumerate(directions):
            h, hidden = None, [None] * len(rows)
            for t in reversed(range(len(rows))) if number else range(len(rows)):
                output, h = module(rows[t], h)
                # the state that goes on and the output are one and the same tensor: h is what both come from
                h = (output, h[1]) if isinstance(h, tuple) else output
                hidden[t] = output
            states.append(hidden)
            outputs.append(hidden)
        rows = [torch.cat(parts, -1) for parts in zip(*outputs, strict=True)]
    gradients = [torch.autograd.grad(loss(rows), hidden, retain_graph=True, allow_unused=True) for hidden in states]
    return torch.stack([torch.stack([torch.tensor(0.0) if g is None else g.norm() for g in row]) for row in gradients])


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "both"])
@layers
def test_is_the_chain(name, bidirectional):
    class_name, variant = LAYERS[name]
    ours, theirs = make_pair(
        class_name, FEATURES, HIDDEN, 2, dtype=torch.float64, bidirectional=bidirectional, **variant
    )
    input = draw(STEPS, BATCH, FEATURES)
    width = ours.proj_size or HIDDEN
    expected = chain_of_layers(theirs, input, lambda rows: rows[-1][..., :width].sum() + rows[0][..., width:].sum())
    flow = fastrnn.gradient_flow(ours, input)
    assert flow.norms.shape == (4 if bidirectional else 2, STEPS)
    torch.testing.assert_close(flow.norms, expected, rtol=0, atol=FLOAT64_AGREEMENT)
    expected = chain_of_layers(theirs, input, lambda rows: torch.cat(rows).sin().sum())
    flow = fastrnn.gradient_flow(ours, input, loss=lambda output, final: output.sin().sum())
    torch.testing.assert_close(flow.norms, expected, rtol=0, atol=FLOAT64_AGREEMENT)
    assert flow.names[-1] == ("layer 1 reverse" if bidirectional else "layer 1")


def test_layouts_states_and_packed_input():
    layer = fastrnn.GRU(FEATURES, HIDDEN, 2, dtype=torch.float64)
    input, hx = draw(STEPS, BATCH, FEATURES), random_state(layer, BATCH, torch.float64, 1)
    norms = fastrnn.gradient_flow(layer, input, hx).norms
    assert not torch.allclose(norms, fastrnn.gradient_flow(layer, input).norms)
    layer.batch_first = True
    assert torch.equal(fastrnn.gradient_flow(layer, input.transpose(0, 1), hx).norms, norms)
    layer.batch_first = False
    alone = [fastrnn.gradient_flow(layer, input[:, number], hx[:, number]).norms for number in range(BATCH)]
    torch.testing.assert_close(torch.stack(alone).norm(dim=0), norms, rtol=0, atol=FLOAT64_AGREEMENT)
    packed = random_packed(BATCH, STEPS, FEATURES, torch.float64, 0)
    assert fastrnn.gradient_flow(layer, packed).norms.shape == (2, STEPS)
    lengths = torch.tensor([4, 2, 0, 5, 1])
    norms = fastrnn.gradient_flow(layer, input, lengths=lengths).norms
    packed = fastrnn.gradient_flow(
        layer, nn.utils.rnn.pack_padded_sequence(input, lengths.clamp(min=1), enforce_sorted=False)
    )
    assert norms[:, 5:].max() == 0 < norms[:, :5].min()
    torch.testing.assert_close(norms[:, 1:5], packed.norms[:, 1:], rtol=0, atol=FLOAT64_AGREEMENT)
    resets = torch.zeros(STEPS, BATCH, dtype=torch.bool)
    resets[3] = True
    norms = fastrnn.gradient_flow(layer, input, resets=resets).norms
    assert norms[:, :3].max() == 0 < norms[:, 3:].min()


@layers
def test_leaves_the_module_and_the_callers_modes_alone(name):
    class_name, variant = LAYERS[name]
    layer = getattr(fastrnn, class_name)(FEATURES, HIDDEN, **variant).requires_grad_(False)
    with torch.inference_mode():
        norms = fastrnn.gradient_flow(layer, torch.randn(STEPS, BATCH, FEATURES)).norms
    with torch.no_grad():
        fastrnn.gradient_flow(layer.bfloat16(), torch.randn(STEPS, BATCH, FEATURES).bfloat16())
    assert norms.min() > 0
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in layer.parameters())


def test_shows_what_vanishes():
    """Bengio et al. 1994: 100 steps back an RNN's gradient is gone; an LSTM that does not forget keeps one."""
    torch.manual_seed(0)
    lstm, rnn = fastrnn.init.forget_bias_(fastrnn.LSTM(FEATURES, 32), 5.0), fastrnn.RNN(FEATURES, 32)
    input = torch.randn(100, BATCH, FEATURES)
    kept, lost = (fastrnn.gradient_flow(layer, input).norms[0] for layer in (lstm, rnn))
    assert lost[0] / lost[-1] < 1e-10
    assert kept[0] / kept[-1] > 1e-3


def test_draws():
    pytest.importorskip("matplotlib")
    flow = fastrnn.gradient_flow(fastrnn.GRU(FEATURES, HIDDEN, 2), torch.randn(STEPS, BATCH, FEATURES))
    axes = flow.draw()
    assert [line.get_label() for line in axes.lines] == ["layer 0", "layer 1"]
    assert [len(line.get_ydata()) for line in axes.lines] == [STEPS, STEPS]
    assert flow.draw(axes) is axes and len(axes.lines) == 4


def test_matplotlib_is_imported_by_drawing_only():
    program = "import sys, torch, fastrnn; fastrnn.gradient_flow(fastrnn.GRU(2, 3), torch.ones(4, 1, 2)); "
    program += "assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_errors():
    input = torch.randn(STEPS, BATCH, FEATURES)
    with pytest.raises(TypeError, match=r"takes fastrnn.RNN, GRU or LSTM, got GRU; fastrnn.convert"):
        fastrnn.gradient_flow(nn.GRU(FEATURES, HIDDEN), input)
    layer = fastrnn.GRU(FEATURES, HIDDEN)
    with pytest.raises(ValueError, match=r"one element computed from the layer's results, got one of \(7, 5, 4\)"):
        fastrnn.gradient_flow(layer, input, loss=lambda output, final: output)
    with pytest.raises(ValueError, match="got float"):
        fastrnn.gradient_flow(layer, input, loss=lambda output, final: 1.0)
    with pytest.raises(RuntimeError, match=r"input\.size"):
        fastrnn.gradient_flow(layer, input[..., :2])
