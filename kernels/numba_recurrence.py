"""The time loop of layers whose step is not torch.nn's: layer normalization, peepholes, masks, zoneout, and others.

It is given the gates' share of the input for all rows, with all constants added (``fastrnn.recurrence``), and gives the
gradients of these; products over all time steps are torch's. A step, for a block of rows:

    product   = W_hh (mask ⊙ h), normalized and scaled where that is asked for
    h', c'    = the cell's step on product + gates_x
    h, c      = keep ⊙ h + (1 - keep) ⊙ h', and so for c

A part is run by one thread: a normalization needs all units of a row.
"""

import functools
import itertools
import math
from typing import NamedTuple

import torch
from numba import types
from torch import Tensor

from ..ops import zero_before_first_step
from . import numba_call as field
from .numba_cells import BACKWARD, FORWARD, sigmoid, tanh
from .numba_compile import kernel_address
from .numba_gradients import MANY_SUMS, MOST_SUM_ROWS, SUM_ROWS
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
from .numba_scan import LAYOUTS, add_rows, copy_rows, panels_of, part_of, rows_at, zero_at_resets
from .numba_simd import VECTOR_BYTES, advance, as_pointer, inline, jit, lanes, load, named_jit, store, sum_of
from .numba_team import BARRIER, PACKING, PARTS_TAKEN, TICKET, leave, take, team_size, wait_for
from .numba_tile import WIDE, multiply_neighbours, neighbour_vectors, pack_lines, pack_rows

EPSILON = 1e-5


@jit
def multiply(a, a_stride, rows, panels, depth, columns, out, out_stride, add):
    """out[r, c] (+)= sum_k a[r, k] * weight[c, k], from weights packed in panels of neighbouring columns."""
    wide = WIDE * lanes(out)
    for column in range(0, columns, wide):
        target = advance(out, column)
        multiply_neighbours(
            *(a, a_stride, 1, rows, advance(panels, column * depth), depth),
            *(target, out_stride, columns - column, target, out_stride, add),
        )


@jit
def multiply_back(a, a_stride, rows, panels, first, depth, all_depth, columns, out, out_stride, add):
    """out[r, c] (+)= sum_k a[r, k] * weight[first + k, c] over k < depth; panels hold lines of depth ``all_depth``."""
    vector = lanes(out)
    for column in range(0, columns, WIDE * vector):
        target, left = advance(out, column), columns - column
        lines = advance(panels, column * all_depth + first * neighbour_vectors(left, vector) * vector)
        multiply_neighbours(a, a_stride, 1, rows, lines, depth, target, out_stride, left, target, out_stride, add)


def each_vector(body):
    """A function that does body(*arguments, j, count) for the vectors of a row: (length of the row, lanes, *arguments).

    Whole vectors and the rest are apart: a constant count makes loads and stores plain ones, and what was stored under
    a mask is slow to read again.
    """

    def run(size, vector, *arguments):
        full = size - size % vector
        for j in range(0, full, vector):
            body(*arguments, j, vector)
        if full < size:
            body(*arguments, full, size - full)

    run.__qualname__ = f"each_vector.{body.__name__}"  # see named_jit
    return inline(run)


@inline
def _centre(source, target, mean, squares, j, count):
    store(target, j, count, load(source, j, count) - mean)
    # read again: lanes beyond the row's end are zero
    centred = load(target, j, count)
    return squares + centred * centred


@inline
def _scaled(target, scale, j, count):
    store(target, j, count, load(target, j, count) * scale)


_each_scaled = each_vector(_scaled)


@jit
def normalize(source, target, columns):
    """target = (source - mean) / deviation, for ``columns`` values; gives 1 / deviation."""
    vector = lanes(source)
    full = columns - columns % vector
    total = load(source, full, columns - full)
    for j in range(0, full, vector):
        total = total + load(source, j, vector)
    mean = sum_of(total) / columns
    squares = load(source, 0, 0)
    for j in range(0, full, vector):
        squares = _centre(source, target, mean, squares, j, vector)
    if full < columns:
        squares = _centre(source, target, mean, squares, full, columns - full)
    scale = 1.0 / math.sqrt(sum_of(squares) / columns + EPSILON)
    _each_scaled(columns, vector, target, scale)
    return scale


@inline
def _normalize_backward(normalized, scale, weight, gradient, target, mean, slope, j, count):
    d = load(gradient, j, count) * load(weight, j, count)
    store(target, j, count, (d - load(normalized, j, count) * slope - mean) * scale)


_each_normalize_backward = each_vector(_normalize_backward)


@jit
def normalize_backward(normalized, scale, weight, gradient, target, columns):
    """The gradient of ``normalize``'s source, from that of weight * target + bias; may be written over it."""
    vector = lanes(normalized)
    full = columns - columns % vector
    total = load(gradient, full, columns - full) * load(weight, full, columns - full)
    product = total * load(normalized, full, columns - full)
    for j in range(0, full, vector):
        d = load(gradient, j, vector) * load(weight, j, vector)
        total = total + d
        product = product + d * load(normalized, j, vector)
    mean, slope = sum_of(total) / columns, sum_of(product) / columns
    _each_normalize_backward(columns, vector, normalized, scale, weight, gradient, target, mean, slope)


@inline
def _scale(factors, source, target, j, count):
    store(target, j, count, load(factors, j, count) * load(source, j, count))


_each_scale = each_vector(_scale)


@jit
def scale_rows(factors, source, target, rows, columns):
    """target = factors ⊙ source, arrays of neighbouring rows."""
    _each_scale(rows * columns, lanes(target), factors, source, target)


@inline
def _mix(keep, old, new, target, j, count):
    share = load(keep, j, count)
    store(target, j, count, share * load(old, j, count) + (1.0 - share) * load(new, j, count))


_each_mix = each_vector(_mix)


@jit
def mix_rows(keep, keep_stride, old, new, target, rows, columns):
    """target = keep ⊙ old + (1 - keep) ⊙ new; rows of ``keep`` are ``keep_stride`` apart."""
    for row in range(rows):
        at = row * columns
        row_old, row_new, row_target = advance(old, at), advance(new, at), advance(target, at)
        _each_mix(columns, lanes(target), advance(keep, row * keep_stride), row_old, row_new, row_target)


@inline
def _split(keep, gradient, kept, j, count):
    share, d = load(keep, j, count), load(gradient, j, count)
    store(kept, j, count, share * d)
    store(gradient, j, count, (1.0 - share) * d)


_each_split = each_vector(_split)


@jit
def split_rows(keep, keep_stride, gradient, kept, rows, columns):
    """kept = keep ⊙ gradient, and gradient = (1 - keep) ⊙ gradient: the backward pass of ``mix_rows``."""
    for row in range(rows):
        at = row * columns
        shares = advance(keep, row * keep_stride)
        _each_split(columns, lanes(gradient), shares, advance(gradient, at), advance(kept, at))


@inline
def _combine(product, mask, masked, dh, direct, kept, keeps, j, count):
    d = load(product, j, count)
    if masked:
        d = d * load(mask, j, count)
    if direct:
        d = d + load(dh, j, count)
    if keeps:
        d = d + load(kept, j, count)
    store(dh, j, count, d)


_each_combine = each_vector(_combine)


@jit
def combine(product, mask, masked, dh, direct, kept, keeps, size):
    """dh = product ⊙ mask, and what reaches the old state past W_hh: ``dh`` where ``direct``, ``kept`` of a mix."""
    _each_combine(size, lanes(dh), product, mask, masked, dh, direct, kept, keeps)


@inline
def lstm_step(product, gates_x, weight_ci, weight_cf, weight_co, cell, new_cell, gates, size, peephole, save, j, count):
    """c' into ``new_cell``; o in the place of ``product``'s."""
    c = load(cell, j, count)
    i = load(product, j, count) + load(gates_x, j, count)
    f = load(product, size + j, count) + load(gates_x, size + j, count)
    # no masked loads of what is not there: the processor takes its time over an address of nothing
    if peephole:
        i, f = i + load(weight_ci, j, count) * c, f + load(weight_cf, j, count) * c
    i, f = sigmoid(i), sigmoid(f)
    g = tanh(load(product, 2 * size + j, count) + load(gates_x, 2 * size + j, count))
    c = f * c + i * g
    o = load(product, 3 * size + j, count) + load(gates_x, 3 * size + j, count)
    if peephole:
        o = o + load(weight_co, j, count) * c
    o = sigmoid(o)
    store(new_cell, j, count, c)
    store(product, 3 * size + j, count, o)
    if save:
        store(gates, j, count, i)
        store(gates, size + j, count, f)
        store(gates, 2 * size + j, count, g)
        store(gates, 3 * size + j, count, o)


@inline
def lstm_output(o, seen, weight, bias, hidden, norm, j, count):
    """h' from what its tanh sees: c', or c' normalized."""
    s = load(seen, j, count)
    if norm:
        s = s * load(weight, j, count) + load(bias, j, count)
    store(hidden, j, count, load(o, j, count) * tanh(s))


@inline
def lstm_new_cell(gates, cell_prev, new_cell, size, j, count):
    i, f, g = load(gates, j, count), load(gates, size + j, count), load(gates, 2 * size + j, count)
    store(new_cell, j, count, f * load(cell_prev, j, count) + i * g)


@inline
def lstm_output_backward(gates, seen, weight, bias, dh, d_output_gate, d_seen, size, norm, j, count):
    """The gradient of o before its sigmoid, and of what the tanh sees."""
    o, d, s = load(gates, 3 * size + j, count), load(dh, j, count), load(seen, j, count)
    if norm:
        s = s * load(weight, j, count) + load(bias, j, count)
    s = tanh(s)
    store(d_seen, j, count, d * o * (1.0 - s * s))
    store(d_output_gate, j, count, d * s * o * (1.0 - o))


@inline
def lstm_step_backward(
    gates, cell_prev, weight_ci, weight_cf, weight_co, d_new_cell, dc, dgates, size, peephole, j, count
):
    """dgates of i, f and g, that of o being there; ``dc``, the gradient of c' beside ``d_new_cell``, becomes c's."""
    i, f, g = load(gates, j, count), load(gates, size + j, count), load(gates, 2 * size + j, count)
    d = load(dc, j, count) + load(d_new_cell, j, count)
    if peephole:
        d = d + load(dgates, 3 * size + j, count) * load(weight_co, j, count)
    d_i = d * g * i * (1.0 - i)
    d_f = d * load(cell_prev, j, count) * f * (1.0 - f)
    store(dgates, j, count, d_i)
    store(dgates, size + j, count, d_f)
    store(dgates, 2 * size + j, count, d * i * (1.0 - g * g))
    d = d * f
    if peephole:
        d = d + d_i * load(weight_ci, j, count) + d_f * load(weight_cf, j, count)
    store(dc, j, count, d)


@inline
def gru_reset(product, gates_x, operand, reset, gates, size, save, j, count):
    """r ⊙ h into ``reset``; z in the place of ``product``'s."""
    r = sigmoid(load(product, j, count) + load(gates_x, j, count))
    z = sigmoid(load(product, size + j, count) + load(gates_x, size + j, count))
    store(reset, j, count, r * load(operand, j, count))
    store(product, size + j, count, z)
    if save:
        store(gates, j, count, r)
        store(gates, size + j, count, z)


@inline
def gru_output(product, gates_x, old, new, gates, size, save, j, count):
    """h' where the product of n is that of r ⊙ h."""
    n = tanh(load(product, 2 * size + j, count) + load(gates_x, 2 * size + j, count))
    z = load(product, size + j, count)
    store(new, j, count, (1.0 - z) * n + z * load(old, j, count))
    if save:
        store(gates, 2 * size + j, count, n)


@inline
def gru_output_backward(gates, hidden_prev, dh, dgates, size, j, count):
    """dgates of z and n; ``dh`` is left with the share that reaches the old state directly."""
    z, n, d = load(gates, size + j, count), load(gates, 2 * size + j, count), load(dh, j, count)
    store(dgates, size + j, count, d * (load(hidden_prev, j, count) - n) * z * (1.0 - z))
    store(dgates, 2 * size + j, count, d * (1.0 - z) * (1.0 - n * n))
    store(dh, j, count, d * z)


@inline
def gru_reset_backward(gates, operand, d_reset, dgates, size, j, count):
    """dgates of r, and ``d_reset``, the gradient of r ⊙ h, becomes that of h."""
    r, d = load(gates, j, count), load(d_reset, j, count)
    store(dgates, j, count, d * load(operand, j, count) * r * (1.0 - r))
    store(d_reset, j, count, d * r)


_each_lstm_step = each_vector(lstm_step)
_each_lstm_output = each_vector(lstm_output)
_each_lstm_new_cell = each_vector(lstm_new_cell)
_each_lstm_output_backward = each_vector(lstm_output_backward)
_each_lstm_step_backward = each_vector(lstm_step_backward)
_each_gru_reset = each_vector(gru_reset)
_each_gru_output = each_vector(gru_output)
_each_gru_output_backward = each_vector(gru_output_backward)
_each_gru_reset_backward = each_vector(gru_reset_backward)


def _blocks(cell: str, reset_after: bool) -> tuple[int, int]:
    """Blocks of the hidden size in a cell's gates, and in what the backward pass needs of them."""
    gates, saved = LAYOUTS[cell]
    return gates, saved if reset_after else gates


def _make_packing(cell: str, reset_after: bool, backward: bool, zero, jit):
    gate_count, _ = _blocks(cell, reset_after)

    @jit
    def pack(weight, depth, columns, panel, panels):
        """Panel number ``panel`` of a weight (columns, depth), or backward of one (depth, columns)."""
        vector = lanes(weight)
        left = columns - panel * WIDE * vector
        target = advance(panels, panel * WIDE * vector * depth)
        vectors = neighbour_vectors(left, vector)
        if backward:
            pack_lines(advance(weight, panel * WIDE * vector), columns, depth, vectors, left, target)
        else:
            pack_rows(advance(weight, panel * WIDE * vector * depth), depth, vectors, vector, left, vector, target)

    @jit
    def packing(call):
        """Pack every direction's W_hh, shared out among the threads."""
        size, directions = call[field.HIDDEN_SIZE], call[field.DIRECTIONS]
        gate_size = gate_count * size
        weight_hh, panels_hh = as_pointer(call[field.WEIGHT_HH], zero), as_pointer(call[field.PANELS_HH], zero)
        wide = WIDE * lanes(panels_hh)
        columns, depth = (size, gate_size) if backward else (gate_size, size)
        # forward, the rows of n have panels of their own where their product is
        first = columns if backward or reset_after else 2 * size
        items, items_n = panels_of(first, wide), panels_of(columns - first, wide)
        while True:
            item = take(call, PACKING)
            if item >= directions * (items + items_n):
                break
            direction, item = item // (items + items_n), item % (items + items_n)
            weight = advance(weight_hh, direction * gate_size * size)
            panels = advance(panels_hh, direction * (items + items_n) * wide * depth)
            if item < items:
                pack(weight, depth, first, item, panels)
            else:
                weight, panels = advance(weight, first * depth), advance(panels, items * wide * depth)
                pack(weight, depth, columns - first, item - items, panels)

    return packing


def _make_forward_step(cell: str, reset_after: bool, norm: bool, jit):
    """The cell's step for one row, and for the textbook's GRU the product within it."""
    if cell == "lstm":

        @jit
        def step(product, gates_x, bias_hn, operand, old, new, cell, new_cell, seen, parameters, gates, size, save):
            weight_ci, weight_cf, weight_co, weight_ln, bias_ln, peephole = parameters
            vector = lanes(product)
            _each_lstm_step(
                *(size, vector, product, gates_x, weight_ci, weight_cf, weight_co, cell, new_cell, gates),
                *(size, peephole, save),
            )
            if norm:
                normalize(new_cell, seen, size)
            else:
                seen = new_cell
            o = advance(product, 3 * size)
            _each_lstm_output(size, vector, o, seen, weight_ln, bias_ln, new, norm)

        return step
    if reset_after:
        step_forward = FORWARD[cell]

        @jit
        def step(product, gates_x, bias_hn, operand, old, new, cell, new_cell, seen, parameters, gates, size, save):
            vector = lanes(product)
            full = size - size % vector
            for j in range(0, full, vector):
                step_forward(product, gates_x, bias_hn, old, new, cell, gates, size, j, vector, save)
            if full < size:
                step_forward(product, gates_x, bias_hn, old, new, cell, gates, size, full, size - full, save)

        return step

    @jit
    def step(product, gates_x, bias_hn, operand, old, new, cell, new_cell, seen, parameters, gates, size, save):
        _each_gru_output(size, lanes(product), product, gates_x, old, new, gates, size, save)

    return step


def _make_forward_part(cell: str, reset_after: bool, norm: bool, zero, jit):
    gate_count, saved_count = _blocks(cell, reset_after)
    step, is_lstm = _make_forward_step(cell, reset_after, norm, jit), cell == "lstm"

    @jit
    def forward_part(call, part):
        direction, backwards, first, end = part_of(call, part)
        size, batch, directions, steps = (
            call[field.HIDDEN_SIZE],
            call[field.BATCH],
            call[field.DIRECTIONS],
            call[field.STEPS],
        )
        gate_size, saved_size, save = gate_count * size, saved_count * size, call[field.GATES] != 0
        block_rows = call[field.BLOCK_ROWS]
        wide = WIDE * lanes(as_pointer(call[field.OUTPUT], zero))
        # the product of r and z, or of all gates, then that of n
        first_columns = gate_size if reset_after else 2 * size
        panels = as_pointer(call[field.PANELS_HH], zero)
        all_panels = panels_of(first_columns, wide) + panels_of(gate_size - first_columns, wide)
        panels = advance(panels, direction * all_panels * wide * size)
        panels_n = advance(panels, panels_of(first_columns, wide) * wide * size)

        units, of_gates = direction * size, direction * gate_size
        bias_hn = advance(as_pointer(call[field.BIAS_HN], zero), units)
        weight_ln_hh = advance(as_pointer(call[field.WEIGHT_LN_HH], zero), of_gates)
        parameters = (
            advance(as_pointer(call[field.WEIGHT_CI], zero), units),
            advance(as_pointer(call[field.WEIGHT_CF], zero), units),
            advance(as_pointer(call[field.WEIGHT_CO], zero), units),
            advance(as_pointer(call[field.WEIGHT_LN_C], zero), units),
            advance(as_pointer(call[field.BIAS_LN_C], zero), units),
            call[field.WEIGHT_CI] != 0,
        )
        hidden = advance(as_pointer(call[field.HIDDEN], zero), direction * batch * size)
        cells = advance(as_pointer(call[field.CELL], zero), direction * batch * size)
        mask = advance(as_pointer(call[field.MASK], zero), direction * batch * size)
        keep_hidden = advance(as_pointer(call[field.KEEP_HIDDEN], zero), units)
        keep_cell = advance(as_pointer(call[field.KEEP_CELL], zero), units)
        keep_hidden_stride, keep_cell_stride = call[field.KEEP_HIDDEN_STRIDE], call[field.KEEP_CELL_STRIDE]
        gates_x, gates = as_pointer(call[field.GATES_X], zero), as_pointer(call[field.GATES], zero)
        output = as_pointer(call[field.OUTPUT], zero)
        hidden_prev, cell_prev = as_pointer(call[field.HIDDEN_PREV], zero), as_pointer(call[field.CELL_PREV], zero)
        all_normalized, scales = as_pointer(call[field.NORMALIZED], zero), as_pointer(call[field.SCALE], zero)
        product = advance(as_pointer(call[field.SCRATCH], zero), part * call[field.SCRATCH_SIZE])
        masked = advance(product, block_rows * gate_size)
        new_hidden = advance(masked, block_rows * size)
        new_cells = advance(new_hidden, block_rows * size)
        reset = advance(new_cells, block_rows * size)

        offset = call[field.ROWS] if backwards else types.int64(0)
        for index in range(steps):
            time = steps - 1 - index if backwards else index
            running = rows_at(call, time)
            if backwards:
                offset -= running
            stop = min(end, running)
            for block in range(first, stop, block_rows):
                rows = min(block_rows, stop - block)
                entry = (offset + block) * directions + direction
                old, old_cells = advance(hidden, block * size), advance(cells, block * size)
                if save:
                    copy_rows(old, size, advance(hidden_prev, entry * size), directions * size, rows, size)
                    if is_lstm:
                        copy_rows(old_cells, size, advance(cell_prev, entry * size), directions * size, rows, size)
                operand = old
                if call[field.MASK] != 0:
                    scale_rows(advance(mask, block * size), old, masked, rows, size)
                    operand = masked
                multiply(operand, size, rows, panels, size, first_columns, product, gate_size, False)
                if norm:
                    for row in range(rows):
                        here, line = entry + row * directions, advance(product, row * gate_size)
                        normalized = advance(all_normalized, here * gate_size) if save else line
                        scale = normalize(line, normalized, gate_size)
                        if save:
                            store(scales, here, 1, load(scales, 0, 0) + scale)
                        scale_rows(weight_ln_hh, normalized, line, 1, gate_size)
                if not reset_after:
                    for row in range(rows):
                        here = entry + row * directions
                        _each_gru_reset(
                            *(size, lanes(product), advance(product, row * gate_size)),
                            *(advance(gates_x, here * gate_size), advance(operand, row * size)),
                            *(advance(reset, row * size), advance(gates, here * saved_size), size, save),
                        )
                    target = advance(product, 2 * size)
                    multiply(reset, size, rows, panels_n, size, size, target, gate_size, False)
                new = new_hidden if call[field.KEEP_HIDDEN] != 0 else old
                new_cell = new_cells if call[field.KEEP_CELL] != 0 else old_cells
                for row in range(rows):
                    here = entry + row * directions
                    step(
                        *(advance(product, row * gate_size), advance(gates_x, here * gate_size), bias_hn),
                        *(advance(operand, row * size), advance(old, row * size), advance(new, row * size)),
                        *(advance(old_cells, row * size), advance(new_cell, row * size), reset, parameters),
                        *(advance(gates, here * saved_size), size, save),
                    )
                if call[field.KEEP_HIDDEN] != 0:
                    keep = advance(keep_hidden, (offset + block) * keep_hidden_stride)
                    mix_rows(keep, keep_hidden_stride, old, new, old, rows, size)
                if is_lstm and call[field.KEEP_CELL] != 0:
                    keep = advance(keep_cell, (offset + block) * keep_cell_stride)
                    mix_rows(keep, keep_cell_stride, old_cells, new_cell, old_cells, rows, size)
                copy_rows(old, size, advance(output, entry * size), directions * size, rows, size)
                if call[field.RESETS] != 0 and index + 1 < steps:
                    following = entry + (-directions if backwards else directions) * batch
                    zero_at_resets(call, following, rows, old, size, size)
                    if is_lstm:
                        zero_at_resets(call, following, rows, old_cells, size, size)
            if not backwards:
                offset += running

    return forward_part


def _make_backward_step(cell: str, reset_after: bool, norm: bool, jit):
    """The derivative of the cell's step for one row.

    ``dgates`` takes the gradient of gates_x; for the GRU, ``d_product`` that of the product. ``scratch`` has four times
    the hidden size.
    """
    if cell == "lstm":

        @jit
        def step(
            gates,
            hidden_prev,
            cell_prev,
            dh,
            dc,
            dgates,
            d_product,
            normalized_c,
            d_normalized_c,
            parameters,
            scratch,
            size,
        ):
            weight_ci, weight_cf, weight_co, weight_ln, bias_ln, peephole = parameters
            vector = lanes(dh)
            new_cell, d_new_cell = scratch, advance(scratch, size)
            _each_lstm_new_cell(size, vector, gates, cell_prev, new_cell, size)
            scale = 1.0
            if norm:
                scale = normalize(new_cell, normalized_c, size)
            seen, d_seen = (normalized_c, d_normalized_c) if norm else (new_cell, d_new_cell)
            d_o = advance(dgates, 3 * size)
            _each_lstm_output_backward(size, vector, gates, seen, weight_ln, bias_ln, dh, d_o, d_seen, size, norm)
            if norm:
                normalize_backward(normalized_c, scale, weight_ln, d_seen, d_new_cell, size)
            _each_lstm_step_backward(
                *(size, vector, gates, cell_prev, weight_ci, weight_cf, weight_co, d_new_cell, dc, dgates),
                *(size, peephole),
            )

        return step
    each = each_vector(BACKWARD[cell])
    if cell == "gru":

        @jit
        def step(
            gates,
            hidden_prev,
            cell_prev,
            dh,
            dc,
            dgates,
            d_product,
            normalized_c,
            d_normalized_c,
            parameters,
            scratch,
            size,
        ):
            each(size, lanes(dh), gates, hidden_prev, cell_prev, dh, dc, scratch, size)
            copy_rows(scratch, 0, dgates, 0, 1, 3 * size)
            copy_rows(scratch, 0, d_product, 0, 1, 2 * size)
            copy_rows(advance(scratch, 3 * size), 0, advance(d_product, 2 * size), 0, 1, size)

        return step

    @jit
    def step(
        gates,
        hidden_prev,
        cell_prev,
        dh,
        dc,
        dgates,
        d_product,
        normalized_c,
        d_normalized_c,
        parameters,
        scratch,
        size,
    ):
        each(size, lanes(dh), gates, hidden_prev, cell_prev, dh, dc, dgates, size)

    return step


def _make_backward_part(cell: str, reset_after: bool, norm: bool, zero, jit):
    gate_count, saved_count = _blocks(cell, reset_after)
    step, is_lstm, is_gru = _make_backward_step(cell, reset_after, norm, jit), cell == "lstm", cell == "gru"

    @jit
    def backward_part(call, part):
        direction, forwards, first, end = part_of(call, part)
        backwards = not forwards
        size, batch, directions, steps = (
            call[field.HIDDEN_SIZE],
            call[field.BATCH],
            call[field.DIRECTIONS],
            call[field.STEPS],
        )
        gate_size, saved_size, block_rows = gate_count * size, saved_count * size, call[field.BLOCK_ROWS]
        wide = WIDE * lanes(as_pointer(call[field.DGATES], zero))
        panels = as_pointer(call[field.PANELS_HH], zero)
        panels = advance(panels, direction * panels_of(size, wide) * wide * gate_size)

        units, of_gates = direction * size, direction * gate_size
        weight_ln_hh = advance(as_pointer(call[field.WEIGHT_LN_HH], zero), of_gates)
        parameters = (
            advance(as_pointer(call[field.WEIGHT_CI], zero), units),
            advance(as_pointer(call[field.WEIGHT_CF], zero), units),
            advance(as_pointer(call[field.WEIGHT_CO], zero), units),
            advance(as_pointer(call[field.WEIGHT_LN_C], zero), units),
            advance(as_pointer(call[field.BIAS_LN_C], zero), units),
            call[field.WEIGHT_CI] != 0,
        )
        masked, keeps_hidden, keeps_cell = (
            call[field.MASK] != 0,
            call[field.KEEP_HIDDEN] != 0,
            call[field.KEEP_CELL] != 0,
        )
        d_hidden = advance(as_pointer(call[field.D_HIDDEN], zero), direction * batch * size)
        d_cells = advance(as_pointer(call[field.D_CELL], zero), direction * batch * size)
        mask = advance(as_pointer(call[field.MASK], zero), direction * batch * size)
        keep_hidden = advance(as_pointer(call[field.KEEP_HIDDEN], zero), units)
        keep_cell = advance(as_pointer(call[field.KEEP_CELL], zero), units)
        keep_hidden_stride, keep_cell_stride = call[field.KEEP_HIDDEN_STRIDE], call[field.KEEP_CELL_STRIDE]
        gates, all_dgates = as_pointer(call[field.GATES], zero), as_pointer(call[field.DGATES], zero)
        all_d_product, d_output = as_pointer(call[field.D_PRODUCT], zero), as_pointer(call[field.D_OUTPUT], zero)
        hidden_prev, cell_prev = as_pointer(call[field.HIDDEN_PREV], zero), as_pointer(call[field.CELL_PREV], zero)
        all_normalized, scales = as_pointer(call[field.NORMALIZED], zero), as_pointer(call[field.SCALE], zero)
        normalized_c = as_pointer(call[field.NORMALIZED_C], zero)
        d_normalized_c = as_pointer(call[field.D_NORMALIZED_C], zero)
        d_operand = advance(as_pointer(call[field.SCRATCH], zero), part * call[field.SCRATCH_SIZE])
        kept_hidden = advance(d_operand, block_rows * size)
        kept_cells = advance(kept_hidden, block_rows * size)
        operand = advance(kept_cells, block_rows * size)
        scratch = advance(operand, block_rows * size)

        offset = call[field.ROWS] if backwards else types.int64(0)
        for index in range(steps):
            time = steps - 1 - index if backwards else index
            running = rows_at(call, time)
            if backwards:
                offset -= running
            stop = min(end, running)
            for block in range(first, stop, block_rows):
                rows = min(block_rows, stop - block)
                entry = (offset + block) * directions + direction
                dh, dc = advance(d_hidden, block * size), advance(d_cells, block * size)
                block_mask = advance(mask, block * size)
                if call[field.D_OUTPUT] != 0:
                    add_rows(advance(d_output, entry * size), directions * size, dh, size, rows, size)
                if keeps_hidden:
                    keep = advance(keep_hidden, (offset + block) * keep_hidden_stride)
                    split_rows(keep, keep_hidden_stride, dh, kept_hidden, rows, size)
                if is_lstm and keeps_cell:
                    keep = advance(keep_cell, (offset + block) * keep_cell_stride)
                    split_rows(keep, keep_cell_stride, dc, kept_cells, rows, size)
                dgates = advance(all_dgates, entry * gate_size)
                d_product = advance(all_d_product, entry * gate_size)
                stride = directions * gate_size
                if reset_after:
                    for row in range(rows):
                        here = entry + row * directions
                        row_dgates, row_d_product = advance(dgates, row * stride), advance(d_product, row * stride)
                        step(
                            *(advance(gates, here * saved_size), advance(hidden_prev, here * size)),
                            *(advance(cell_prev, here * size), advance(dh, row * size), advance(dc, row * size)),
                            *(row_dgates, row_d_product),
                            *(advance(normalized_c, here * size), advance(d_normalized_c, here * size)),
                            *(parameters, scratch, size),
                        )
                        if norm:
                            scale = scales[here]
                            normalized = advance(all_normalized, here * gate_size)
                            gradient = row_d_product if is_gru else row_dgates
                            normalize_backward(normalized, scale, weight_ln_hh, gradient, row_d_product, gate_size)
                    multiply_back(
                        *(d_product, stride, rows, panels, 0, gate_size, gate_size, size, d_operand, size, False)
                    )
                else:
                    for row in range(rows):
                        here = entry + row * directions
                        _each_gru_output_backward(
                            *(size, lanes(dh), advance(gates, here * saved_size), advance(hidden_prev, here * size)),
                            *(advance(dh, row * size), advance(dgates, row * stride), size),
                        )
                    of_n = advance(dgates, 2 * size)
                    multiply_back(of_n, stride, rows, panels, 2 * size, size, gate_size, size, d_operand, size, False)
                    copy_rows(advance(hidden_prev, entry * size), directions * size, operand, size, rows, size)
                    if masked:
                        scale_rows(block_mask, operand, operand, rows, size)
                    for row in range(rows):
                        here = entry + row * directions
                        _each_gru_reset_backward(
                            *(size, lanes(dh), advance(gates, here * saved_size), advance(operand, row * size)),
                            *(advance(d_operand, row * size), advance(dgates, row * stride), size),
                        )
                    multiply_back(dgates, stride, rows, panels, 0, 2 * size, gate_size, size, d_operand, size, True)
                combine(d_operand, block_mask, masked, dh, is_gru, kept_hidden, keeps_hidden, rows * size)
                if is_lstm and keeps_cell:
                    add_rows(kept_cells, size, dc, size, rows, size)
                if call[field.RESETS] != 0:
                    zero_at_resets(call, entry, rows, dh, size, size)
                    if is_lstm:
                        zero_at_resets(call, entry, rows, dc, size, size)
            if not backwards:
                offset += running

    return backward_part


def _build(name: str, cell: str, reset_after: bool, norm: bool, backward: bool, dtype: torch.dtype):
    """The function to compile: what every thread of a team runs."""
    zero = types.float64(0) if dtype == torch.float64 else types.float32(0)
    jit = named_jit(name)
    packing = _make_packing(cell, reset_after, backward, zero, jit)
    make_part = _make_backward_part if backward else _make_forward_part
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
    gates, _ = _blocks(cell, reset_after)
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
    gates, saved = _blocks(cell, reset_after)
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
        zero_before_first_step(resets, reverse, (hidden, cell_state))
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
    """sum over rows of gradients[r, d, n] * values[r, d, k], (D, N, K), in the parts of ``numba_gradients``."""
    rows, at_once = len(gradients), SUM_ROWS
    while at_once < MOST_SUM_ROWS and rows > MANY_SUMS * at_once:
        at_once *= 2
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
    count, _ = _blocks(cell, reset_after)

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
