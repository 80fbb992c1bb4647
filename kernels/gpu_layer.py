"""A whole layer on a GPU but for its time loops, of which the Triton and the CUDA backend have each their own.

torch's matrix products make the input projection and the gradients of the input and the weights.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..ops import zero_before_first_step
from ..reference import CELLS


class Scan(NamedTuple):
    """What the time loops of both passes are told, besides their tensors."""

    cell: str
    hidden_size: int
    groups: int
    batch: int
    steps: int
    dtype: torch.dtype
    device: torch.device
    reverse: tuple[int, ...]
    offsets: Tensor | None  # (T + 1,) int64: first rows of all time steps, and the end, if batch sizes differ
    resets: Tensor | None  # (rows, D) bytes


class Forward(NamedTuple):
    """The tensors of a forward loop; see ``ops``. It replaces hidden and cell, of float32 or better, by the last."""

    gates_x: Tensor  # (rows, D, G*H)
    weight_hh: Tensor  # (D, G*H, H)
    bias_hn: Tensor | None  # (D, H), the GRU's
    hidden: Tensor  # (D, B, H)
    cell: Tensor | None
    output: Tensor  # (rows, D*H)
    gates: Tensor | None
    hidden_prev: Tensor | None
    cell_prev: Tensor | None
    cells: Tensor | None  # (rows, D*H)


class Backward(NamedTuple):
    """The tensors of a backward loop. It replaces d_hidden and d_cell, of the last state, by those of the first.

    dgates (rows, D, S*H) are gradients before activation. The GRU's are n on the input's side, r, z, n on the hidden
    state's side, so that those of each side are neighbours.
    """

    gates: Tensor
    hidden_prev: Tensor
    cell_prev: Tensor | None
    d_output: Tensor | None
    d_cells: Tensor | None
    weight_hh: Tensor
    dgates: Tensor
    d_hidden: Tensor
    d_cell: Tensor | None


@functools.lru_cache(maxsize=256)
def direction_bits(reverse: tuple[int, ...]) -> tuple[int, int]:
    """The directions of all groups as bits, and after how many groups they repeat: no tensor has to be copied."""
    for period in range(1, min(len(reverse), 31) + 1):
        if len(reverse) % period == 0 and reverse == reverse[:period] * (len(reverse) // period):
            return sum(bool(backwards) << group for group, backwards in enumerate(reverse[:period])), period
    raise RuntimeError(
        f"fastrnn: the directions of {len(reverse)} groups should repeat after at most 31, got {reverse}"
    )


def _offsets(batch_sizes: Tensor | None, device: torch.device) -> Tensor | None:
    """First rows of all time steps, and the end, if batch sizes differ."""
    if batch_sizes is None:
        return None
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _offsets_written_there(batch_sizes, device)
    zero = batch_sizes.new_zeros(1)
    return torch.cat([zero, batch_sizes.cumsum(0)]).to(device, non_blocking=True)


def _offsets_written_there(batch_sizes: Tensor, device: torch.device) -> Tensor:
    """The same with no copy from the host: a CUDA graph would read that memory again at every replay, or refuses it.

    One small kernel writes the steps of each batch size; its numbers are arguments, which a graph keeps.
    """
    offsets = torch.zeros(len(batch_sizes) + 1, dtype=torch.int64, device=device)
    step = row = 0
    runs = torch.unique_consecutive(batch_sizes, return_counts=True)
    for size, steps in zip(*(run.tolist() for run in runs), strict=True):
        row += size * steps
        following = offsets[step + 1 : step + steps + 1]
        if size:
            torch.arange(row - size * (steps - 1), row + 1, size, out=following)
        else:
            following.fill_(row)
        step += steps
    return offsets


def plain(tensor: Tensor | None) -> Tensor | None:
    """The tensor as kernels read it: by its address alone, row after row.

    And from a multiple of 16 bytes, as all that torch allocates: for other addresses, which parts of a larger tensor
    may have, Triton would compile a second kernel with narrower loads.
    """
    if tensor is None:
        return None
    tensor = tensor.contiguous().resolve_neg()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def _as_bytes(resets: Tensor | None) -> Tensor | None:
    return None if resets is None else plain(resets).view(torch.uint8)


def on(device: torch.device):
    """Makes ``device`` the one to launch on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def tf32_is_allowed() -> bool:
    """Whether torch's recurrent layers may multiply float32 in TF32: what ``cudnn.allow_tf32`` sets too."""
    return torch.backends.cudnn.rnn.fp32_precision == "tf32"


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, and of states from step to step."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _project(cell, x, weight_ih, bias_ih, bias_hh) -> tuple[Tensor, Tensor | None]:
    """gates_x (rows, D, G*H), W_ih x with all biases that may be added before the time loop, and bias_hn (D, H)."""
    groups, gate_size, input_size = weight_ih.shape
    rows, sources, _ = x.shape
    bias, bias_hn = bias_ih, None
    if cell == "gru":
        kept = gate_size * 2 // 3
        if bias_hh is None:
            bias_hn = x.new_zeros(groups, gate_size - kept)
        else:
            bias_hn = bias_hh[:, kept:].contiguous()
            bias = torch.cat([bias_ih[:, :kept] + bias_hh[:, :kept], bias_ih[:, kept:]], 1)
    elif bias_hh is not None:
        bias = bias_ih + bias_hh
    weight = weight_ih.reshape(sources, -1, input_size)
    if sources == 1:
        gates_x = linear(x[:, 0], weight[0], None if bias is None else bias.reshape(-1))
        return gates_x.view(rows, groups, gate_size), bias_hn
    gates_x = torch.matmul(x.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1).reshape(rows, groups, gate_size)
    return (gates_x if bias is None else gates_x + bias).contiguous(), bias_hn


def _without_autocast(function):
    """The products here are as exact as the tensors: autocast has had its say when the layer was called."""

    @functools.wraps(function)
    def wrapped(*arguments):
        if not torch._C._is_any_autocast_enabled():
            return function(*arguments)
        device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
        with torch.autocast(device.type, enabled=False):
            return function(*arguments)

    return wrapped


def _state(tensor: Tensor) -> Tensor:
    return tensor.to(accumulator(tensor.dtype), copy=True, memory_format=torch.contiguous_format)


def _scan(cell, x, groups, batch, size, batch_sizes, reverse, resets) -> Scan:
    steps = x.shape[0] // batch if batch_sizes is None else len(batch_sizes)
    offsets = _offsets(batch_sizes, x.device)
    return Scan(cell, size, groups, batch, steps, x.dtype, x.device, tuple(reverse), offsets, _as_bytes(resets))


@_without_autocast
def layer_forward(
    run: Callable[[Scan, Forward], None],
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
    save: bool,
    resets: Tensor | None = None,
    cells: bool = False,
) -> tuple[Tensor | None, ...]:
    """Run a layer, with ``run`` for its time loop; see ``fastrnn.ops`` for shapes.

    Absent results are None; without ``cells`` there are six.
    """
    rows = x.shape[0]
    groups, batch, size = h0.shape
    hidden, cell_state = _state(h0), None if c0 is None else _state(c0)
    output = x.new_empty(rows, groups * size)
    gates = hidden_prev = cell_prev = None
    if save:
        gates = x.new_empty(rows, groups, CELLS[cell].saved * size)
        hidden_prev = x.new_empty(rows, groups, size)
        cell_prev = None if c0 is None else x.new_empty(rows, groups, size)
    all_cells = x.new_empty(rows, groups * size) if cells else None
    if rows and size:
        gates_x, bias_hn = _project(cell, x, weight_ih, bias_ih, bias_hh)
        if resets is not None:
            zero_before_first_step(resets, reverse, (hidden, cell_state), batch_sizes)
        scan = _scan(cell, x, groups, batch, size, batch_sizes, reverse, resets)
        weights, state = (gates_x, plain(weight_hh), plain(bias_hn)), (hidden, cell_state)
        run(scan, Forward(*weights, *state, output, gates, hidden_prev, cell_prev, all_cells))
    results = (output, hidden, cell_state, gates, hidden_prev, cell_prev, *((all_cells,) if cells else ()))
    return tuple(None if result is None else result.to(x.dtype) for result in results)


def _weight_gradient(d_out: Tensor, source: Tensor, examples: int) -> Tensor:
    """(examples, D, C, K) from gradients (rows, D, C) and sources (rows, S, K)."""
    rows, groups, columns = d_out.shape
    sources, depth = source.shape[1:]
    d_out = d_out.reshape(rows // examples, examples * sources, groups // sources * columns)
    source = source.reshape(rows // examples, examples * sources, depth)
    return torch.bmm(d_out.permute(1, 2, 0), source.transpose(0, 1)).view(examples, groups, columns, depth)


def _bias_gradient(d_out: Tensor, examples: int) -> Tensor:
    rows, groups, columns = d_out.shape
    return d_out.reshape(rows // examples, examples, groups, columns).sum(0)


@_without_autocast
def layer_backward(
    run: Callable[[Scan, Backward], None],
    cell: str,
    d_output: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    gates: Tensor,
    hidden_prev: Tensor,
    cell_prev: Tensor | None,
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    batch: int,
    batch_sizes: Tensor | None,
    reverse: list[int],
    examples: int,
    needs: list[bool],
    resets: Tensor | None,
    d_cells: Tensor | None,
    overwrite: bool,
) -> tuple[Tensor | None, ...]:
    """Back-propagate through a layer, with ``run`` for its time loop; see ``fastrnn.ops`` for shapes.

    Absent results are None.
    """
    rows, sources, input_size = x.shape
    groups, gate_size, size = weight_hh.shape

    def state_gradient(tensor):
        if tensor is None:
            return x.new_zeros(groups, batch, size, dtype=accumulator(x.dtype))
        return _state(tensor)

    gates, hidden_prev, cell_prev = plain(gates), plain(hidden_prev), plain(cell_prev)
    d_hidden = state_gradient(d_h_n)
    d_cell = None if cell_prev is None else state_gradient(d_c_n)
    # not in place of the gates: threads of a program may read a value again that another has replaced by then
    dgates = torch.empty_like(gates)
    if rows and size:
        scan = _scan(cell, x, groups, batch, size, batch_sizes, reverse, resets)
        reserve, gradients = (gates, hidden_prev, cell_prev), (plain(d_output), plain(d_cells))
        run(scan, Backward(*reserve, *gradients, plain(weight_hh), dgates, d_hidden, d_cell))

    needs_x, needs_weight_ih, needs_bias_ih, needs_weight_hh, needs_bias_hh, _ = needs
    dgates_x, dgates_h = dgates[:, :, :gate_size], dgates[:, :, -gate_size:]
    # the GRU's blocks begin with n on the input's side, torch's rows end with it
    turn = size if cell == "gru" else 0
    dx = d_weight_ih = d_bias_ih = d_weight_hh = d_bias_hh = None
    if needs_x:
        weight = weight_ih.roll(turn, 1) if turn else weight_ih
        by_source = dgates_x.reshape(rows, sources, groups // sources * gate_size).transpose(0, 1)
        dx = torch.bmm(by_source, weight.reshape(sources, -1, input_size)).transpose(0, 1).contiguous()
    if needs_weight_ih:
        d_weight_ih = _weight_gradient(dgates_x, x, examples)
        d_weight_ih = d_weight_ih.roll(-turn, 2) if turn else d_weight_ih
    if needs_bias_ih:
        d_bias_ih = _bias_gradient(dgates_x, examples)
        d_bias_ih = d_bias_ih.roll(-turn, 2) if turn else d_bias_ih
    if needs_weight_hh:
        d_weight_hh = _weight_gradient(dgates_h, hidden_prev, examples)
    if needs_bias_hh:
        # a copy: gradients that share memory would be scaled twice by an optimizer that works in place
        d_bias_hh = _bias_gradient(dgates_h, examples) if turn or d_bias_ih is None else d_bias_ih.clone()
    dc0 = None if d_cell is None else d_cell.to(x.dtype)
    return dx, d_weight_ih, d_bias_ih, d_weight_hh, d_bias_hh, None, d_hidden.to(x.dtype), dc0
