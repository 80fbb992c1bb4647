"""The time loops of layers whose step is not torch.nn's, and the packing of W_hh for them.

A step, for a block of rows:

    product   = W_hh (mask ⊙ h), normalized and scaled where that is asked for
    h', c'    = the cell's step on product + gates_x
    h, c      = keep ⊙ h + (1 - keep) ⊙ h', and so for c

A part is run by one thread: a normalization needs all units of a row.
"""

from numba import types

from . import numba_call as field
from .numba_option_cells import (
    blocks,
    combine,
    each_gru_output_backward,
    each_gru_reset,
    each_gru_reset_backward,
    make_backward_step,
    make_forward_step,
    mix_rows,
    normalize,
    normalize_backward,
    scale_rows,
    split_rows,
)
from .numba_scan import add_rows, copy_rows, panels_of, part_of, rows_at, zero_at_resets
from .numba_simd import advance, as_pointer, jit, lanes, load, store
from .numba_team import PACKING, take
from .numba_tile import WIDE, multiply_neighbours, neighbour_vectors, pack_lines, pack_rows


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


def make_packing(cell: str, reset_after: bool, backward: bool, zero, jit):
    gate_count, _ = blocks(cell, reset_after)

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


def make_forward_part(cell: str, reset_after: bool, norm: bool, zero, jit):
    gate_count, saved_count = blocks(cell, reset_after)
    step, is_lstm = make_forward_step(cell, reset_after, norm, jit), cell == "lstm"

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
                        each_gru_reset(
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


def make_backward_part(cell: str, reset_after: bool, norm: bool, zero, jit):
    gate_count, saved_count = blocks(cell, reset_after)
    step, is_lstm, is_gru = make_backward_step(cell, reset_after, norm, jit), cell == "lstm", cell == "gru"

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
                        each_gru_output_backward(
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
                        each_gru_reset_backward(
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
