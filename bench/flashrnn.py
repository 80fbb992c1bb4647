"""FlashRNN (NX-AI/flashrnn, arXiv 2412.07752) as another side of the benchmark, where it is installed.

It runs the recurrence alone: the input projection is torch's, and its time counts.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .workloads import Workload

NAME = "flashrnn"
PARAMETERS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
FUNCTIONS = {"LSTM": "lstm", "GRU": "gru", "RNN_TANH": "elman"}
# Its Triton kernels stop here, and run the LSTM only.
MOST_OF_TRITON = 64


def objection(workload: Workload) -> str | None:
    """Why FlashRNN cannot run a workload, or None."""
    if importlib.util.find_spec(NAME) is None:
        return "flashrnn is not installed (pip install flashrnn)"
    if workload.mode == "step":
        return "it runs whole sequences"
    if workload.bidirectional or workload.variable:
        return "it has one direction, and sequences of one length"
    return None


def fastest(cell: str, hidden: int) -> str:
    """Its fastest backend for a size; the CUDA ones are compiled at the first call, which takes minutes."""
    if cell == "LSTM" and hidden <= MOST_OF_TRITON and hidden & (hidden - 1) == 0:
        return "triton_fused"
    return "cuda" if cell == "GRU" else "cuda_fused"


class FlashRNN(nn.Module):
    """The layers of a torch.nn.RNN, GRU or LSTM, with its parameters; x (T, B, I), no dropout between layers."""

    def __init__(self, layers: nn.RNNBase, backend: str | None = None):
        super().__init__()
        self.mode, self.hidden, self.layers = layers.mode, layers.hidden_size, layers.num_layers
        self.backend = backend or fastest(layers.mode, layers.hidden_size)
        for name, parameter in layers.named_parameters():
            self.register_parameter(name, parameter)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor]]:
        """The output (T, B, H) and the last states (layers, B, H), as torch.nn gives them."""
        lasts = []
        for layer in range(self.layers):
            x, last = self._layer(x, *(getattr(self, f"{name}_l{layer}") for name in PARAMETERS))
            lasts.append(last)
        states = tuple(torch.stack(state) for state in zip(*lasts, strict=True))
        return x, states if self.mode == "LSTM" else states[0]

    def _layer(self, x, weight_ih, weight_hh, bias_ih, bias_hh):
        from flashrnn import flashrnn

        steps, batch, _ = x.shape
        recurrent = weight_hh.view(-1, 1, self.hidden, self.hidden)
        bias_ih, bias_hh = bias_ih.view(-1, 1, self.hidden), bias_hh.view(-1, 1, self.hidden)
        if self.mode == "GRU":
            # its gates: n on the hidden state's side, r, z, n on the input's side
            recurrent = recurrent.roll(1, 0)
            bias = torch.cat([bias_hh[2:], bias_ih[:2] + bias_hh[:2], bias_ih[2:]])
        else:
            bias = bias_ih + bias_hh
        projected = linear(x, weight_ih).view(steps, batch, -1, 1, self.hidden).transpose(0, 1)
        dtype = str(x.dtype).removeprefix("torch.")
        function = FUNCTIONS[self.mode]
        # states (S, B, T, 1, H), the hidden state first
        states, last = flashrnn(projected, recurrent, bias, function=function, backend=self.backend, dtype=dtype)
        return states[0, :, :, 0].transpose(0, 1), [state[:, 0, 0] for state in last]
