"""A layer whose step is not torch.nn's: the packing of its weights, its projection, and its time loops.

First, for all rows:

    gates_x   = W_ih x, normalized and scaled where that is asked for, and all biases

Then a step, for a block of rows:

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
    each_scaled_and_shifted,
    make_backward_step,
    make_forward_step,
    mix_rows,
    normalize,
    normalize_backward,
    scale_row,
    split_rows,
)
from .numba_scan import add_rows, copy_rows, panels_of, part_of, rows_at, zero_at_resets
from .numba_simd import advance, as_pointer, jit, lanes, load, store
from .numba_team import PACKING, PROJECTING, take
from .numba_tile import WIDE, multiply_neighbours, neighbour_vectors, pack_rows

# Rows of one item of the projection.
PROJECTED_ROWS = 48


@jit
def multiply(a, a_stride, rows, panels, depth, columns, out, out_stride, addend, add):
    """out[r, c] = sum_k a[r, k] * weight[c, k] (+ addend[c]), from weights packed in panels of neighbouring columns."""
    wide = WIDE * lanes(out)
    for column in range(0, columns, wide):
        multiply_neighbours(
            *(a, a_stride, 1, rows, advance(panels, column * depth), depth),
            *(advance(out, column), out_stride, columns - column, advance(addend, column), 0, add, False),
        )


@jit
def multiply_back(a, a_stride, rows, panels, first, depth, all_depth, columns, out, out_stride, add):
    """out[r, c] (+)= sum_k a[r, k] * weight[first + k, c] over k < depth; panels hold lines of depth ``all_depth``."""
    vector = lanes(out)
    for column in range(0, columns, WIDE * vector):
        target, left = advance(out, column), columns - column
        lines = advance(panels, column * all_depth + first * neighbour_vectors(left, vector) * vector)
        multiply_neighbours(
            a, a_stride, 1, rows, lines, depth, target, out_stride, left, target, out_stride, add, False
        )


def make_forward_packing(cell: str, reset_after: bool, zero, jit):
    gate_count, _ = blocks(cell, reset_after)

    @jit
    def pack(weight, depth, columns, panel, panels):
        """Panel number ``panel`` of a weight (columns, depth)."""
        vector = lanes(weight)
        left = columns - panel * WIDE * vector
        source, target = advance(weight, panel * WIDE * vector * depth), advance(panels, panel * WIDE * vector * depth)
        pack_rows(source, depth, neighbour_vectors(left, vector), vector, left, vector, target)

    @jit
    def packing(call):
        """Pack every direction's W_ih and W_hh, shared out among the threads."""
        size, input_size, directions = call[field.HIDDEN_SIZE], call[field.INPUT_SIZE], call[field.DIRECTIONS]
        gate_size = gate_count * size
        weight_ih, panels_ih = as_pointer(call[field.WEIGHT_IH], zero), as_pointer(call[field.PANELS_IH], zero)
        weight_hh, panels_hh = as_pointer(call[field.WEIGHT_HH], zero), as_pointer(call[field.PANELS_HH], zero)
        wide = WIDE * lanes(panels_hh)
        # the rows of n have panels of their own where their product is
        first = gate_size if reset_after else 2 * size
        items_ih, items, items_n = (
            panels_of(gate_size, wide),
            panels_of(first, wide),
            panels_of(gate_size - first, wide),
        )
        per_direction = items_ih + items + items_n
        while True:
            item = take(call, PACKING)
            if item >= directions * per_direction:
                break
            direction, item = item // per_direction, item % per_direction
            if item < items_ih:
                weight = advance(weight_ih, direction * gate_size * input_size)
                panels = advance(panels_ih, direction * items_ih * wide * input_size)
                pack(weight, input_size, gate_size, item, panels)
                continue
            item -= items_ih
            weight = advance(weight_hh, direction * gate_size * size)
            panels = advance(panels_hh, direction * (items + items_n) * wide * size)
            if item < items:
                pack(weight, size, first, item, panels)
            else:
                weight, panels = advance(weight, first * size), advance(panels, items * wide * size)
                pack(weight, size, gate_size - first, item - items, panels)

    return packing


def make_projection(cell: str, reset_after: bool, norm: bool, zero, jit):
    gate_count, _ = blocks(cell, reset_after)

    @jit
    def projection(call):
        """gates_x of all rows, shared out among the threads."""
        size, input_size, rows = call[field.HIDDEN_SIZE], call[field.INPUT_SIZE], call[field.ROWS]
        directions, sources = call[field.DIRECTIONS], call[field.SOURCES]
        gate_size, width = gate_count * size, call[field.GATES_X_WIDTH]
        x, gates_x, bias = (
            as_pointer(call[field.X], zero),
            as_pointer(call[field.GATES_X], zero),
            as_pointer(call[field.BIAS], zero),
        )
        panels_ih, weight_ln_ih = as_pointer(call[field.PANELS_IH], zero), as_pointer(call[field.WEIGHT_LN_IH], zero)
        all_normalized, scales = as_pointer(call[field.NORMALIZED_IH], zero), as_pointer(call[field.SCALE_IH], zero)
        panel_size = panels_of(gate_size, WIDE * lanes(x)) * WIDE * lanes(x) * input_size
        while True:
            item = take(call, PROJECTING)
            first, direction = item // directions * PROJECTED_ROWS, item % directions
            if first >= rows:
                break
            count = min(PROJECTED_ROWS, rows - first)
            source = advance(x, (first * sources + direction * sources // directions) * input_size)
            entry = first * directions + direction
            target, own_bias = advance(gates_x, entry * width), advance(bias, direction * gate_size)
            multiply(
                *(source, sources * input_size, count, advance(panels_ih, direction * panel_size), input_size),
                *(gate_size, target, directions * width, own_bias, not norm),
            )
            if norm:
                weight = advance(weight_ln_ih, direction * gate_size)
                for row in range(count):
                    here, line = entry + row * directions, advance(target, row * directions * width)
                    normalized = advance(all_normalized, here * gate_size) if call[field.GATES] != 0 else line
                    scale = normalize(line, normalized, gate_size)
                    if call[field.GATES] != 0:
                        store(scales, here, 1, load(scales, 0, 0) + scale)
                    each_scaled_and_shifted(gate_size, lanes(line), normalized, weight, own_bias, line)

    return projection


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
        gates_x_width = call[field.GATES_X_WIDTH]
        hidden_prev, cell_prev = as_pointer(call[field.HIDDEN_PREV], zero), as_pointer(call[field.CELL_PREV], zero)
        operands, operands_n = as_pointer(call[field.OPERAND], zero), as_pointer(call[field.OPERAND_N], zero)
        all_normalized, scales = as_pointer(call[field.NORMALIZED_HH], zero), as_pointer(call[field.SCALE_HH], zero)
        product = advance(as_pointer(call[field.SCRATCH], zero), part * call[field.SCRATCH_SIZE])
        masked = advance(product, block_rows * gate_size)
        new_hidden = advance(masked, block_rows * size)
        new_cells = advance(new_hidden, block_rows * size)
        scratch = advance(new_cells, block_rows * size)

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
                operand, operand_stride = old, size
                if call[field.MASK] != 0:
                    operand = masked
                    if save:
                        operand, operand_stride = advance(operands, entry * size), directions * size
                    for row in range(rows):
                        row_mask, at = advance(mask, (block + row) * size), row * operand_stride
                        scale_row(row_mask, advance(old, row * size), advance(operand, at), size)
                multiply(operand, operand_stride, rows, panels, size, first_columns, product, gate_size, product, False)
                if norm:
                    for row in range(rows):
                        here, line = entry + row * directions, advance(product, row * gate_size)
                        normalized = advance(all_normalized, here * gate_size) if save else line
                        scale = normalize(line, normalized, gate_size)
                        if save:
                            store(scales, here, 1, load(scales, 0, 0) + scale)
                        scale_row(weight_ln_hh, normalized, line, gate_size)
                if not reset_after:
                    reset, reset_stride = scratch, size
                    if save:
                        reset, reset_stride = advance(operands_n, entry * size), directions * size
                    for row in range(rows):
                        here = entry + row * directions
                        each_gru_reset(
                            *(size, lanes(product), advance(product, row * gate_size)),
                            *(advance(gates_x, here * gates_x_width), advance(operand, row * operand_stride)),
                            *(advance(reset, row * reset_stride), advance(gates, here * saved_size), size, save),
                        )
                    target = advance(product, 2 * size)
                    multiply(reset, reset_stride, rows, panels_n, size, size, target, gate_size, target, False)
                new = new_hidden if call[field.KEEP_HIDDEN] != 0 else old
                new_cell = new_cells if call[field.KEEP_CELL] != 0 else old_cells
                for row in range(rows):
                    here = entry + row * directions
                    step(
                        *(advance(product, row * gate_size), advance(gates_x, here * gates_x_width), bias_hn),
                        *(advance(old, row * size), advance(new, row * size)),
                        *(advance(old_cells, row * size), advance(new_cell, row * size), scratch, parameters),
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
        weight_ln_ih = advance(as_pointer(call[field.WEIGHT_LN_IH], zero), of_gates)
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
        d_products_ih, d_products_hh = (
            as_pointer(call[field.D_PRODUCT_IH], zero),
            as_pointer(call[field.D_PRODUCT_HH], zero),
        )
        d_output, operands = as_pointer(call[field.D_OUTPUT], zero), as_pointer(call[field.OPERAND], zero)
        hidden_prev, cell_prev = as_pointer(call[field.HIDDEN_PREV], zero), as_pointer(call[field.CELL_PREV], zero)
        normalized_ih, scale_ih = as_pointer(call[field.NORMALIZED_IH], zero), as_pointer(call[field.SCALE_IH], zero)
        normalized_hh, scale_hh = as_pointer(call[field.NORMALIZED_HH], zero), as_pointer(call[field.SCALE_HH], zero)
        new_cells = as_pointer(call[field.NEW_CELL], zero)
        normalized_c = as_pointer(call[field.NORMALIZED_C], zero)
        d_normalized_c = as_pointer(call[field.D_NORMALIZED_C], zero)
        d_operand = advance(as_pointer(call[field.SCRATCH], zero), part * call[field.SCRATCH_SIZE])
        kept_hidden = advance(d_operand, block_rows * size)
        kept_cells = advance(kept_hidden, block_rows * size)
        scratch = advance(kept_cells, block_rows * size)
        d_new_cell = advance(scratch, size)

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
                dgates, stride = advance(all_dgates, entry * saved_size), directions * saved_size
                if not reset_after:
                    for row in range(rows):
                        here = entry + row * directions
                        each_gru_output_backward(
                            *(size, lanes(dh), advance(gates, here * saved_size), advance(hidden_prev, here * size)),
                            *(advance(dh, row * size), advance(dgates, row * stride), size),
                        )
                    of_n = advance(dgates, 2 * size)
                    multiply_back(of_n, stride, rows, panels, 2 * size, size, gate_size, size, d_operand, size, False)
                    for row in range(rows):
                        here = entry + row * directions
                        each_gru_reset_backward(
                            *(size, lanes(dh), advance(gates, here * saved_size), advance(operands, here * size)),
                            *(advance(d_operand, row * size), advance(dgates, row * stride), size),
                        )
                    multiply_back(dgates, stride, rows, panels, 0, 2 * size, gate_size, size, d_operand, size, True)
                else:
                    for row in range(rows):
                        here = entry + row * directions
                        # written once more where a sum over all rows is formed of it
                        new_cell = advance(new_cells, here * size) if call[field.NEW_CELL] != 0 else scratch
                        step(
                            *(advance(gates, here * saved_size), advance(hidden_prev, here * size)),
                            *(advance(cell_prev, here * size), advance(dh, row * size), advance(dc, row * size)),
                            *(advance(dgates, row * stride), new_cell),
                            *(advance(normalized_c, here * size), advance(d_normalized_c, here * size)),
                            *(parameters, d_new_cell, size),
                        )
                    if norm:
                        for row in range(rows):
                            here, of_row = entry + row * directions, advance(dgates, row * stride)
                            normalize_backward(
                                *(advance(normalized_ih, here * gate_size), scale_ih[here], weight_ln_ih, of_row),
                                *(advance(d_products_ih, here * gate_size), gate_size),
                            )
                            d_product = advance(d_products_hh, here * gate_size)
                            if is_gru:
                                copy_rows(of_row, 0, d_product, 0, 1, 2 * size)
                                of_n = advance(d_product, 2 * size)
                                copy_rows(advance(of_row, 3 * size), 0, of_n, 0, 1, size)
                                of_row = d_product
                            normalize_backward(
                                *(advance(normalized_hh, here * gate_size), scale_hh[here], weight_ln_hh, of_row),
                                *(d_product, gate_size),
                            )
                        d_product = advance(d_products_hh, entry * gate_size)
                        multiply_back(
                            *(d_product, directions * gate_size, rows, panels, 0, gate_size, gate_size, size),
                            *(d_operand, size, False),
                        )
                    elif is_gru:
                        multiply_back(
                            *(dgates, stride, rows, panels, 0, 2 * size, gate_size, size, d_operand, size, False)
                        )
                        of_n = advance(dgates, 3 * size)
                        multiply_back(
                            *(of_n, stride, rows, panels, 2 * size, size, gate_size, size, d_operand, size, True)
                        )
                    else:
                        multiply_back(
                            *(dgates, stride, rows, panels, 0, gate_size, gate_size, size, d_operand, size, False)
                        )
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
