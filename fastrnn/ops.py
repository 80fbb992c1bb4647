"""The operators of fastrnn: schemas, shapes under tracing, and the way to a backend.

One operator is one layer's time loop, for D groups (directions, or models of an ensemble) side by side.
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

# gates_x (rows, D, G*H): input projection with the biases (for the GRU all but the hidden-side bias of gate n:
# bias_hn); weight_hh (D, G*H, H') with H' = proj_size or H; weight_hr (D, H', H); bias_hn (D, H); h0 (D, B,
# H'); c0 (D, B, H); batch_sizes (T,) int64 on the CPU, not increasing; reverse[d] is 1 where group d walks back
# in time. output (rows, D*H'); h_n and c_n like h0 and c0. With save: the activated gates (rows, D, S*H), S by
# cell (LSTM i, f, g, o; GRU r, z, n and W_hn h + b_hn; RNN h), and the state before each step, hidden_prev
# (rows, D, H') and cell_prev (rows, D, H).
_library.define(
    "scan_forward(str backend, str cell, Tensor gates_x, Tensor weight_hh, Tensor? weight_hr, Tensor? bias_hn, "
    "Tensor h0, Tensor? c0, Tensor? batch_sizes, int[] reverse, bool save) -> (Tensor output, Tensor h_n, Tensor c_n, "
    "Tensor gates, Tensor hidden_prev, Tensor cell_prev)"
)

# dgates_x and, for the GRU alone, dgates_h (rows, D, G*H): gradients of the pre-activation gates on the input's
# and on the hidden state's side; with a projection d_projected (rows, D, H'): the whole gradient of each
# projected hidden state.
_library.define(
    "scan_backward(str backend, str cell, Tensor? d_output, Tensor? d_h_n, Tensor? d_c_n, Tensor gates, "
    "Tensor hidden_prev, Tensor? cell_prev, Tensor weight_hh, Tensor? weight_hr, SymInt batch, Tensor? batch_sizes, "
    "int[] reverse) -> (Tensor dgates_x, Tensor dgates_h, Tensor d_projected, Tensor dh0, Tensor dc0)"
)

# Sum over rows of d_out (rows, D, N) times source (rows, S, K), S = D or a divisor of it, kept apart for every
# one of the interleaved examples: (examples, D, N, K).
_library.define("weight_gradient(Tensor d_out, Tensor source, SymInt examples) -> Tensor")

# Rows that one partial sum of a weight gradient runs over, for a matrix of up to SMALL_MATRIX weights and a larger one,
# and how many numbers of partial sums are held at a time.
SMALL_BLOCK, LARGE_BLOCK = 64, 256
SMALL_MATRIX = 1 << 16
PARTIAL_SUMS = 1 << 20


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
        valid = sizes and falling and sizes[-1] > 0 and sizes[0] <= batch and sum(sizes) == rows
        expected = f"batch_sizes should fall from at most {batch}, stay above 0 and add up to {rows}, got {sizes[:20]}"
    if not valid:
        raise RuntimeError(f"fastrnn: {expected}")


@torch.library.impl(_library, "scan_forward", "CompositeExplicitAutograd")
def _scan_forward(backend, cell, gates_x, weight_hh, weight_hr, bias_hn, h0, c0, batch_sizes, reverse, save):
    rows, groups, gate_size = gates_x.shape
    batch, state_size = h0.shape[1:]
    size = gate_size // CELLS[cell].gates
    _expect("weight_hh", weight_hh, groups, gate_size, state_size)
    _expect("weight_hr", weight_hr, groups, state_size, size)
    _expect("bias_hn", bias_hn, groups, size)
    _expect("h0", h0, groups, batch, state_size if weight_hr is not None else size)
    _expect("c0", c0, groups, batch, size)
    _expect_packing(batch_sizes, rows, batch)
    results = dispatch.kernels(backend).scan_forward(
        cell, gates_x, weight_hh, weight_hr, bias_hn, h0, c0, batch_sizes, reverse, save
    )
    return _fill(results, gates_x)


@torch.library.impl(_library, "scan_backward", "CompositeExplicitAutograd")
def _scan_backward(
    backend,
    cell,
    d_output,
    d_h_n,
    d_c_n,
    gates,
    hidden_prev,
    cell_prev,
    weight_hh,
    weight_hr,
    batch,
    batch_sizes,
    reverse,
):
    rows, groups, saved_size = gates.shape
    state_size = hidden_prev.shape[2]
    size = saved_size // CELLS[cell].saved
    _expect("weight_hh", weight_hh, groups, CELLS[cell].gates * size, state_size)
    _expect("weight_hr", weight_hr, groups, state_size, size)
    _expect("hidden_prev", hidden_prev, rows, groups, state_size if weight_hr is not None else size)
    _expect("cell_prev", cell_prev, rows, groups, size)
    _expect("d_output", d_output, rows, groups * state_size)
    _expect("d_h_n", d_h_n, groups, batch, state_size)
    _expect("d_c_n", d_c_n, groups, batch, size)
    _expect_packing(batch_sizes, rows, batch)
    results = dispatch.kernels(backend).scan_backward(
        cell,
        *(d_output, d_h_n, d_c_n),
        *(gates, hidden_prev, cell_prev),
        *(weight_hh, weight_hr, batch, batch_sizes, reverse),
    )
    return _fill(results, gates)


@torch.library.impl(_library, "weight_gradient", "CompositeExplicitAutograd")
def _weight_gradient(d_out, source, examples):
    rows, groups, columns = d_out.shape
    sources, depth = source.shape[1:]
    steps = rows // examples
    d_out = d_out.reshape(steps, examples * sources, -1).permute(1, 2, 0)
    source = source.reshape(steps, examples * sources, depth).transpose(0, 1)
    # One sum over all time steps loses digits: torch.nn adds up one product a step. The matrix product takes a small
    # matrix's sum in one go and a large one's in blocks of its own, where small blocks of ours only cost time.
    weights = d_out.shape[1] * depth
    block = SMALL_BLOCK if weights <= SMALL_MATRIX else LARGE_BLOCK
    end = steps - steps % block
    gradient = torch.bmm(d_out[:, :, end:], source[:, end:])
    stride = block * max(1, PARTIAL_SUMS // (weights * d_out.shape[0]))
    for start in range(0, end, stride):
        left = d_out[:, :, start : min(start + stride, end)].unflatten(2, (-1, block)).transpose(1, 2)
        right = source[:, start : min(start + stride, end)].unflatten(1, (-1, block))
        gradient += torch.matmul(left, right).sum(1)
    return gradient.view(examples, groups, columns, depth)


@torch.library.register_fake("fastrnn::weight_gradient", lib=_library)
def _fake_weight_gradient(d_out, source, examples):
    return d_out.new_empty(examples, d_out.shape[1], d_out.shape[2], source.shape[2])


@torch.library.register_fake("fastrnn::scan_forward", lib=_library)
def _fake_scan_forward(backend, cell, gates_x, weight_hh, weight_hr, bias_hn, h0, c0, batch_sizes, reverse, save):
    rows, groups, _ = gates_x.shape
    batch, state_size = h0.shape[1:]
    size = state_size if weight_hr is None else weight_hr.shape[2]
    empty = gates_x.new_empty
    has_cell_state = c0 is not None
    return (
        empty(rows, groups * state_size),
        empty(groups, batch, state_size),
        empty(groups, batch, size) if has_cell_state else empty(0),
        empty(rows, groups, CELLS[cell].saved * size) if save else empty(0),
        empty(rows, groups, state_size) if save else empty(0),
        empty(rows, groups, size) if save and has_cell_state else empty(0),
    )


@torch.library.register_fake("fastrnn::scan_backward", lib=_library)
def _fake_scan_backward(
    backend,
    cell,
    d_output,
    d_h_n,
    d_c_n,
    gates,
    hidden_prev,
    cell_prev,
    weight_hh,
    weight_hr,
    batch,
    batch_sizes,
    reverse,
):
    rows, groups, _ = gates.shape
    gate_size, state_size = weight_hh.shape[1:]
    size = state_size if weight_hr is None else weight_hr.shape[2]
    empty = gates.new_empty
    return (
        empty(rows, groups, gate_size),
        empty(rows, groups, gate_size) if cell == "gru" else empty(0),
        empty(0) if weight_hr is None else empty(rows, groups, state_size),
        empty(groups, batch, state_size),
        empty(0) if cell_prev is None else empty(groups, batch, size),
    )


scan_forward = torch.ops.fastrnn.scan_forward.default
scan_backward = torch.ops.fastrnn.scan_backward.default
weight_gradient = torch.ops.fastrnn.weight_gradient.default
