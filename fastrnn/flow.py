"""``fastrnn.gradient_flow``: how much of a gradient reaches every layer and time step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import reference
from .dispatch import use_backend
from .modules import _Layer


@dataclass(frozen=True)
class GradientFlow:
    """The answer of ``fastrnn.gradient_flow``.

    Attributes:
        norms: (num_layers * D, T), rows in the order of ``h_n``, columns in the order of time in both directions.
        names: of the rows, "layer 0" or "layer 0 reverse".
    """

    norms: Tensor
    names: tuple[str, ...]

    def draw(self, axes=None):
        """Draw the norms over time, a line for each row, on a logarithmic scale; needs matplotlib.

        Args:
            axes: ``matplotlib.axes.Axes`` to draw on, None for those of a new figure.

        Returns:
            The axes; ``axes.figure.savefig(path)`` writes them to a file.
        """
        if axes is None:
            from matplotlib.figure import Figure

            axes = Figure(layout="constrained").add_subplot()
        for name, norms in zip(self.names, self.norms.tolist(), strict=True):
            axes.plot(norms, label=name)
        axes.set_yscale("log")
        axes.set_xlabel("time step t")
        axes.set_ylabel("‖∂L/∂h_t‖")
        axes.legend()
        return axes


def _sum_of_final_state(module: _Layer):
    def loss(output, final, *cells) -> Tensor:
        hidden = final[0] if module.mode == "LSTM" else final
        return hidden[-2 if module.bidirectional else -1 :].sum()

    return loss


def gradient_flow(
    module: _Layer,
    input: Tensor | PackedSequence,
    hx=None,
    *,
    loss: Callable[..., Tensor] | None = None,
    **arguments,
) -> GradientFlow:
    """Measure ‖∂L/∂h_t‖ for every layer and time step: vanishing and exploding gradients made visible.

    ∂L/∂h_t is the whole derivative: what reaches the hidden state through the layer above and through all later
    steps (Bengio et al. 1994, Pascanu et al. 2013). The norm is taken over all sequences and hidden units.

    Args:
        module: ``fastrnn.RNN``, ``GRU`` or ``LSTM``. Its gradients (``.grad``) stay as they are.
        input, hx: what the module would be called with; other keyword arguments are passed on to it.
        loss: gets what the module returns, ``loss(output, final_state)``, and gives a scalar L. By default L is the
            sum of the last layer's final hidden state: for one direction the last output, so that the norms show how
            far back in time that one still learns from.

    The layer runs step by step on the backend "reference": this is for looking, not for training.

    Raises:
        TypeError: ``module`` is no layer of fastrnn.
        ValueError: ``loss`` gives no scalar, or one that does not depend on the layer.
    """
    if not isinstance(module, _Layer):
        raise TypeError(
            f"gradient_flow takes fastrnn.RNN, GRU or LSTM, got {type(module).__name__}; fastrnn.convert(model) turns "
            "torch.nn's layers into these"
        )
    loss = loss or _sum_of_final_state(module)
    # a gradient is asked for whether or not the caller, or the parameters, want one
    with torch.inference_mode(False), torch.enable_grad(), use_backend("reference"), reference.recorded() as layers:
        if isinstance(input, PackedSequence):
            input = PackedSequence(input.data.detach().clone().requires_grad_(), *input[1:])
        else:
            input = input.detach().clone().requires_grad_()
        value = loss(*module(input, hx, **arguments))
        states = [hidden for layer in layers for hidden in layer]
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            given = f"one of {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"loss should give a tensor of one element computed from the layer's results, got {given}")
        gradients = torch.autograd.grad(value, states, allow_unused=True)
    norms = [value.new_zeros(()) if gradient is None else gradient.norm() for gradient in gradients]
    suffixes = ("", " reverse")[: 2 if module.bidirectional else 1]
    names = tuple(f"layer {layer}{suffix}" for layer in range(module.num_layers) for suffix in suffixes)
    return GradientFlow(torch.stack(norms).view(len(names), -1), names)
