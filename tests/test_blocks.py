"""A step in blocks of rows, units and depth, as large layers take it: the same bits as in one piece."""

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from fastrnn.kernels import numba_layer

STEPS, BATCH, FEATURES = 5, 40, 9
IN_BLOCKS = {"BLOCK_BYTES": 1, "BLOCK_ROWS": 12, "AHEAD_BYTES": 0}
LAYERS = {
    "rnn": ("RNN", {}),
    "gru": ("GRU", {}),
    "lstm": ("LSTM", {}),
    "lstm, projected": ("LSTM", {"proj_size": 30}),
    "gru, two directions": ("GRU", {"bidirectional": True}),
}


def results(layer, input, resets):
    """The output, the final state and all gradients; and the output in inference, which takes other blocks."""
    layer.zero_grad()
    output, state = layer(input, **resets)
    output = output.data if isinstance(output, torch.nn.utils.rnn.PackedSequence) else output
    output.sin().sum().backward()
    with torch.no_grad():
        inferred = layer(input, **resets)[0]
    inferred = inferred.data if isinstance(inferred, torch.nn.utils.rnn.PackedSequence) else inferred
    states = state if isinstance(state, tuple) else (state,)
    return [output, *states, inferred, *(parameter.grad for parameter in layer.parameters())]


@pytest.fixture
def plans():
    """Plans are made anew before and after the test."""
    numba_layer.make_plan.cache_clear()
    yield
    numba_layer.make_plan.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", ["dense", "packed", "resets"])
@pytest.mark.parametrize("name", LAYERS)
def test_blocks_change_no_bit(name, shape, dtype, plans, monkeypatch):
    class_name, options = LAYERS[name]
    generator = torch.Generator().manual_seed(0)
    # several blocks of units, the last one not full, and for the backward product several of depth
    layer = getattr(fastrnn, class_name)(FEATURES, 150, dtype=dtype, **options)
    input, resets = torch.randn(STEPS, BATCH, FEATURES, generator=generator).to(dtype), {}
    if shape == "packed":
        lengths = torch.randint(1, STEPS + 1, (BATCH,), generator=generator)
        input = pack_padded_sequence(input, lengths, enforce_sorted=False)
    elif shape == "resets":
        resets = {"resets": torch.rand(STEPS, BATCH, generator=generator) < 0.3}
    with fastrnn.use_backend("numba"):
        whole = [result.clone() for result in results(layer, input, resets)]
        numba_layer.make_plan.cache_clear()
        for constant, value in IN_BLOCKS.items():
            monkeypatch.setattr(numba_layer, constant, value)
        in_blocks = results(layer, input, resets)
    assert all(torch.equal(mine, other) for mine, other in zip(in_blocks, whole, strict=True))
