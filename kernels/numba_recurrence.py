"""Layers whose step is not torch.nn's: layer normalization, peepholes, masks, zoneout, and others.

The threads of a team pack the weights, project the input and take parts (``numba_option_scan.py``); in the backward
pass they share out the products and sums over all rows (``numba_gradients.py``). This file builds the kernels and is
the Python side.
"""

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import zero_before_first_step
from . import numba_call as field
from .numba_compile import kernel_address, new_call
from .numba_gradients import Factors, make_products, scratch_size, sum_columns
from .numba_layer import (
    BLOCK_BYTES,
    WORK_PER_THREAD,
    Plan,
    copied,
    count_steps,
    make_backward_packing,
    make_parts,
    new_tensor,
    places,
    prepared,
    run_plan,
    split_batch,
)
from .numba_option_cells import blocks
from .numba_option_scan import make_backward_part, make_forward_packing, make_forward_part, make_projection
from .numba_scan import Layout
from .numba_simd import VECTOR_BYTES, named_jit
from .numba_team import BARRIER, PARTS_TAKEN, TICKET, leave, take, team_size, wait_for
from .numba_tile import WIDE, operands_of


def _factors(cell: str, reset_after: bool, norm: bool) -> Factors:
    """What products over all rows are formed of."""
    gates, saved = blocks(cell, reset_after)
    state_of_n = field.OPERAND if reset_after else field.OPERAND_N
    if norm:
        sides = (field.D_PRODUCT_IH, gates, field.D_PRODUCT_HH, gates, False)
    else:
        sides = (field.DGATES, saved, field.DGATES, saved, saved > gates)
    return Factors(*sides, field.OPERAND, state_of_n, with_biases=not norm)


def _build_forward(name: str, cell: str, reset_after: bool, norm: bool, dtype: torch.dtype):
    """The function to compile for the forward pass: what every thread of a team runs."""
    zero, jit = operands_of(dtype).stored, named_jit(name)
    packing = make_forward_packing(cell, reset_after, zero, jit)
    projection = make_projection(cell, reset_after, norm, zero, jit)
    run_part = make_forward_part(cell, reset_after, norm, zero, jit)

    def whole_layer(call):
        take(call, TICKET)
        team = team_size(call)
        packing(call)
        if team > 1:
            wait_for(call, BARRIER, team)
        projection(call)
        if team > 1:
            wait_for(call, BARRIER, 2 * team)
        part = take(call, PARTS_TAKEN)
        while part < call[field.PARTS]:
            run_part(call, part)
            part = take(call, PARTS_TAKEN)
        leave(call, team)

    return whole_layer


def _build_backward(name: str, cell: str, reset_after: bool, norm: bool, dtype: torch.dtype):
    """The same for the backward pass."""
    operands, jit, layout = operands_of(dtype), named_jit(name), Layout(*blocks(cell, reset_after))
    zero = operands.stored
    packing = make_backward_packing(layout, operands, jit)
    run_part = make_backward_part(cell, reset_after, norm, zero, jit)
    products = make_products(layout, operands, _factors(cell, reset_after, norm), jit)

    def whole_layer(call):
        thread, team = take(call, TICKET), team_size(call)
        packing(call, zero)
        if team > 1:
            wait_for(call, BARRIER, team)
        part = take(call, PARTS_TAKEN)
        while part < call[field.PARTS]:
            run_part(call, part)
            part = take(call, PARTS_TAKEN)
        if team > 1:
            wait_for(call, BARRIER, 2 * team)
        products(call, thread, team, zero)
        sum_columns(call, zero)
        leave(call, team)

    return whole_layer


@functools.cache
def kernel(cell: str, reset_after: bool, norm: bool, backward: bool, dtype: torch.dtype) -> int:
    """The address of a kernel for one pass, in float32 or float64."""
    variant = f"{'' if reset_after else '_reset_before'}{'_norm' * norm}"
    name = f"{cell}{variant}_recurrence_{'backward' if backward else 'forward'}_{str(dtype)[6:]}"
    build = _build_backward if backward else _build_forward
    return kernel_address(name, functools.partial(build, name, cell, reset_after, norm, dtype))


class Sizes(NamedTuple):
    """What a plan depends on."""

    cell: str
    reset_after: bool
    norm: bool
    peephole: bool
    backward: bool
    needed: bool  # forward: the reserve, backward: dx
    itemsize: int
    threads: int  # at most
    rows: int
    steps: int
    batch: int
    sources: int
    input_size: int
    hidden_size: int
    reverse: tuple[int, ...]


def _sums(cell: str, norm: bool, peephole: bool, size: int) -> Iterator[tuple[int, ...]]:
    """The rows of the sum table (``numba_call.py``): what parameters gain from every row that they scale or shift."""
    gates, saved = blocks(cell, True)
    if norm:
        # the gradient of the GRU's n on the hidden state's side stands apart, behind the others
        apart = saved - gates
        of_input = (field.D_BIAS_LN_IH, field.D_WEIGHT_LN_IH, gates)
        of_state = (field.D_BIAS_LN_HH, field.D_WEIGHT_LN_HH, gates)
        yield _sum(size, (field.DGATES, saved), (field.NORMALIZED_IH, gates), gates, of_input)
        yield _sum(size, (field.DGATES, saved), (field.NORMALIZED_HH, gates), gates - apart, of_state)
        if apart:
            yield _sum(size, (field.DGATES, saved), (field.NORMALIZED_HH, gates), 1, of_state, gates, gates - 1)
        if cell == "lstm":
            of_cell = (field.D_BIAS_LN_C, field.D_WEIGHT_LN_C, 1)
            yield _sum(size, (field.D_NORMALIZED_C, 1), (field.NORMALIZED_C, 1), 1, of_cell)
    if peephole:
        for gate, factors, result in (
            (0, field.CELL_PREV, field.D_WEIGHT_CI),
            (1, field.CELL_PREV, field.D_WEIGHT_CF),
            (3, field.NEW_CELL, field.D_WEIGHT_CO),
        ):
            yield _sum(size, (field.DGATES, saved), (factors, 1), 1, (field.UNUSED_SUM, result, 1), gate)


def _sum(size: int, values, factors, count: int, results, first: int = 0, first_result: int = 0) -> tuple[int, ...]:
    """A row of the sum table, from fields and numbers of blocks of the hidden size; factors stand as results do."""
    sums, products, width = results
    (values, values_width), (factors, factors_width) = values, factors
    of_values = values, values_width * size, first * size
    of_factors = factors, factors_width * size, first_result * size
    return *of_values, *of_factors, count * size, sums, products, width * size, first_result * size


@functools.lru_cache(maxsize=1024)
def _make_plan(sizes: Sizes, batch_sizes: Tensor | None = None) -> Plan:
    """The plan for a call; ``batch_sizes`` are given only if they differ from one another (then it is not cached)."""
    size, batch, directions = sizes.hidden_size, sizes.batch, len(sizes.reverse)
    gates, saved = blocks(sizes.cell, sizes.reset_after)
    gate_size, lanes = gates * size, VECTOR_BYTES // sizes.itemsize
    work = (2 if sizes.backward else 1) * sizes.rows * directions * gate_size * (size + sizes.input_size)
    threads = max(1, min(sizes.threads, work // WORK_PER_THREAD))
    chunks, _ = split_batch(threads, batch, sizes.reverse, gate_size * size, size, 1, sizes.itemsize, False)
    parts = make_parts(batch, chunks, sizes.reverse, batch_sizes)
    part_rows = max(end - first for _, _, first, end in parts)
    block_rows = min(max(6, min(96, BLOCK_BYTES // (gate_size * sizes.itemsize) // 6 * 6)), part_rows)

    values = [0] * field.RECURRENCE_TABLE
    values.extend(itertools.chain.from_iterable(parts))
    values[field.PARTS], values[field.PART_TABLE] = len(parts), field.RECURRENCE_TABLE
    values[field.BLOCK_ROWS], values[field.PACKED], values[field.EXAMPLES] = block_rows, 1, 1
    values[field.STEPS], values[field.ROWS], values[field.BATCH] = sizes.steps, sizes.rows, batch
    values[field.DIRECTIONS], values[field.SOURCES] = directions, sizes.sources
    values[field.INPUT_SIZE], values[field.HIDDEN_SIZE], values[field.STATE_SIZE] = sizes.input_size, size, size
    wide = WIDE * lanes

    def up(columns: int) -> int:
        return -(-columns // wide) * wide

    if sizes.backward:
        sums = list(_sums(sizes.cell, sizes.norm, sizes.peephole, size))
        values[field.SUMS], values[field.SUM_TABLE] = len(sums), len(values)
        values.extend(itertools.chain.from_iterable(sums))
        scratch = max(scratch_size(lanes), (3 * block_rows + 2) * size)
        arrays = {
            field.PANELS_HH: gate_size * up(size),
            field.PANELS_IH: gate_size * up(sizes.input_size) if sizes.needed else 0,
        }
        if sizes.norm:
            arrays |= dict.fromkeys((field.D_PRODUCT_IH, field.D_PRODUCT_HH), sizes.rows * gate_size)
            if sizes.cell == "lstm":
                arrays |= dict.fromkeys((field.NORMALIZED_C, field.D_NORMALIZED_C), sizes.rows * size)
        if sizes.peephole:
            arrays |= {field.NEW_CELL: sizes.rows * size, field.UNUSED_SUM: size}
    else:
        scratch = block_rows * (gate_size + 4 * size)
        # the rows of the GRU's n may be packed apart
        arrays = {field.PANELS_HH: (up(gate_size) + wide) * size, field.PANELS_IH: up(gate_size) * sizes.input_size}
        values[field.GATES_X_WIDTH] = (saved if sizes.needed else gates) * size
    values[field.SCRATCH_SIZE] = -(-scratch // lanes) * lanes
    regions = {field.SCRATCH: values[field.SCRATCH_SIZE] * max(len(parts), threads)}
    regions |= {place: directions * count for place, count in arrays.items()}
    return Plan(new_call(values), *places(regions, sizes.itemsize), threads, 1)


class Parameters(NamedTuple):
    """A layer's parameters, for D directions; None where absent. Both biases or none, so those of a normalization."""

    weight_ih: Tensor  # (D, G*H, I)
    bias_ih: Tensor | None  # (D, G*H), and so the following up to weight_ln_c
    weight_hh: Tensor  # (D, G*H, H)
    bias_hh: Tensor | None
    weight_ln_ih: Tensor | None = None
    bias_ln_ih: Tensor | None = None
    weight_ln_hh: Tensor | None = None
    bias_ln_hh: Tensor | None = None
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
    normalized_ih: Tensor | None  # (R, D, G*H)
    scale_ih: Tensor | None  # (R, D)
    normalized_hh: Tensor | None
    scale_hh: Tensor | None
    # what W_hh was multiplied with, and its rows of n, (R, D, H), where that is not hidden_prev
    operand: Tensor | None
    operand_n: Tensor | None

    def arrays(self) -> dict[int, Tensor | None]:
        """By field."""
        operand = self.hidden_prev if self.operand is None else self.operand
        return {
            **{field.GATES: self.gates, field.HIDDEN_PREV: self.hidden_prev, field.CELL_PREV: self.cell_prev},
            **{field.NORMALIZED_IH: self.normalized_ih, field.SCALE_IH: self.scale_ih},
            **{field.NORMALIZED_HH: self.normalized_hh, field.SCALE_HH: self.scale_hh},
            **{field.OPERAND: operand, field.OPERAND_N: operand if self.operand_n is None else self.operand_n},
        }


def _expect(name: str, tensor: Tensor | None, *shape: int) -> None:
    """Kernels read memory by the shapes that they are told."""
    if tensor is not None and tensor.shape != shape:
        raise RuntimeError(f"fastrnn: {name} should have the shape {shape}, got {tuple(tensor.shape)}")


def _check(gates: int, x, parameters: Parameters, masks: Masks, h0, c0, reverse, resets) -> None:
    rows, sources, input_size = x.shape
    directions, batch, size = h0.shape
    _expect("reverse", h0, len(reverse), batch, size)
    if directions % sources:
        raise RuntimeError(f"fastrnn: {directions} directions cannot share {sources} inputs")
    _expect("weight_ih", parameters.weight_ih, directions, gates * size, input_size)
    _expect("weight_hh", parameters.weight_hh, directions, gates * size, size)
    for name in ("bias_ih", "bias_hh", *Parameters._fields[4:8]):
        _expect(name, getattr(parameters, name), directions, gates * size)
    for name in Parameters._fields[8:]:
        _expect(name, getattr(parameters, name), directions, size)
    _expect("recurrent_mask", masks.recurrent_mask, directions, batch, size)
    for name in ("keep_hidden", "keep_cell"):
        keep = getattr(masks, name)
        _expect(name, keep, 1 if keep is not None and len(keep) == 1 else rows, directions, size)
    _expect("c0", c0, directions, batch, size)
    _expect("resets", resets, rows, directions)


def _arrays(x: Tensor, parameters: Parameters, masks: Masks, dtype: torch.dtype) -> dict[int, Tensor | None]:
    """What both passes are given, by field."""
    places = {
        **{"weight_ih": field.WEIGHT_IH, "weight_hh": field.WEIGHT_HH},
        **{"weight_ln_ih": field.WEIGHT_LN_IH, "weight_ln_hh": field.WEIGHT_LN_HH},
        **{"weight_ln_c": field.WEIGHT_LN_C, "bias_ln_c": field.BIAS_LN_C},
        **{"weight_ci": field.WEIGHT_CI, "weight_cf": field.WEIGHT_CF, "weight_co": field.WEIGHT_CO},
    }
    arrays = {place: prepared(getattr(parameters, name), dtype) for name, place in places.items()}
    places = (field.MASK, field.KEEP_HIDDEN, field.KEEP_CELL)
    arrays |= {place: prepared(mask, dtype) for place, mask in zip(places, masks, strict=True)}
    arrays[field.X] = prepared(x, dtype)
    return arrays


def _biases(cell: str, reset_after: bool, parameters: Parameters, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """All constants of the gates (D, G*H), and of those what r acts on in the GRU's n (D, H)."""
    directions, gate_size, size = parameters.weight_hh.shape
    total, hidden_side = like.new_zeros(directions, gate_size), like.new_zeros(directions, gate_size)
    for of_input, of_state in (
        (parameters.bias_ih, parameters.bias_hh),
        (parameters.bias_ln_ih, parameters.bias_ln_hh),
    ):
        if of_input is not None:
            total += of_input
            hidden_side += of_state
    if cell == "gru" and reset_after:
        total[:, : 2 * size] += hidden_side[:, : 2 * size]
        return total, hidden_side[:, 2 * size :].contiguous()
    return total.add_(hidden_side), None


def _run(cell, reset_after, backward, needed, x, parameters, masks, h0, batch_sizes, reverse, resets, arrays):
    dtype, batch, size = h0.dtype, *h0.shape[1:]
    rows, sources, input_size = x.shape
    steps, batch_sizes = count_steps(rows, batch, batch_sizes)
    norm = parameters.weight_ln_ih is not None
    sizes = Sizes(
        *(cell, reset_after, norm, parameters.weight_ci is not None, backward, needed, dtype.itemsize),
        *(torch.get_num_threads(), rows, steps, batch, sources, input_size, size, tuple(reverse)),
    )
    plan = _make_plan(sizes) if batch_sizes is None else _make_plan.__wrapped__(sizes, batch_sizes)
    strides = {
        place: 0 if keep is None or len(keep) == 1 else len(reverse) * size
        for place, keep in ((field.KEEP_HIDDEN_STRIDE, masks.keep_hidden), (field.KEEP_CELL_STRIDE, masks.keep_cell))
    }
    arrays |= _arrays(x, parameters, masks, dtype)
    arrays |= {field.BATCH_SIZES: batch_sizes, field.RESETS: None if resets is None else resets.contiguous()}
    run_plan(plan, kernel(cell, reset_after, norm, backward, dtype), arrays, strides)


def forward(
    cell: str,
    reset_after: bool,
    x: Tensor,
    parameters: Parameters,
    masks: Masks,
    h0: Tensor,
    c0: Tensor | None,
    batch_sizes: Tensor | None,
    reverse: tuple[int, ...],
    resets: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Reserve | None]:
    """Run a layer: x (rows, S, I) to output (rows, D*H), h_n, c_n, and with ``save`` the reserve.

    All tensors but ``resets`` (rows, D) and ``batch_sizes`` are of one dtype, float32 or float64.
    """
    dtype, rows = x.dtype, x.shape[0]
    directions, _, size = h0.shape
    gates, saved = blocks(cell, reset_after)
    _check(gates, x, parameters, masks, h0, c0, reverse, resets)
    hidden, cell_state = copied(h0, dtype), None if c0 is None else copied(c0, dtype)

    def new(width: int, wanted: bool = True) -> Tensor | None:
        return new_tensor(hidden, rows, directions, width) if wanted else None

    output, reserve = new_tensor(hidden, rows, directions * size), None
    if save:
        norm = parameters.weight_ln_ih is not None
        scales = [hidden.new_empty(rows, directions) if norm else None for _ in range(2)]
        normalized = [new(gates * size, norm) for _ in range(2)]
        reserve = Reserve(
            *(new(saved * size), new(size), new(size, c0 is not None)),
            *(normalized[0], scales[0], normalized[1], scales[1]),
            *(new(size, masks.recurrent_mask is not None), new(size, not reset_after)),
        )
    if resets is not None:
        zero_before_first_step(resets, reverse, (hidden, cell_state), batch_sizes)
    bias, bias_hn = _biases(cell, reset_after, parameters, hidden)
    arrays = {} if reserve is None else reserve.arrays()
    arrays |= {field.HIDDEN: hidden, field.CELL: cell_state, field.OUTPUT: output}
    arrays |= {field.GATES_X: reserve.gates if save else new(gates * size), field.BIAS: bias, field.BIAS_HN: bias_hn}
    _run(cell, reset_after, False, save, x, parameters, masks, hidden, batch_sizes, reverse, resets, arrays)
    return output, hidden, cell_state, reserve


def backward(
    cell: str,
    reset_after: bool,
    d_output: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    x: Tensor,
    parameters: Parameters,
    masks: Masks,
    reserve: Reserve,
    batch: int,
    batch_sizes: Tensor | None,
    reverse: tuple[int, ...],
    resets: Tensor | None,
    needs_x: bool,
    needs: Parameters,
    overwrite: bool,
) -> tuple[Tensor | None, Parameters, Tensor, Tensor | None]:
    """Gradients of x, of the parameters, of h0 and c0; ``needs`` holds a bool for every parameter.

    ``overwrite``: nobody will read the reserve again.
    """
    gates, hidden_prev, cell_prev = reserve[:3]
    _, directions, size = hidden_prev.shape
    dtype, norm = hidden_prev.dtype, parameters.weight_ln_ih is not None

    def of_parameter(name: str) -> Tensor | None:
        parameter = getattr(parameters, name)
        return None if parameter is None else gates.new_empty(parameter.shape)

    def state_gradient(gradient: Tensor | None) -> Tensor:
        return gates.new_zeros(directions, batch, size) if gradient is None else copied(gradient, dtype)

    dgates = gates if overwrite else new_tensor(gates, *gates.shape)
    d_hidden, d_cell = state_gradient(d_h_n), None if cell_prev is None else state_gradient(d_c_n)
    dx = new_tensor(gates, *x.shape) if needs_x else None
    d = Parameters(*(of_parameter(name) for name in Parameters._fields))
    arrays = reserve.arrays() | {
        **{field.D_OUTPUT: prepared(d_output, dtype), field.D_HIDDEN: d_hidden, field.D_CELL: d_cell},
        **{field.DGATES: dgates, field.DX: dx},
        **{field.D_WEIGHT_IH: d.weight_ih if needs.weight_ih else None},
        **{field.D_WEIGHT_HH: d.weight_hh if needs.weight_hh else None},
        # with normalization these are those of its shifts
        **{field.D_BIAS_IH: None if norm else d.bias_ih, field.D_BIAS_HH: None if norm else d.bias_hh},
        **{field.D_WEIGHT_LN_IH: d.weight_ln_ih, field.D_BIAS_LN_IH: d.bias_ln_ih},
        **{field.D_WEIGHT_LN_HH: d.weight_ln_hh, field.D_BIAS_LN_HH: d.bias_ln_hh},
        **{field.D_WEIGHT_LN_C: d.weight_ln_c, field.D_BIAS_LN_C: d.bias_ln_c},
        **{field.D_WEIGHT_CI: d.weight_ci, field.D_WEIGHT_CF: d.weight_cf, field.D_WEIGHT_CO: d.weight_co},
    }
    _run(cell, reset_after, True, needs_x, x, parameters, masks, d_hidden, batch_sizes, reverse, resets, arrays)
    if norm and d.bias_ih is not None:
        d = d._replace(bias_ih=d.bias_ln_ih.clone(), bias_hh=d.bias_ln_hh.clone())
    return dx, Parameters(*(g if needed else None for g, needed in zip(d, needs, strict=True))), d_hidden, d_cell
