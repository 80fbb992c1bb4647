"""The time loop of layers whose step is not torch.nn's: layer normalization, peepholes, masks, zoneout, and others.

It is given the gates' share of the input for all rows, with all constants added (``fastrnn.recurrence``), and gives the
gradients of these; products over all time steps are torch's. This file builds the kernels from
``numba_option_scan.py`` and is the Python side.
"""

import functools
import itertools
from typing import NamedTuple

import torch
from numba import types
from torch import Tensor

from ..ops import zero_before_first_step
from . import numba_call as field
from .numba_compile import kernel_address
from .numba_gradients import MOST_SUM_ROWS, SUM_ROWS
from .numba_layer import (
    BLOCK_BYTES,
    WORK_PER_THREAD,
    Plan,
    copied,
    count_steps,
    make_parts,
    new_tensor,
    prepared,
    run_plan,
    split_batch,
)
from .numba_option_cells import blocks
from .numba_option_scan import make_backward_part, make_forward_part, make_packing
from .numba_simd import VECTOR_BYTES, named_jit
from .numba_team import BARRIER, PARTS_TAKEN, TICKET, leave, take, team_size, wait_for
from .numba_tile import WIDE


def _build(name: str, cell: str, reset_after: bool, norm: bool, backward: bool, dtype: torch.dtype):
    """The function to compile: what every thread of a team runs."""
    zero = types.float64(0) if dtype == torch.float64 else types.float32(0)
    jit = named_jit(name)
    packing = make_packing(cell, reset_after, backward, zero, jit)
    make_part = make_backward_part if backward else make_forward_part
    run_part = make_part(cell, reset_after, norm, zero, jit)

    def whole_loop(call):
        take(call, TICKET)
        team = team_size(call)
        packing(call)
        if team > 1:
            wait_for(call, BARRIER, team)
        part = take(call, PARTS_TAKEN)
        while part < call[field.PARTS]:
            run_part(call, part)
            part = take(call, PARTS_TAKEN)
        leave(call, team)

    return whole_loop


@functools.cache
def kernel(cell: str, reset_after: bool, norm: bool, backward: bool, dtype: torch.dtype) -> int:
    """The address of a time loop's kernel for one pass, in float32 or float64."""
    variant = f"{'' if reset_after else '_reset_before'}{'_norm' * norm}"
    name = f"{cell}{variant}_recurrence_{'backward' if backward else 'forward'}_{str(dtype)[6:]}"
    return kernel_address(name, functools.partial(_build, name, cell, reset_after, norm, backward, dtype))


class Sizes(NamedTuple):
    """What a plan depends on."""

    gates: int
    backward: bool
    itemsize: int
    threads: int  # at most
    rows: int
    steps: int
    batch: int
    hidden_size: int
    reverse: tuple[int, ...]


@functools.lru_cache(maxsize=1024)
def _make_plan(sizes: Sizes, batch_sizes: Tensor | None = None) -> Plan:
    """The plan for a call; ``batch_sizes`` are given only if they differ from one another (then it is not cached)."""
    size, batch, directions = sizes.hidden_size, sizes.batch, len(sizes.reverse)
    gate_size, lanes = sizes.gates * size, VECTOR_BYTES // sizes.itemsize
    threads = max(1, min(sizes.threads, sizes.rows * directions * gate_size * size // WORK_PER_THREAD))
    chunks, _ = split_batch(threads, batch, sizes.reverse, gate_size * size, size, 1, sizes.itemsize, False)
    parts = make_parts(batch, chunks, sizes.reverse, batch_sizes)
    threads = min(threads, len(parts))
    part_rows = max(end - first for _, _, first, end in parts)
    block_rows = min(max(6, min(96, BLOCK_BYTES // (gate_size * sizes.itemsize) // 6 * 6)), part_rows)

    values = [0] * field.RECURRENCE_TABLE
    values.extend(itertools.chain.from_iterable(parts))
    values[field.PARTS], values[field.PART_TABLE], values[field.BLOCK_ROWS] = (
        len(parts),
        field.RECURRENCE_TABLE,
        block_rows,
    )
    values[field.STEPS], values[field.ROWS], values[field.BATCH] = sizes.steps, sizes.rows, batch
    values[field.DIRECTIONS], values[field.HIDDEN_SIZE] = directions, size
    # rows of a vector more than needed: what is left of a panel of neighbours is padded
    scratch = 4 * (block_rows + 1) * size if sizes.backward else block_rows * (gate_size + 4 * size)
    values[field.SCRATCH_SIZE] = -(-scratch // lanes) * lanes
    wide = WIDE * lanes
    panels = -(-size // wide) * wide * gate_size if sizes.backward else (-(-gate_size // wide) + 1) * wide * size
    regions, offset = [], 0
    for place, count in (
        (field.SCRATCH, values[field.SCRATCH_SIZE] * len(parts)),
        (field.PANELS_HH, directions * panels),
    ):
        regions.append((place, offset))
        offset += -(-count * sizes.itemsize // 64) * 64
    return Plan(tuple(values), tuple(regions), offset, threads, 1)


class Parameters(NamedTuple):
    """What the time loop is given besides gates_x and the initial state; None where absent."""

    weight_hh: Tensor  # (D, G*H, H)
    bias_hn: Tensor | None = None  # (D, H), of the GRU with reset_after
    weight_ln_hh: Tensor | None = None  # (D, G*H)
    weight_ln_c: Tensor | None = None  # (D, H), and so the following
    bias_ln_c: Tensor | None = None
    weight_ci: Tensor | None = None
    weight_cf: Tensor | None = None
    weight_co: Tensor | None = None


class Masks(NamedTuple):
    """See ``reference.Extras``."""

    recurrent_mask: Tensor | None
    keep_hidden: Tensor | None
    keep_cell: Tensor | None


class Reserve(NamedTuple):
    """What the backward pass needs of the forward pass."""

    gates: Tensor  # (R, D, saved * H)
    hidden_prev: Tensor  # (R, D, H)
    cell_prev: Tensor | None
    normalized: Tensor | None  # (R, D, G*H)
    scale: Tensor | None  # (R, D)


def _expect(name: str, tensor: Tensor | None, *shape: int) -> None:
    """Kernels read memory by the shapes that they are told."""
    if tensor is not None and tensor.shape != shape:
        raise RuntimeError(f"fastrnn: {name} should have the shape {shape}, got {tuple(tensor.shape)}")


def _arrays(parameters: Parameters, masks: Masks, dtype: torch.dtype) -> dict[int, Tensor | None]:
    """What both passes are given, by field."""
    places = (
        *(field.WEIGHT_HH, field.BIAS_HN, field.WEIGHT_LN_HH, field.WEIGHT_LN_C, field.BIAS_LN_C),
        *(field.WEIGHT_CI, field.WEIGHT_CF, field.WEIGHT_CO, field.MASK, field.KEEP_HIDDEN, field.KEEP_CELL),
    )
    tensors = (prepared(tensor, dtype) for tensor in (*parameters, *masks))
    return dict(zip(places, tensors, strict=True))


def _run(cell, reset_after, backward, dtype, rows, batch, batch_sizes, reverse, size, masks, arrays) -> None:
    gates, _ = blocks(cell, reset_after)
    steps, batch_sizes = count_steps(rows, batch, batch_sizes)
    itemsize = 8 if dtype == torch.float64 else 4
    sizes = Sizes(gates, backward, itemsize, torch.get_num_threads(), rows, steps, batch, size, tuple(reverse))
    plan = _make_plan(sizes) if batch_sizes is None else _make_plan.__wrapped__(sizes, batch_sizes)
    values = list(plan.values)
    for place, keep in (
        (field.KEEP_HIDDEN_STRIDE, masks.keep_hidden),
        (field.KEEP_CELL_STRIDE, masks.keep_cell),
    ):
        values[place] = 0 if keep is None or len(keep) == 1 else len(reverse) * size
    norm = arrays[field.WEIGHT_LN_HH] is not None
    arrays[field.BATCH_SIZES] = batch_sizes
    run_plan(plan._replace(values=tuple(values)), kernel(cell, reset_after, norm, backward, dtype), arrays)


def forward(
    cell: str,
    reset_after: bool,
    gates_x: Tensor,
    parameters: Parameters,
    masks: Masks,
    h0: Tensor,
    c0: Tensor | None,
    batch_sizes: Tensor | None,
    reverse: tuple[int, ...],
    resets: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Reserve | None]:
    """The time loop: gates_x (rows, D, G*H) to output (rows, D*H), h_n, c_n, and with ``save`` the reserve.

    All tensors but ``resets`` (rows, D) and ``batch_sizes`` are of one dtype, float32 or float64.
    """
    dtype, rows = gates_x.dtype, gates_x.shape[0]
    directions, batch, size = h0.shape
    gates, saved = blocks(cell, reset_after)
    _expect("gates_x", gates_x, rows, directions, gates * size)
    _expect("weight_hh", parameters.weight_hh, directions, gates * size, size)
    _expect("weight_ln_hh", parameters.weight_ln_hh, directions, gates * size)
    for name in ("bias_hn", *Parameters._fields[3:]):
        _expect(name, getattr(parameters, name), directions, size)
    _expect("recurrent_mask", masks.recurrent_mask, directions, batch, size)
    for name in ("keep_hidden", "keep_cell"):
        keep = getattr(masks, name)
        _expect(name, keep, 1 if keep is not None and len(keep) == 1 else rows, directions, size)
    _expect("c0", c0, directions, batch, size)
    _expect("resets", resets, rows, directions)

    hidden, cell_state = copied(h0, dtype), None if c0 is None else copied(c0, dtype)
    output, reserve = new_tensor(hidden, rows, directions * size), None
    if save:
        norm = parameters.weight_ln_hh is not None
        reserve = Reserve(
            new_tensor(hidden, rows, directions, saved * size),
            new_tensor(hidden, rows, directions, size),
            None if c0 is None else new_tensor(hidden, rows, directions, size),
            new_tensor(hidden, rows, directions, gates * size) if norm else None,
            hidden.new_empty(rows, directions) if norm else None,
        )
    if resets is not None:
        resets = resets.contiguous()
        zero_before_first_step(resets, reverse, (hidden, cell_state), batch_sizes)
    arrays = _arrays(parameters, masks, dtype)
    arrays |= {field.GATES_X: prepared(gates_x, dtype), field.HIDDEN: hidden, field.CELL: cell_state}
    arrays |= {field.OUTPUT: output, field.RESETS: resets}
    if cell == "gru" and reset_after and parameters.bias_hn is None:
        arrays[field.BIAS_HN] = hidden.new_zeros(directions, size)
    if save:
        arrays |= {field.GATES: reserve.gates, field.HIDDEN_PREV: reserve.hidden_prev, field.SCALE: reserve.scale}
        arrays |= {field.CELL_PREV: reserve.cell_prev, field.NORMALIZED: reserve.normalized}
    _run(cell, reset_after, False, dtype, rows, batch, batch_sizes, reverse, size, masks, arrays)
    return output, hidden, cell_state, reserve


def _operands(hidden_prev: Tensor, mask: Tensor | None, batch: int, batch_sizes: Tensor | None) -> Tensor:
    """What W_hh was multiplied with, (rows, D, H)."""
    if mask is None:
        return hidden_prev
    by_sequence = mask.transpose(0, 1)
    if batch_sizes is None:
        return (hidden_prev.unflatten(0, (-1, batch)) * by_sequence).flatten(0, 1)
    return hidden_prev * torch.cat([by_sequence[:count] for count in batch_sizes.tolist()])


def _sum_of_products(gradients: Tensor, values: Tensor) -> Tensor:
    """sum over rows of gradients[r, d, n] * values[r, d, k], (D, N, K), in parts as in ``numba_gradients``."""
    rows = len(gradients)
    # no more calls than that needs: each of them starts and ends torch's threads
    at_once = max(SUM_ROWS, min(MOST_SUM_ROWS, rows // 16))
    gradients, values = gradients.permute(1, 2, 0), values.transpose(0, 1)
    total = torch.bmm(gradients[:, :, :at_once], values[:, :at_once])
    for begin in range(at_once, rows, at_once):
        # not baddbmm: it goes on adding up one product after the other
        total += torch.bmm(gradients[:, :, begin : begin + at_once], values[:, begin : begin + at_once])
    return total


def backward(
    cell: str,
    reset_after: bool,
    d_output: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    parameters: Parameters,
    masks: Masks,
    reserve: Reserve,
    batch: int,
    batch_sizes: Tensor | None,
    reverse: tuple[int, ...],
    resets: Tensor | None,
) -> tuple[Tensor, Parameters, Tensor, Tensor | None]:
    """Gradients of gates_x, of the parameters, of h0 and c0."""
    gates, hidden_prev, cell_prev, normalized, scale = reserve
    rows, directions, size = hidden_prev.shape
    dtype, norm = hidden_prev.dtype, normalized is not None
    count, _ = blocks(cell, reset_after)

    def state_gradient(gradient: Tensor | None) -> Tensor:
        return gates.new_zeros(directions, batch, size) if gradient is None else copied(gradient, dtype)

    d_hidden, d_cell = state_gradient(d_h_n), None if cell_prev is None else state_gradient(d_c_n)
    d_gates_x = new_tensor(gates, rows, directions, count * size)
    apart = norm or (cell == "gru" and reset_after)
    d_product = new_tensor(gates, rows, directions, count * size) if apart else d_gates_x
    normalized_c = d_normalized_c = None
    if norm and cell_prev is not None:
        normalized_c, d_normalized_c = (new_tensor(gates, rows, directions, size) for _ in range(2))
    arrays = _arrays(parameters, masks, dtype)
    arrays |= {field.GATES: gates, field.HIDDEN_PREV: hidden_prev, field.CELL_PREV: cell_prev}
    arrays |= {field.NORMALIZED: normalized, field.SCALE: scale}
    arrays |= {field.D_OUTPUT: prepared(d_output, dtype), field.D_HIDDEN: d_hidden, field.D_CELL: d_cell}
    arrays |= {field.DGATES: d_gates_x, field.D_PRODUCT: d_product}
    arrays |= {field.NORMALIZED_C: normalized_c, field.D_NORMALIZED_C: d_normalized_c}
    arrays |= {field.RESETS: None if resets is None else resets.contiguous()}
    _run(cell, reset_after, True, dtype, rows, batch, batch_sizes, reverse, size, masks, arrays)

    operands = _operands(hidden_prev, masks.recurrent_mask, batch, batch_sizes)
    if reset_after:
        d_weight_hh = _sum_of_products(d_product, operands)
    else:
        of_n = _sum_of_products(d_gates_x[..., 2 * size :], operands * gates[..., :size])
        d_weight_hh = torch.cat([_sum_of_products(d_gates_x[..., : 2 * size], operands), of_n], 1)
    gradients = {"weight_hh": d_weight_hh}
    d_hn = d_gates_x[..., 2 * size :] * gates[..., :size] if cell == "gru" and reset_after else None
    if parameters.bias_hn is not None:
        gradients["bias_hn"] = d_hn.sum(0)
    if norm:
        if d_hn is None:
            gradients["weight_ln_hh"] = (d_gates_x * normalized).sum(0)
        else:
            of_r_and_z = (d_gates_x[..., : 2 * size] * normalized[..., : 2 * size]).sum(0)
            gradients["weight_ln_hh"] = torch.cat([of_r_and_z, (d_hn * normalized[..., 2 * size :]).sum(0)], -1)
    if normalized_c is not None:
        gradients["weight_ln_c"], gradients["bias_ln_c"] = (d_normalized_c * normalized_c).sum(0), d_normalized_c.sum(0)
    if parameters.weight_ci is not None:
        d_i, d_f, _, d_o = d_gates_x.chunk(4, -1)
        i, f, g, _ = gates.chunk(4, -1)
        gradients["weight_ci"], gradients["weight_cf"] = (d_i * cell_prev).sum(0), (d_f * cell_prev).sum(0)
        gradients["weight_co"] = (d_o * (f * cell_prev + i * g)).sum(0)
    return d_gates_x, Parameters(**gradients), d_hidden, d_cell
