"""The operators of fastrnn: schemas, shapes under tracing, and the way to a backend.

An operator is one whole layer, forward or backward, for D groups (directions, or models of an ensemble) side by side.
``rows`` counts the time steps of all sequences: T * B for a dense input, the sum of ``batch_sizes`` for a
packed one. Sequence b of time step t stands at row ``offset[t] + b`` and runs while ``b < batch_sizes[t]``.

Operators are functional, their results never alias, and an absent result is an empty tensor. They know nothing of
autograd: ``fastrnn.functional`` does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch
from .reference import CELLS

_library = torch.library.Library("fastrnn", "DEF")

# x (rows, S, I), S = D or a divisor of it; weight_ih (D, G*H, I); weight_hh (D, G*H, H') with H' = proj_size or H;
# bias_ih and bias_hh (D, G*H), both or none; weight_hr (D, H', H); h0 (D, B, H'); c0 (D, B, H); batch_sizes (T,) int64
# on the CPU, not increasing, maybe zero at the end; reverse[d] is 1 where group d walks back in time; resets (rows, D)
# bool: whether the state of group d is zero before the step of a row. output (rows, D*H'); h_n and c_n like h0 and c0.
# With save, the reserve: the activated gates (rows, D, S*H), S by cell (LSTM i, f, g, o; GRU r, z, n and W_hn h + b_hn;
# RNN h), and the state before each step, hidden_prev (rows, D, H') and cell_prev (rows, D, H). With cells, of the LSTM,
# the cell state after each step, (rows, D*H).
_library.define(
    "layer_forward(str backend, str cell, Tensor x, Tensor weight_ih, Tensor? bias_ih, Tensor weight_hh, "
    "Tensor? bias_hh, Tensor? weight_hr, Tensor h0, Tensor? c0, Tensor? batch_sizes, int[] reverse, bool save, "
    "Tensor? resets=None, bool cells=False) -> "
    "(Tensor output, Tensor h_n, Tensor c_n, Tensor gates, Tensor hidden_prev, Tensor cell_prev, Tensor cells)"
)

# Gradients of all inputs, those that ``needs`` asks for (x, weight_ih, bias_ih, weight_hh, bias_hh, weight_hr; always
# those of the states). Those of weights and biases are kept apart for every one of the interleaved examples (example e
# of row r stands at r * examples + e) and have a dimension of examples in front.
_library.define(
    "layer_backward(str backend, str cell, Tensor? d_output, Tensor? d_h_n, Tensor? d_c_n, Tensor gates, "
    "Tensor hidden_prev, Tensor? cell_prev, Tensor x, Tensor weight_ih, Tensor weight_hh, Tensor? weight_hr, "
    "SymInt batch, Tensor? batch_sizes, int[] reverse, SymInt examples, bool[] needs, "
    "Tensor? resets=None, Tensor? d_cells=None) -> (Tensor dx, "
    "Tensor d_weight_ih, Tensor d_bias_ih, Tensor d_weight_hh, Tensor d_bias_hh, Tensor d_weight_hr, Tensor dh0, "
    "Tensor dc0)"
)


def _fill(results: tuple[Tensor | None, ...], like: Tensor) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if result is None else result for result in results)


def _expect(name: str, tensor: Tensor | None, *shape: int) -> None:
    """Kernels read memory by the shapes that they are told: what does not fit must not reach them."""
    if tensor is not None and tensor.shape != shape:
        raise RuntimeError(f"fastrnn: {name} should have the shape {shape}, got {tuple(tensor.shape)}")


def _expect_packing(batch_sizes: Tensor | None, rows: int, batch: int) -> None:
    if batch_sizes is None:
        valid = rows % batch == 0 if batch else rows == 0
        expected = f"{rows} rows are no whole number of steps of a batch of {batch}"
    else:
        sizes = batch_sizes.tolist()
        falling = sizes == sorted(sizes, reverse=True)
        valid = sizes and falling and sizes[-1] >= 0 and sizes[0] <= batch and sum(sizes) == rows
        expected = f"batch_sizes should fall from at most {batch}, not below 0, and add up to {rows}, got {sizes[:20]}"
    if not valid:
        raise RuntimeError(f"fastrnn: {expected}")


def _expect_resets(resets: Tensor | None, rows: int, groups: int) -> None:
    _expect("resets", resets, rows, groups)
    if resets is not None and resets.dtype != torch.bool:
        raise RuntimeError(f"fastrnn: resets should be bool, got {resets.dtype}")


def zero_before_first_step(
    resets: Tensor, reverse, states: tuple[Tensor | None, ...], batch_sizes: Tensor | None
) -> None:
    """Set to zero, in place, the rows of states (D, B, .) that are reset before the first step of their direction."""
    batch = states[0].shape[1]
    if batch_sizes is None:
        first, last = resets[:batch], resets[-batch:]
        if len(reverse) == 1:  # the most common call, whose few microseconds count
            reset = (last if reverse[0] else first).unsqueeze(0)
            for state in states:
                if state is not None:
                    state.masked_fill_(reset, 0)
            return
    else:
        batch = int(batch_sizes[0])
        sequences = torch.arange(batch, device=batch_sizes.device)
        steps = (batch_sizes[:, None] > sequences).sum(0)
        rows = (batch_sizes.cumsum(0) - batch_sizes)[steps - 1] + sequences
        first, last = resets[:batch], resets.index_select(0, rows.to(resets.device))
    for group, backwards in enumerate(reverse):
        reset = (last if backwards else first)[:, group, None]
        for state in states:
            if state is not None:
                state[group, :batch].masked_fill_(reset, 0)


def layer_forward_on(
    backend,
    cell,
    x,
    weight_ih,
    bias_ih,
    weight_hh,
    bias_hh,
    weight_hr,
    h0,
    c0,
    batch_sizes,
    reverse,
    save,
    resets=None,
    cells=False,
):
    """What ``layer_forward`` does, past torch's dispatcher; the seventh result only with ``cells``."""
    rows, sources, input_size = x.shape
    groups, gate_size, _ = weight_hh.shape
    batch, state_size = h0.shape[1:]
    size = gate_size // CELLS[cell].gates
    if sources == 0 or groups % sources or len(reverse) != groups:
        raise RuntimeError(f"fastrnn: {groups} groups cannot share {sources} inputs and {len(reverse)} directions")
    _expect("weight_ih", weight_ih, groups, gate_size, input_size)
    _expect("weight_hh", weight_hh, groups, CELLS[cell].gates * size, state_size)
    _expect("bias_ih", bias_ih, groups, gate_size)
    _expect("bias_hh", bias_hh, groups, gate_size)
    _expect("weight_hr", weight_hr, groups, state_size, size)
    _expect("h0", h0, groups, batch, state_size if weight_hr is not None else size)
    _expect("c0", c0, groups, batch, size)
    _expect_packing(batch_sizes, rows, batch)
    _expect_resets(resets, rows, groups)
    if cells and c0 is None:
        raise RuntimeError(f"fastrnn: {cell} has no cell states")
    results = dispatch.kernels(backend).layer_forward(
        *(cell, x, weight_ih, bias_ih, weight_hh, bias_hh, weight_hr, h0, c0, batch_sizes, reverse, save, resets, cells)
    )
    return _fill(results, x)


@torch.library.impl(_library, "layer_forward", "CompositeExplicitAutograd")
def _layer_forward(*arguments):
    results = layer_forward_on(*arguments)
    return results if len(results) == 7 else (*results, results[0].new_empty(0))


def layer_backward_on(
    backend,
    cell,
    d_output,
    d_h_n,
    d_c_n,
    gates,
    hidden_prev,
    cell_prev,
    x,
    weight_ih,
    weight_hh,
    weight_hr,
    batch,
    batch_sizes,
    reverse,
    examples,
    needs,
    resets=None,
    d_cells=None,
    overwrite=False,
):
    """What ``layer_backward`` does, past torch's dispatcher; ``overwrite``: ``gates`` may be written to."""
    rows, sources, input_size = x.shape
    groups, gate_size, _ = weight_hh.shape
    state_size = hidden_prev.shape[2]
    size = gate_size // CELLS[cell].gates
    _expect("weight_ih", weight_ih, groups, gate_size, input_size)
    _expect("weight_hh", weight_hh, groups, gate_size, state_size)
    _expect("weight_hr", weight_hr, groups, state_size, size)
    _expect("gates", gates, rows, groups, CELLS[cell].saved * size)
    _expect("hidden_prev", hidden_prev, rows, groups, state_size if weight_hr is not None else size)
    _expect("cell_prev", cell_prev, rows, groups, size)
    _expect("d_output", d_output, rows, groups * state_size)
    _expect("d_h_n", d_h_n, groups, batch, state_size)
    _expect("d_c_n", d_c_n, groups, batch, size)
    if d_cells is not None:
        _expect("d_cells", d_cells, rows, groups * size)
    _expect_packing(batch_sizes, rows, batch)
    _expect_resets(resets, rows, groups)
    if examples < 1 or rows % examples or groups % sources:
        raise RuntimeError(f"fastrnn: {rows} rows and {groups} groups do not fit {examples} examples, {sources} inputs")
    return dispatch.kernels(backend).layer_backward(
        cell,
        *(d_output, d_h_n, d_c_n),
        *(gates, hidden_prev, cell_prev),
        *(x, weight_ih, weight_hh, weight_hr, batch, batch_sizes, reverse, examples, needs, resets, d_cells, overwrite),
    )


@torch.library.impl(_library, "layer_backward", "CompositeExplicitAutograd")
def _layer_backward(*arguments):
    return _fill(layer_backward_on(*arguments), arguments[5])


@torch.library.register_fake("fastrnn::layer_forward", lib=_library)
def _fake_layer_forward(
    backend,
    cell,
    x,
    weight_ih,
    bias_ih,
    weight_hh,
    bias_hh,
    weight_hr,
    h0,
    c0,
    batch_sizes,
    reverse,
    save,
    resets=None,
    cells=False,
):
    rows = x.shape[0]
    groups, batch, state_size = h0.shape
    size = state_size if weight_hr is None else weight_hr.shape[2]
    empty = x.new_empty
    has_cell_state = c0 is not None
    return (
        empty(rows, groups * state_size),
        empty(groups, batch, state_size),
        empty(groups, batch, size) if has_cell_state else empty(0),
        empty(rows, groups, CELLS[cell].saved * size) if save else empty(0),
        empty(rows, groups, state_size) if save else empty(0),
        empty(rows, groups, size) if save and has_cell_state else empty(0),
        empty(rows, groups * size) if cells else empty(0),
    )


@torch.library.register_fake("fastrnn::layer_backward", lib=_library)
def _fake_layer_backward(
    backend,
    cell,
    d_output,
    d_h_n,
    d_c_n,
    gates,
    hidden_prev,
    cell_prev,
    x,
    weight_ih,
    weight_hh,
    weight_hr,
    batch,
    batch_sizes,
    reverse,
    examples,
    needs,
    resets=None,
    d_cells=None,
):
    groups, gate_size, state_size = weight_hh.shape
    size = state_size if weight_hr is None else weight_hr.shape[2]
    shapes = (
        x.shape,
        (examples, *weight_ih.shape),
        (examples, groups, gate_size),
        (examples, *weight_hh.shape),
        (examples, groups, gate_size),
        (examples, groups, state_size, size),
    )
    gradients = [x.new_empty(shape if needed else 0) for shape, needed in zip(shapes, needs, strict=True)]
    dh0 = x.new_empty(groups, batch, state_size)
    return (*gradients, dh0, x.new_empty(0) if cell_prev is None else x.new_empty(groups, batch, size))


layer_forward = torch.ops.fastrnn.layer_forward.default
layer_backward = torch.ops.fastrnn.layer_backward.default
