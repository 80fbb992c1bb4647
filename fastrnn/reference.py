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
from torch.nn import functional


class Extras(NamedTuple):
    """What a layer computes with beyond torch.nn's tensors, for D groups side by side; None where there is none of it.

    ``group`` gives those of one group, without the dimension D.
    """

    # GRU: whether the reset gate acts on W_hh h, as in cuDNN, or on h itself (Cho et al. 2014)
    reset_after: bool = True
    # layer normalization (Ba et al. 2016) of W_ih x and of W_hh h, (D, G*H), and of the LSTM's new cell state, (D, H)
    weight_ln_ih: Tensor | None = None
    bias_ln_ih: Tensor | None = None
    weight_ln_hh: Tensor | None = None
    bias_ln_hh: Tensor | None = None
    weight_ln_c: Tensor | None = None
    bias_ln_c: Tensor | None = None
    # peepholes (Gers and Schmidhuber 2000), (D, H): of i and f on the old cell state, of o on the new one
    weight_ci: Tensor | None = None
    weight_cf: Tensor | None = None
    weight_co: Tensor | None = None
    # (D, B, H'): by what h is multiplied where W_hh reads it (Gal and Ghahramani 2016)
    recurrent_mask: Tensor | None = None
    # (rows, D, H') and (rows, D, H), or one row for all: which share of the old state stays (Krueger et al. 2017)
    keep_hidden: Tensor | None = None
    keep_cell: Tensor | None = None

    def group(self, number: int) -> Extras:
        """Those of one group."""
        tensors = [
            None if tensor is None else tensor[:, number] if name.startswith("keep") else tensor[number]
            for name, tensor in zip(self._fields[1:], self[1:], strict=True)
        ]
        return Extras(self.reset_after, *tensors)

    def map(self, function) -> Extras:
        """``function`` of every tensor that is there."""
        return Extras(self.reset_after, *(None if tensor is None else function(tensor) for tensor in self[1:]))


NO_EXTRAS = Extras()
# Of layer normalization, as Ba et al. have it and torch.nn.LayerNorm's default is.
EPSILON = 1e-5


def _normalized(values: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Ba et al. (2016), equation 4, or the values themselves where there is no weight."""
    return values if weight is None else functional.layer_norm(values, values.shape[-1:], weight, bias, EPSILON)


# A step takes W_ih x with its bias; ``recurrent``, a function that gives W_hh h with its bias for an h; and the old
# state. It gives the new state.


def rnn_tanh_step(gates_x: Tensor, recurrent, hidden: Tensor, cell: None, extras: Extras) -> tuple[Tensor, None]:
    """Elman (1990): ``h' = tanh(W_ih x + W_hh h)``."""
    return torch.tanh(gates_x + recurrent(hidden)), None


def rnn_relu_step(gates_x: Tensor, recurrent, hidden: Tensor, cell: None, extras: Extras) -> tuple[Tensor, None]:
    """``h' = relu(W_ih x + W_hh h)``."""
    return torch.relu(gates_x + recurrent(hidden)), None


def gru_step(gates_x: Tensor, recurrent, hidden: Tensor, cell: None, extras: Extras) -> tuple[Tensor, None]:
    """Cho et al. (2014), with the reset gate behind the recurrent product as in cuDNN or before it; gates r, z, n."""
    r_x, z_x, n_x = gates_x.chunk(3, -1)
    r_h, z_h, n_h = recurrent(hidden).chunk(3, -1)
    r = torch.sigmoid(r_x + r_h)
    z = torch.sigmoid(z_x + z_h)
    n_h = r * n_h if extras.reset_after else recurrent(r * hidden).chunk(3, -1)[2]
    n = torch.tanh(n_x + n_h)
    return (1 - z) * n + z * hidden, None


def lstm_step(gates_x: Tensor, recurrent, hidden: Tensor, cell: Tensor, extras: Extras) -> tuple[Tensor, Tensor]:
    """Hochreiter and Schmidhuber (1997) with the forget gate of Gers et al. (2000); gate order i, f, g, o."""
    i, f, g, o = (gates_x + recurrent(hidden)).chunk(4, -1)
    peephole = extras.weight_ci is not None
    if peephole:
        i, f = i + extras.weight_ci * cell, f + extras.weight_cf * cell
    cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
    if peephole:
        o = o + extras.weight_co * cell
    return torch.sigmoid(o) * torch.tanh(_normalized(cell, extras.weight_ln_c, extras.bias_ln_c)), cell


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


def project(x: Tensor, weight_ih: Tensor, bias_ih: Tensor | None, extras: Extras) -> Tensor:
    """One group's W_ih x of all rows (rows, G*H), normalized where that is asked for, with its bias."""
    if extras.weight_ln_ih is None:
        return functional.linear(x, weight_ih, bias_ih)
    gates_x = _normalized(functional.linear(x, weight_ih), extras.weight_ln_ih, extras.bias_ln_ih)
    return gates_x if bias_ih is None else gates_x + bias_ih


def _mixed(old: Tensor, new: Tensor, keep: Tensor | None, rows: slice) -> Tensor:
    """The new state, or where ``keep`` is 1 the old one, or in between: zoneout, its expectation, and slow clocks."""
    if keep is None:
        return new
    keep = keep if len(keep) == 1 else keep[rows]
    return keep * old + (1 - keep) * new


def recur(
    step,
    gates_x,
    weight_hh,
    bias_hh,
    weight_hr,
    hidden,
    cell,
    sizes,
    reverse,
    resets,
    lengths=None,
    extras: Extras = NO_EXTRAS,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """One direction's time loop: gates_x (rows, G*H), hidden (B, H'), cell (B, H) or None."""
    outputs, cells = [None] * len(sizes), [None] * len(sizes)
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    for time in reversed(range(len(sizes))) if reverse else range(len(sizes)):
        # only the first sizes[time] sequences run at this step; the state of the others stays as it is
        size = sizes[time]
        rows = slice(starts[time], starts[time + 1])
        running = hidden[:size]
        running_cell = None if cell is None else cell[:size]
        if resets is not None:
            kept = ~resets[rows, None]
            running = torch.where(kept, running, 0)
            running_cell = None if cell is None else torch.where(kept, running_cell, 0)

        def recurrent(state: Tensor, size: int = size) -> Tensor:
            if extras.recurrent_mask is not None:
                state = state * extras.recurrent_mask[:size]
            if extras.weight_ln_hh is None:
                return functional.linear(state, weight_hh, bias_hh)
            product = _normalized(functional.linear(state, weight_hh), extras.weight_ln_hh, extras.bias_ln_hh)
            return product if bias_hh is None else product + bias_hh

        new, new_cell = step(gates_x[rows], recurrent, running, running_cell, extras)
        if weight_hr is not None:
            new = functional.linear(new, weight_hr)
        new = outputs[time] = _mixed(running, new, extras.keep_hidden, rows)
        if cell is not None:
            new_cell = cells[time] = _mixed(running_cell, new_cell, extras.keep_cell, rows)
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
    extras: Extras = NO_EXTRAS,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """One layer, D groups side by side; arguments and results as in ``fastrnn.functional.layer``, cells always."""
    if x.dtype in (torch.bfloat16, torch.float16):
        # as the kernels do: the state is kept in float32 from step to step
        tensors = (x, weight_ih, bias_ih, weight_hh, bias_hh, weight_hr, h0, c0)
        single = [None if tensor is None else tensor.float() for tensor in tensors]
        results = layer(cell, *single, batch_sizes, reverse, resets, lengths, extras.map(Tensor.float))
        return tuple(None if result is None else result.to(x.dtype) for result in results)
    groups = len(reverse)
    inputs = x.shape[1]
    batch = h0.shape[1]
    if batch_sizes is not None and torch.jit.is_tracing():
        raise RuntimeError(
            "fastrnn: a trace of this layer would hold its example's batch sizes; trace a padded tensor with lengths="
        )
    sizes = [batch] * (x.shape[0] // batch) if batch_sizes is None else batch_sizes.tolist()
    if lengths is not None:
        # in gradients a NaN of the padding would come through: 0 · NaN is NaN
        x = torch.where(_counts(lengths, len(sizes))[:, :, None], x, 0)

    def run(group: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        own = extras.group(group)
        bias = None if bias_ih is None else bias_ih[group]
        # a product a step, as in torch.nn: in one product the weights' gradient is one sum over all rows, less exact
        steps = x[:, group * inputs // groups].split(sizes)
        gates_x = torch.cat([project(step, weight_ih[group], bias, own) for step in steps])
        return recur(
            CELLS[cell].step,
            gates_x,
            weight_hh[group],
            None if bias_hh is None else bias_hh[group],
            None if weight_hr is None else weight_hr[group],
            h0[group],
            None if c0 is None else c0[group],
            sizes,
            reverse[group],
            None if resets is None else resets[:, group],
            lengths,
            own,
        )

    outputs, hiddens, finals, cells = zip(*(run(group) for group in range(groups)), strict=True)
    if c0 is None:
        return torch.cat(outputs, -1), torch.stack(hiddens), None, None
    return torch.cat(outputs, -1), torch.stack(hiddens), torch.stack(finals), torch.cat(cells, -1)
