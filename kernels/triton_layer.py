"""A whole layer on Triton's kernels: the Triton backend.

torch's matrix products make the input projection and the gradients of the input and the weights; the time loops are
those of ``triton_scan.py``. This file chooses their tiles, allocates, and launches.
"""

import contextlib
import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn.functional import linear

from ..ops import zero_before_first_step
from ..options import STEP_OPTIONS
from ..reference import CELLS
from .triton_scan import INTERPRETED, backward_scan, forward_scan
from .triton_tiles import AMD, HOPPER, WARPS, Limits, choose_tiles


@functools.cache
def _limits(device: torch.device) -> Limits:
    if INTERPRETED:
        return HOPPER._replace(cooperative=False)
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    programs, shared_bytes = properties["multiprocessor_count"], properties["max_shared_mem"]
    if torch.version.hip is not None:
        # In Triton 3.9 other waves' stores may still be under way when one wave's release counts them as done: nobody
        # waits inside a launch, each step is one of its own.
        return Limits(programs, shared_bytes, False, AMD.most_alone)
    return Limits(programs, shared_bytes, True, HOPPER.most_alone)


@functools.lru_cache(maxsize=256)
def _direction_bits(reverse: tuple[int, ...]) -> tuple[int, int]:
    """The directions of all groups as bits, and after how many groups they repeat: no tensor has to be copied."""
    for period in range(1, min(len(reverse), 31) + 1):
        if len(reverse) % period == 0 and reverse == reverse[:period] * (len(reverse) // period):
            return sum(bool(backwards) << group for group, backwards in enumerate(reverse[:period])), period
    raise RuntimeError(
        f"fastrnn: the directions of {len(reverse)} groups should repeat after at most 31, got {reverse}"
    )


def _precision(dtype: torch.dtype) -> str:
    """How products of float32 are computed: as torch's own recurrent layers do."""
    tf32 = (
        dtype == torch.float32
        and torch.backends.cudnn.allow_tf32
        and not INTERPRETED.value
        and torch.version.hip is None
    )
    return "tf32" if tf32 else "ieee"


def can_run(call) -> str | None:
    """Why this backend cannot run ``call``, or None if it can."""
    if call.device != "cuda" and not (INTERPRETED and call.device == "cpu"):
        return f"it runs on a GPU (or, under TRITON_INTERPRET=1, on the CPU), the input is on {call.device}"
    if call.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return f"it computes in floating point, the input is {call.dtype}"
    if call.proj_size:
        return "its kernels have no projections (proj_size)"
    if call.options and (missing := STEP_OPTIONS.intersection(call.options)):
        return f"its kernels have no {', '.join(sorted(missing))}"
    return None


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _offsets(batch_sizes: Tensor | None, device: torch.device) -> Tensor | None:
    """First rows of all time steps, and the end, if batch sizes differ."""
    if batch_sizes is None:
        return None
    zero = batch_sizes.new_zeros(1)
    return torch.cat([zero, batch_sizes.cumsum(0)]).to(device, non_blocking=True)


# The second dimension of a CUDA grid ends here.
MOST_PAIRS = 65535


class _Scan(NamedTuple):
    """What both directions of a call have in common."""

    cell: str
    hidden_size: int
    groups: int
    batch: int
    steps: int
    dtype: torch.dtype
    device: torch.device
    reverse: tuple[int, ...]
    offsets: Tensor | None

    def launch(self, kernel, tensors: tuple[Tensor | None, ...], rounds: int, **options) -> None:
        """Launch ``kernel`` on ``tensors`` for all rounds: at once, or one by one where programs may not wait."""
        limits = _limits(self.device)
        backward = kernel is backward_scan
        itemsize = self.dtype.itemsize
        tiles = choose_tiles(self.cell, backward, self.hidden_size, self.groups, -(-self.batch // 16), itemsize, limits)
        rounds += backward and not tiles.alone  # the last product
        blocks, batch_tiles = tiles.blocks(self.hidden_size), -(-self.batch // tiles.rows)
        pairs = self.groups * batch_tiles
        counters = torch.zeros(pairs * 32, dtype=torch.int32, device=self.device)
        together = tiles.alone or blocks == 1 or (limits.cooperative and blocks <= limits.programs)
        waiting = together and blocks > 1
        at_once = min(pairs, max(1, limits.programs // blocks) if waiting else MOST_PAIRS)
        if waiting:
            options["launch_cooperative_grid"] = True
            if rounds * blocks >= 1 << 31:
                raise RuntimeError(f"fastrnn: {rounds} steps are more than the counters of {blocks} programs can count")
        cell, directions = CELLS[self.cell], _direction_bits(self.reverse)
        for first_pair in range(0, pairs, at_once):
            grid = (blocks, min(at_once, pairs - first_pair))
            for begin in range(0, rounds, rounds if together else 1):
                end = rounds if together else begin + 1
                kernel[grid](
                    *(*tensors, counters, self.groups, self.batch, self.steps),
                    *(begin, end, first_pair, batch_tiles, *directions),
                    *(self.cell, self.hidden_size, cell.gates, cell.saved),
                    *(tiles.rows, tiles.units, tiles.splits, tiles.chunk, tiles.chunks, tiles.resident),
                    *(tiles.in_flight, tiles.alone),
                    PACKED=self.offsets is not None,
                    PRECISION=_precision(self.dtype),
                    EXACT=self.dtype in (torch.float32, torch.float64),
                    num_warps=WARPS,
                    # a pipeline would read hidden states ahead of the step that writes them
                    num_stages=1,
                    **options,
                )


def _plain(tensor: Tensor | None) -> Tensor | None:
    """The tensor as kernels read it: by its address alone, row after row."""
    return None if tensor is None else tensor.contiguous().resolve_neg()


def _as_bytes(resets: Tensor | None) -> Tensor | None:
    return None if resets is None else resets.contiguous().view(torch.uint8)


def _on(device: torch.device):
    """Makes ``device`` the one to launch on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


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


@_without_autocast
def layer_forward(
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
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Run a layer; see ``fastrnn.ops`` for shapes. Absent results are None."""
    rows, dtype, device = x.shape[0], x.dtype, x.device
    groups, batch, size = h0.shape
    accumulator = _accumulator(dtype)
    hidden = h0.to(accumulator, copy=True, memory_format=torch.contiguous_format)
    cell_state = None if c0 is None else c0.to(accumulator, copy=True, memory_format=torch.contiguous_format)
    output = x.new_empty(rows, groups * size)
    gates = hidden_prev = cell_prev = None
    if save:
        gates = x.new_empty(rows, groups, CELLS[cell].saved * size)
        hidden_prev = x.new_empty(rows, groups, size)
        cell_prev = None if c0 is None else x.new_empty(rows, groups, size)
    if rows and size:
        gates_x, bias_hn = _project(cell, x, weight_ih, bias_ih, bias_hh)
        if resets is not None:
            zero_before_first_step(resets, reverse, (hidden, cell_state))
        exchange = x.new_empty(2, groups, batch, size)
        exchange[0] = hidden
        steps = rows // batch if batch_sizes is None else len(batch_sizes)
        offsets = _offsets(batch_sizes, device)
        scan = _Scan(cell, size, groups, batch, steps, dtype, device, tuple(reverse), offsets)
        tensors = (
            *(gates_x, _plain(weight_hh), _plain(bias_hn), offsets, _as_bytes(resets), exchange),
            *(hidden, cell_state, output, gates, hidden_prev, cell_prev),
        )
        with _on(device):
            scan.launch(forward_scan, tensors, steps, SAVE=save, WITH_RESETS=resets is not None)
    results = (output, hidden, cell_state, gates, hidden_prev, cell_prev)
    return tuple(None if result is None else result.to(dtype) for result in results)


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
    overwrite: bool,
) -> tuple[Tensor | None, ...]:
    """Back-propagate through a layer; see ``fastrnn.ops`` for shapes. Absent results are None."""
    rows, sources, input_size = x.shape
    groups, gate_size, size = weight_hh.shape
    dtype, device, accumulator = x.dtype, x.device, _accumulator(x.dtype)

    def state_gradient(tensor):
        if tensor is None:
            return x.new_zeros(groups, batch, size, dtype=accumulator)
        return tensor.to(accumulator, copy=True, memory_format=torch.contiguous_format)

    gates, hidden_prev, cell_prev = _plain(gates), _plain(hidden_prev), _plain(cell_prev)
    d_hidden = state_gradient(d_h_n)
    d_cell = None if cell_prev is None else state_gradient(d_c_n)
    # not in place of the gates: threads of a program may read a value again that another has replaced by then
    dgates = torch.empty_like(gates)
    if rows and size:
        steps = rows // batch if batch_sizes is None else len(batch_sizes)
        offsets = _offsets(batch_sizes, device)
        scan = _Scan(cell, size, groups, batch, steps, dtype, device, tuple(reverse), offsets)
        tensors = (
            *(gates, hidden_prev, cell_prev, _plain(d_output)),
            *(_plain(weight_hh), offsets, _as_bytes(resets), dgates, d_hidden, d_cell),
        )
        with _on(device):
            options = {"WITH_D_OUTPUT": d_output is not None, "WITH_RESETS": resets is not None}
            scan.launch(backward_scan, tensors, steps, **options)

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
    dc0 = None if d_cell is None else d_cell.to(dtype)
    return dx, d_weight_ih, d_bias_ih, d_weight_hh, d_bias_hh, None, d_hidden.to(dtype), dc0
