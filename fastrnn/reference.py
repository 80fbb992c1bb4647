"""The specification: every cell's step and the time loop in plain, differentiable torch operations.

All backends are tested against this file, and it computes what they cannot: second derivatives and forward-mode
derivatives. Gate orders and names are torch's.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


def rnn_tanh_step(gates_x: Tensor, gates_h: Tensor, hidden: Tensor, cell: None) -> tuple[Tensor, None]:
    """Elman (1990): ``h' = tanh(gates_x + gates_h)``."""
    return torch.tanh(gates_x + gates_h), None


def rnn_relu_step(gates_x: Tensor, gates_h: Tensor, hidden: Tensor, cell: None) -> tuple[Tensor, None]:
    """``h' = relu(gates_x + gates_h)``."""
    return torch.relu(gates_x + gates_h), None


def gru_step(gates_x: Tensor, gates_h: Tensor, hidden: Tensor, cell: None) -> tuple[Tensor, None]:
    """Cho et al. (2014), with the reset gate behind the recurrent product as in cuDNN; gate order r, z, n."""
    r_x, z_x, n_x = gates_x.chunk(3, -1)
    r_h, z_h, n_h = gates_h.chunk(3, -1)
    r = torch.sigmoid(r_x + r_h)
    z = torch.sigmoid(z_x + z_h)
    n = torch.tanh(n_x + r * n_h)
    return (1 - z) * n + z * hidden, None


def lstm_step(gates_x: Tensor, gates_h: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Hochreiter and Schmidhuber (1997) with the forget gate of Gers et al. (2000); gate order i, f, g, o."""
    i, f, g, o = (gates_x + gates_h).chunk(4, -1)
    cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(cell), cell


class Cell(NamedTuple):
    """What all of fastrnn needs to know of a cell."""

    step: object
    gates: int  # blocks of hidden_size rows in weight_ih and weight_hh
    saved: int  # blocks of hidden_size values that the forward pass keeps for the backward pass
    has_cell_state: bool = False


CELLS = {
    "rnn_tanh": Cell(rnn_tanh_step, gates=1, saved=1),
    "rnn_relu": Cell(rnn_relu_step, gates=1, saved=1),
    "gru": Cell(gru_step, gates=3, saved=4),
    "lstm": Cell(lstm_step, gates=4, saved=4, has_cell_state=True),
}


class _Recording(threading.local):
    """Where the hidden states of every step go, a list for each layer and direction; None: nowhere."""

    hidden: list[list[Tensor]] | None = None


_recording = _Recording()


@contextlib.contextmanager
def recorded() -> Iterator[list[list[Tensor]]]:
    """The hidden states that layers run here pass on in this thread: per layer and direction, then per time step.

    They are the tensors that the next step and the output are computed from, (running sequences, H'): the gradient of
    one holds all that reaches it.
    """
    before, _recording.hidden = _recording.hidden, []
    try:
        yield _recording.hidden
    finally:
        _recording.hidden = before


def _direction(
    step, x, weight_ih, bias_ih, weight_hh, bias_hh, weight_hr, hidden, cell, sizes, reverse, resets, lengths
):
    """One direction's time loop: x (rows, I), hidden (B, H'), cell (B, H) or None."""
    outputs, cells = [None] * len(sizes), [None] * len(sizes)
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    for time in reversed(range(len(sizes))) if reverse else range(len(sizes)):
        # only the first sizes[time] sequences run at this step; the state of the others stays as it is
        size = sizes[time]
        running = hidden[:size]
        running_cell = None if cell is None else cell[:size]
        if resets is not None:
            kept = ~resets[starts[time] : starts[time + 1], None]
            running = torch.where(kept, running, 0)
            running_cell = None if cell is None else torch.where(kept, running_cell, 0)
        gates_x = torch.nn.functional.linear(x[starts[time] : starts[time + 1]], weight_ih, bias_ih)
        gates_h = torch.nn.functional.linear(running, weight_hh, bias_hh)
        new, new_cell = step(gates_x, gates_h, running, running_cell)
        if weight_hr is not None:
            new = torch.nn.functional.linear(new, weight_hr)
        outputs[time], cells[time] = new, new_cell
        if lengths is not None:
            counts = (time < lengths)[:, None]
            new, new_cell = (
                torch.where(counts, new, running),
                None if cell is None else torch.where(counts, new_cell, running_cell),
            )
        hidden = torch.cat([new, hidden[size:]])
        if cell is not None:
            cell = torch.cat([new_cell, cell[size:]])
    if _recording.hidden is not None:
        _recording.hidden.append(outputs)
    results = [torch.cat(outputs), None if cell is None else torch.cat(cells)]
    if lengths is not None:
        counts = _counts(lengths, len(sizes))
        results = [None if result is None else torch.where(counts, result, 0) for result in results]
    return results[0], hidden, cell, results[1]


def _counts(lengths: Tensor, steps: int) -> Tensor:
    """(T * B, 1): whether a row is before its sequence's end."""
    return (torch.arange(steps, device=lengths.device)[:, None] < lengths).reshape(-1, 1)


def layer(
    cell: str,
    x: Tensor,
    weight_ih: Tensor,
    bias_ih: Tensor | None,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    batch_sizes: Tensor | None,
    reverse: list[int],
    resets: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """One layer, D groups side by side; arguments and results as in ``fastrnn.functional.layer``, cells always."""
    if x.dtype in (torch.bfloat16, torch.float16):
        # as the kernels do: the state is kept in float32 from step to step
        tensors = (x, weight_ih, bias_ih, weight_hh, bias_hh, weight_hr, h0, c0)
        single = [None if tensor is None else tensor.float() for tensor in tensors]
        results = layer(cell, *single, batch_sizes, reverse, resets, lengths)
        return tuple(None if result is None else result.to(x.dtype) for result in results)
    groups = len(reverse)
    inputs = x.shape[1]
    batch = h0.shape[1]
    sizes = [batch] * (x.shape[0] // batch) if batch_sizes is None else batch_sizes.tolist()
    if lengths is not None:
        # in gradients a NaN of the padding would come through: 0 · NaN is NaN
        x = torch.where(_counts(lengths, len(sizes))[:, :, None], x, 0)
    results = [
        _direction(
            CELLS[cell].step,
            x[:, group * inputs // groups],
            weight_ih[group],
            None if bias_ih is None else bias_ih[group],
            weight_hh[group],
            None if bias_hh is None else bias_hh[group],
            None if weight_hr is None else weight_hr[group],
            h0[group],
            None if c0 is None else c0[group],
            sizes,
            reverse[group],
            None if resets is None else resets[:, group],
            lengths,
        )
        for group in range(groups)
    ]
    outputs, hiddens, finals, cells = zip(*results, strict=True)
    if c0 is None:
        return torch.cat(outputs, -1), torch.stack(hiddens), None, None
    return torch.cat(outputs, -1), torch.stack(hiddens), torch.stack(finals), torch.cat(cells, -1)
