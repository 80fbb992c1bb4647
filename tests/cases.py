"""Every kind of layer and cell by name, for the tests of what autograd, compilers and transforms do with them."""

import pytest
import torch
from helpers import assert_within_rule, make_pair, random_state, tensors_in
from torch.utils._pytree import tree_leaves

# Name in a test's id -> class name, extra constructor arguments.
LAYERS = {
    "rnn_tanh": ("RNN", {"nonlinearity": "tanh"}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "gru": ("GRU", {}),
    "lstm": ("LSTM", {}),
    "lstm_proj": ("LSTM", {"proj_size": 2}),
}
STEP_CELLS = {
    "RNNCell_tanh": ("RNNCell", {"nonlinearity": "tanh"}),
    "RNNCell_relu": ("RNNCell", {"nonlinearity": "relu"}),
    "GRUCell": ("GRUCell", {}),
    "LSTMCell": ("LSTMCell", {}),
}

# All different: torch.compile takes equal sizes for one and the same symbol.
FEATURES, HIDDEN, BATCH, STEPS = 3, 4, 2, 5

layers = pytest.mark.parametrize("name", LAYERS)
cells = pytest.mark.parametrize("name", STEP_CELLS)
all_modules = pytest.mark.parametrize("name", LAYERS | STEP_CELLS)


def draw(*shape, seed=0, dtype=torch.float64):
    """Random numbers, the same ones in every dtype."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make(name, seed=0, dtype=torch.float64, **arguments):
    """Our module of that name and torch.nn's, with the same weights."""
    class_name, variant = (LAYERS | STEP_CELLS)[name]
    return make_pair(class_name, FEATURES, HIDDEN, seed=seed, dtype=dtype, **variant, **arguments)


def draw_inputs(module, steps=STEPS, batch=BATCH, seed=0, dtype=torch.float64):
    """An input for ``module``, laid out as it expects, and a state."""
    if isinstance(module, torch.nn.RNNBase):
        input = draw(steps, batch, FEATURES, seed=seed, dtype=dtype)
        hx = random_state(module, batch, dtype, seed + 1)
        return input.transpose(0, 1).contiguous() if module.batch_first else input, hx
    h, c = draw(2, batch, HIDDEN, seed=seed + 1, dtype=dtype)
    return draw(batch, FEATURES, seed=seed, dtype=dtype), (h, c) if "LSTM" in type(module).__name__ else h


def assert_all_agree(ours, theirs):
    """Float64 tensors in two trees (tuples, lists, dicts, packed sequences) agree, one by one."""
    ours, theirs = (
        [part for leaf in tree_leaves(tree, is_leaf=_is_result) for part in tensors_in(leaf)] for tree in (ours, theirs)
    )
    assert len(ours) == len(theirs) > 0
    for index, (mine, torchs) in enumerate(zip(ours, theirs, strict=True)):
        assert_within_rule(mine, torchs, torchs, f"tensor {index}")


def _is_result(value):
    return isinstance(value, torch.nn.utils.rnn.PackedSequence)
