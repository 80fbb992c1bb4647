"""Initial values of recurrent weights, gate by gate: a block of a stacked weight is a matrix of its own.

``torch.nn.init`` sees ``weight_hh_l0`` of an LSTM as one (4H, H) matrix: an orthogonal one has no orthogonal gates, and
Xavier's bound counts the four gates as one layer's outputs. Every function here takes a layer, a cell or a model, of
fastrnn or of torch.nn, changes all recurrent layers and cells in it in place, and returns it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.rnn import RNNCellBase

from .modules import GRUCell, LSTMCell, RNNCell

Module = TypeVar("Module", bound=nn.Module)

_RECURRENT = (nn.RNNBase, nn.RNNCell, nn.GRUCell, nn.LSTMCell, RNNCell, GRUCell, LSTMCell)

# The activation functions of the gates, in torch's order: i, f, g, o of the LSTM and r, z, n of the GRU.
_ACTIVATIONS = {
    "LSTM": ("sigmoid", "sigmoid", "tanh", "sigmoid"),
    "GRU": ("sigmoid", "sigmoid", "tanh"),
    "RNN_TANH": ("tanh",),
    "RNN_RELU": ("relu",),
}
# The gate that says how much of the old state stays: f of the LSTM, z of the GRU (h' = (1 - z) ⊙ n + z ⊙ h).
_KEEPING_GATE = {"LSTM": 1, "GRU": 1}


def _mode(module: nn.RNNBase | RNNCellBase) -> str:
    if isinstance(module, nn.RNNBase):
        return module.mode
    if isinstance(module, RNNCell | nn.RNNCell):
        return f"RNN_{module.nonlinearity.upper()}"
    return "LSTM" if isinstance(module, LSTMCell | nn.LSTMCell) else "GRU"


def _recurrent(module: nn.Module) -> list[nn.RNNBase | RNNCellBase]:
    found = [part for part in module.modules() if isinstance(part, _RECURRENT)]
    if not found:
        expected = "a recurrent layer or cell of fastrnn or torch.nn, or a model with one"
        raise TypeError(f"expected {expected}, got {type(module).__name__}")
    return found


def _parameters(module: nn.RNNBase | RNNCellBase, role: str) -> Iterator[Tensor]:
    """The parameters of every layer and direction that are called ``role``, "weight_hh" for example."""
    names = [role]
    if isinstance(module, nn.RNNBase):
        suffixes = ("", "_reverse")[: 2 if module.bidirectional else 1]
        names = [f"{role}_l{layer}{suffix}" for layer in range(module.num_layers) for suffix in suffixes]
    for name in names:
        parameter = module._parameters.get(name)
        if parameter is None and getattr(module, name, None) is not None:
            raise ValueError(
                f"{name} of {type(module).__name__} is no parameter but computed from others (a parametrization, or "
                "weight norm): initialise the module before that is registered"
            )
        if parameter is not None:
            yield parameter


def _fill_blocks(parameter: Tensor, fills) -> None:
    """Call each of ``fills`` on its block of rows; halves are drawn in float32, where torch has the decompositions."""
    half = parameter.dtype in (torch.float16, torch.bfloat16)
    with torch.no_grad():
        values = torch.empty_like(parameter, dtype=torch.float32) if half else parameter
        for block, fill in zip(values.chunk(len(fills)), fills, strict=True):
            fill(block)
        if half:
            parameter.copy_(values)


def orthogonal_(module: Module, gain: float = 1.0, generator: torch.Generator | None = None) -> Module:
    """Make every gate's block of W_hh orthogonal (Saxe et al. 2014), and W_hr of a projection, times ``gain``.

    A block that is not square, (H, H') of a layer with a projection, has orthonormal columns. W_ih and the biases stay
    as they are.

    Raises:
        TypeError: there is no recurrent layer or cell in ``module``.
        ValueError: a weight is no parameter, but computed by a parametrization.
    """

    def fill(block: Tensor) -> None:
        nn.init.orthogonal_(block, gain, generator)

    for part in _recurrent(module):
        for weight_hh in _parameters(part, "weight_hh"):
            _fill_blocks(weight_hh, [fill] * len(_ACTIVATIONS[_mode(part)]))
        for weight_hr in _parameters(part, "weight_hr"):
            _fill_blocks(weight_hr, [fill])
    return module


def xavier_(module: Module, gain: float | None = None, generator: torch.Generator | None = None) -> Module:
    """Draw every gate's block of W_ih, (H, I), from U(-a, a), a = gain · √(6 / (I + H)) (Glorot and Bengio 2010).

    Args:
        gain: of all gates; None takes ``torch.nn.init.calculate_gain`` of each gate's activation: 1 for sigmoid gates,
            5/3 for tanh (the LSTM's g, the GRU's n, the RNN), √2 for relu.

    W_hh and the biases stay as they are. Raises as ``orthogonal_`` does.
    """

    def fill_with(gain: float):
        return lambda block: nn.init.xavier_uniform_(block, gain, generator)

    for part in _recurrent(module):
        activations = _ACTIVATIONS[_mode(part)]
        gains = [nn.init.calculate_gain(activation) if gain is None else gain for activation in activations]
        for weight_ih in _parameters(part, "weight_ih"):
            _fill_blocks(weight_ih, [fill_with(own) for own in gains])
    return module


def forget_bias_(module: Module, value: float = 1.0) -> Module:
    """Let a new LSTM remember: its forget gate's bias becomes ``value`` (Gers et al. 2000, Jozefowicz et al. 2015).

    torch keeps two biases that are added: ``bias_ih`` takes the value and ``bias_hh`` zero, in the forget gate's block
    only. In a GRU the same is done to the update gate z, which keeps the old state in proportion to itself.

    Raises:
        TypeError: there is no recurrent layer or cell in ``module``, or one is an RNN, which has no such gate.
        ValueError: a layer has no biases, or they are computed by a parametrization.
    """
    parts = _recurrent(module)
    for part in parts:
        if _mode(part) not in _KEEPING_GATE:
            raise TypeError(f"{type(part).__name__} has no gate that forgets: forget_bias_ is for LSTM and GRU")
        if not part.bias:
            raise ValueError(f"this {type(part).__name__} has no biases (bias=False) that could be set to {value}")
    for part in parts:
        mode = _mode(part)
        with torch.no_grad():
            for role, number in (("bias_ih", value), ("bias_hh", 0.0)):
                for bias in _parameters(part, role):
                    bias.chunk(len(_ACTIVATIONS[mode]))[_KEEPING_GATE[mode]].fill_(number)
    return module
