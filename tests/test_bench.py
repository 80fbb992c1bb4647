"""The benchmark's other sides: FlashRNN's layer gives torch.nn's numbers, with a stand-in for the package."""

import dataclasses
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import FLOAT64_AGREEMENT

from bench import __main__ as bench
from bench import features
from bench.flashrnn import FlashRNN, objection
from bench.results import read
from bench.workloads import Workload

LAYERS = {"LSTM": torch.nn.LSTM, "GRU": torch.nn.GRU, "RNN": torch.nn.RNN}


def flashrnn(Wx, R, b, states=None, function="lstm", config=None, backend="cuda_fused", dtype="bfloat16"):
    """What the package computes, as its documentation has it: Wx (B, T, G, N, D), R (G, N, D, D), b (G, N, D).

    Returns the states (S, B, T, N, D), the hidden state first, and the last of them (S, B, 1, N, D).
    """
    batch, steps, _, heads, size = Wx.shape
    hidden = cell = Wx.new_zeros(batch, heads, size)
    outputs = []
    for step in range(steps):
        x, recurrent = Wx[:, step].unbind(1), torch.einsum("gndp,bnp->gbnd", R, hidden).unbind(0)
        if function == "gru":
            r, z = (x[gate] + recurrent[gate + 1] + b[gate + 1] for gate in (0, 1))
            n = torch.tanh(x[2] + b[3] + r.sigmoid() * (recurrent[0] + b[0]))
            hidden = z.sigmoid() * hidden + (1 - z.sigmoid()) * n
            outputs.append(torch.stack([hidden]))
            continue
        gates = [x + y + bias for x, y, bias in zip(x, recurrent, b, strict=True)]
        if function == "elman":
            hidden = torch.tanh(gates[0])
            outputs.append(torch.stack([hidden]))
            continue
        i, f, g, o = gates
        cell = f.sigmoid() * cell + i.sigmoid() * torch.tanh(g)
        hidden = o.sigmoid() * torch.tanh(cell)
        outputs.append(torch.stack([hidden, cell]))
    states = torch.stack(outputs, 2)
    return states, states[:, :, -1:]


@pytest.fixture
def package(monkeypatch):
    stand_in = SimpleNamespace(flashrnn=flashrnn, __spec__=SimpleNamespace(name="flashrnn"))
    monkeypatch.setitem(sys.modules, "flashrnn", stand_in)


@pytest.mark.parametrize("cell", LAYERS)
def test_flashrnn_gives_the_numbers_of_torch(cell, package):
    layers = LAYERS[cell](3, 5, num_layers=2, dtype=torch.float64)
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    results = []
    for module in (layers, FlashRNN(layers)):
        output, states = module(x)
        states = states if cell == "LSTM" else (states,)
        gradients = torch.autograd.grad(output.sin().sum(), [x, *module.parameters()])
        results.append([output, *states, *gradients])
    for theirs, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(theirs, expected, rtol=0, atol=FLOAT64_AGREEMENT)


def test_what_flashrnn_cannot_run(package, monkeypatch):
    workload = Workload("name", "source", "LSTM", 3, 4, 2, 5, "train")
    assert objection(workload) is None
    assert "one direction" in objection(Workload("name", "source", "LSTM", 3, 4, 2, 5, "train", bidirectional=True))
    assert "whole sequences" in objection(Workload("name", "source", "LSTM", 3, 4, 2, 1, "step"))
    monkeypatch.setitem(sys.modules, "flashrnn", None)
    assert "not installed" in objection(workload)


def test_rows_of_flashrnn_and_the_end_of_time(package, tmp_path, capsys):
    csv = tmp_path / "results.csv"
    arguments = ["--device", "cpu", "--workload", "darts-rnn", "--seconds", "0.01", "--output", str(csv)]
    assert bench.main([*arguments, "--plot", str(tmp_path / "plot.png"), "--backend", "torch", "flashrnn"]) == 0
    assert [row["backend"] for row in read(csv)] == ["torch", "flashrnn"]
    assert bench.main([*arguments, "--stop-after", "0"]) == 0
    assert len(read(csv)) == 2 and "no time left for: darts-rnn" in capsys.readouterr().out


def test_without_a_progress_bar(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    output = ["--output", str(tmp_path / "results.csv"), "--plot", str(tmp_path / "plot.png")]
    assert bench.main(["--device", "cpu", "--workload", "darts-rnn", "--seconds", "0.01", *output]) == 0
    assert "darts-rnn" in capsys.readouterr().err


FEATURES = {
    "resets": lambda: features.with_resets((2, 5, 4), torch.float64),
    "lengths": lambda: features.with_padding("GRU", (5, 4, 9), torch.float64),
    "layer_norm": lambda: features.with_layer_norm((2, 5, 4), torch.float64),
}


@pytest.mark.parametrize("name", FEATURES)
def test_what_is_timed_beside_a_feature_does_the_same(name):
    features.check(FEATURES[name]())


def test_a_feature_of_other_numbers_is_noticed():
    feature = FEATURES["lengths"]()
    wrong = dataclasses.replace(feature, ours=feature.others["fastrnn.GRU, padding as steps"])
    with pytest.raises(AssertionError, match="lengths-gru-b5-h4 differs from"):
        features.check(wrong)


def test_rows_of_a_feature():
    rows = list(features.rows(FEATURES["lengths"](), 1, 0.0))
    assert [row.torch_module for row in rows] == [
        "nn.GRU, packed",
        "fastrnn.GRU, packed",
        "fastrnn.GRU, padding as steps",
    ]
    assert all(row.ratio == pytest.approx(row.torch_median_ms / row.median_ms) for row in rows)
    assert [row.note.count("without the feature") for row in rows] == [0, 0, 1]
