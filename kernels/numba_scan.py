"""The time loops: one part of a layer, forward and backward.

A part is one direction and a range of sequences. One thread runs it alone, with no wait in the whole time loop; or,
where the batch is too small to go round, several threads share it, each with the hidden units of some panels, and wait
for each other once a step.

Forward, a block of time steps at a time: the input projection of the block, into scratch that stays in cache or into
the reserve; then for every step the recurrent product of the rows, and the cell's step on it. Backward: the cell's
step, then the product with the weights that gives the gradient of the state before.
"""

from typing import NamedTuple

from numba import types

from . import numba_call as field
from .numba_pairs import PAIR_ROWS
from .numba_simd import advance, as_pointer, jit, lanes, load, store
from .numba_team import wait_for
from .numba_tile import (
    WIDE,
    Operands,
    multiply_lines,
    multiply_neighbours,
    multiply_panel,
    multiply_rows,
    neighbour_vectors,
)


@jit
def copy_rows(source, source_stride, target, target_stride, rows, columns):
    width = lanes(source)
    full = columns - columns % width
    for row in range(rows):
        for j in range(0, full, width):
            store(target, row * target_stride + j, width, load(source, row * source_stride + j, width))
        if full < columns:
            count = columns - full
            store(target, row * target_stride + full, count, load(source, row * source_stride + full, count))


@jit
def add_rows(source, source_stride, target, target_stride, rows, columns):
    width = lanes(source)
    full = columns - columns % width
    for row in range(rows):
        for j in range(0, full, width):
            total = load(target, row * target_stride + j, width) + load(source, row * source_stride + j, width)
            store(target, row * target_stride + j, width, total)
        if full < columns:
            count = columns - full
            total = load(target, row * target_stride + full, count) + load(source, row * source_stride + full, count)
            store(target, row * target_stride + full, count, total)


@jit
def rows_at(call, step):
    """How many sequences are running at time ``step``."""
    if call[field.BATCH_SIZES] == 0:
        return call[field.BATCH]
    return as_pointer(call[field.BATCH_SIZES], types.int64(0))[step]


@jit
def zero_at_resets(call, entry, rows, pointer, columns, stride):
    """Set ``columns`` values of those of ``rows`` rows to zero whose state is reset before the step at ``entry``."""
    resets = as_pointer(call[field.RESETS], types.uint8(0))
    width, directions = lanes(pointer), call[field.DIRECTIONS]
    for row in range(rows):
        if resets[entry + row * directions] != 0:
            for j in range(0, columns, width):
                store(pointer, row * stride + j, columns - j, load(pointer, 0, 0))


@jit
def panels_of(columns, width):
    """How many panels of ``width`` columns hold ``columns``."""
    return (columns + width - 1) // width


@jit
def part_of(call, part):
    """Direction, whether time runs backward, first and end row of the batch."""
    row = call[field.PART_TABLE] + part * field.PART_FIELDS
    return call[row], call[row + 1] != 0, call[row + 2], call[row + 3]


class Layout(NamedTuple):
    """How many blocks of the hidden size a cell has: a compile-time constant of its kernels.

    A panel of W_ih and W_hh holds the gates of one vector of units, or neighbouring units if there is one gate only.
    """

    gates: int  # in W_ih and W_hh
    saved: int  # in the reserve

    @property
    def vectors(self) -> int:
        """Vectors of a panel of W_ih and W_hh."""
        return self.gates if self.gates > 1 else WIDE

    @property
    def panel_vectors(self) -> int:
        """Vectors of hidden units that a panel covers."""
        return 1 if self.gates > 1 else WIDE


LAYOUTS = {
    "rnn_tanh": Layout(gates=1, saved=1),
    "rnn_relu": Layout(gates=1, saved=1),
    "gru": Layout(gates=3, saved=4),
    "lstm": Layout(gates=4, saved=4),
}


def _make_projection(projected: bool, operands: Operands, jit):
    """The LSTM's projection of some rows of hidden states, W_hr h; nothing in kernels of layers without one."""
    if not projected:

        @jit
        def project(call, pairs, unprojected, rows, panels_hr, weight_hr, hidden):
            pass

        return project
    operand, paired = operands.rows, operands.paired

    @jit
    def project(call, pairs, unprojected, rows, panels_hr, weight_hr, hidden):
        size, state_size = call[field.HIDDEN_SIZE], call[field.STATE_SIZE]
        if paired or call[field.PACKED] != 0:
            source, stride, depth = operand(unprojected, size, rows, size, pairs)
            for column in range(0, state_size, WIDE * lanes(hidden)):
                multiply_neighbours(
                    *(source, stride, 1, rows, advance(panels_hr, column * depth), depth),
                    *(advance(hidden, column), state_size, state_size - column, unprojected, 0, False, False),
                )
        else:
            multiply_rows(unprojected, size, rows, weight_hr, size, state_size, hidden, state_size, unprojected, False)

    return project


def make_forward_part(layout: Layout, step_forward, projected: bool, operands: Operands, jit):
    """The forward time loop of one cell; ``jit`` compiles under the kernel's name."""
    gate_count, saved_count = layout
    vectors, panel_vectors = layout.vectors, layout.panel_vectors
    paired, stored, packed = operands.paired, operands.stored, operands.packed
    operand, depth_of = operands.rows, operands.depth
    multiply_gates, project = multiply_panel[vectors], _make_projection(projected, operands, jit)

    @jit
    def gate_product(
        call,
        pairs,
        a,
        a_stride,
        rows,
        panels,
        weight,
        depth,
        first_panel,
        end_panel,
        out,
        out_stride,
        across,
        addend,
        add,
    ):
        """Products with the gates' weights, for the units of some panels: out[r, gate * across + unit]."""
        size, vector, ahead = call[field.HIDDEN_SIZE], lanes(out), call[field.AHEAD] != 0
        units = panel_vectors * vector
        if paired or call[field.PACKED] != 0:
            at_once = PAIR_ROWS if paired else max(rows, 1)
            for begin in range(0, rows, at_once):
                count = min(at_once, rows - begin)
                block, stride, deep = operand(advance(a, begin * a_stride), a_stride, count, depth, pairs)
                for panel in range(first_panel, end_panel):
                    unit = panel * units
                    lines = advance(panels, panel * deep * vectors * vector)
                    target = advance(out, begin * out_stride + unit)
                    if gate_count > 1:
                        multiply_gates(
                            *(block, stride, 1, count, lines, deep, target, out_stride, across, size - unit, 0),
                            *(advance(addend, unit), 0, add, ahead),
                        )
                    else:
                        multiply_neighbours(
                            *(block, stride, 1, count, lines, deep, target, out_stride, size - unit),
                            *(advance(addend, unit), 0, add, ahead),
                        )
        else:
            unit = first_panel * units
            count = min(size, end_panel * units) - unit
            for gate in range(gate_count):
                column = gate * size + unit
                multiply_rows(
                    *(a, a_stride, rows, advance(weight, column * depth), depth, count),
                    *(advance(out, gate * across + unit), out_stride, advance(addend, column), add),
                )

    @jit
    def forward_part(call, part, member, members, zero):
        direction, backwards, first, end = part_of(call, part)
        size, state_size, input_size = call[field.HIDDEN_SIZE], call[field.STATE_SIZE], call[field.INPUT_SIZE]
        gate_size, saved_size = gate_count * size, saved_count * size
        batch, directions, sources = call[field.BATCH], call[field.DIRECTIONS], call[field.SOURCES]
        steps, dense = call[field.STEPS], call[field.BATCH_SIZES] == 0
        save = call[field.GATES] != 0
        vector = lanes(as_pointer(call[field.OUTPUT], zero))
        panels = panels_of(size, panel_vectors * vector)
        first_panel, end_panel = panels * member // members, panels * (member + 1) // members
        first_unit = first_panel * panel_vectors * vector
        end_unit = min(size, end_panel * panel_vectors * vector)
        # what this thread copies of a state
        first_state, states = (0, state_size) if projected else (first_unit, end_unit - first_unit)

        panel_size = panels * vectors * vector
        weight_ih = advance(as_pointer(call[field.WEIGHT_IH], stored), direction * gate_size * input_size)
        weight_hh = advance(as_pointer(call[field.WEIGHT_HH], stored), direction * gate_size * state_size)
        weight_hr = advance(as_pointer(call[field.WEIGHT_HR], stored), direction * state_size * size)
        panels_ih = as_pointer(call[field.PANELS_IH], packed)
        panels_ih = advance(panels_ih, direction * panel_size * depth_of(input_size))
        panels_hh = as_pointer(call[field.PANELS_HH], packed)
        panels_hh = advance(panels_hh, direction * panel_size * depth_of(state_size))
        wide = WIDE * vector
        projection_panels = panels_of(state_size, wide)
        panels_hr = as_pointer(call[field.PANELS_HR], packed)
        panels_hr = advance(panels_hr, direction * projection_panels * wide * depth_of(size))
        bias = advance(as_pointer(call[field.BIAS], zero), direction * gate_size)
        bias_hn = advance(as_pointer(call[field.BIAS_HN], zero), direction * size)
        x = advance(as_pointer(call[field.X], stored), direction * sources // directions * input_size)
        x_stride = sources * input_size

        hidden = advance(as_pointer(call[field.HIDDEN], zero), direction * batch * state_size)
        other = hidden
        if members > 1:
            other = advance(as_pointer(call[field.HIDDEN_2], zero), direction * batch * state_size)
        cell = advance(as_pointer(call[field.CELL], zero), direction * batch * size)
        output = as_pointer(call[field.OUTPUT], zero)
        gates = as_pointer(call[field.GATES], zero)
        hidden_prev, cell_prev = as_pointer(call[field.HIDDEN_PREV], zero), as_pointer(call[field.CELL_PREV], zero)
        cells = as_pointer(call[field.CELLS], zero)
        state_stride = directions * state_size
        # scratch: the product of a block of rows and units, the rows' new hidden state where it may not yet take the
        # place of the old one or is to be projected, the projections of x, and rows in pairs
        scratch = (part * members + member) * call[field.SCRATCH_SIZE]
        product = advance(as_pointer(call[field.SCRATCH], zero), scratch)
        pairs = as_pointer(call[field.SCRATCH], packed)
        pairs = advance(pairs, scratch + call[field.SCRATCH_SIZE] - call[field.PAIRS_SIZE])
        block_units = call[field.BLOCK_UNITS]
        product_size, block_panels = gate_count * block_units, block_units // (panel_vectors * vector)
        new_rows = advance(product, call[field.BLOCK_ROWS] * product_size)
        block_gates_x = advance(new_rows, call[field.BLOCK_ROWS] * size)
        # the old state is read once more for every block of units
        aside = projected or (members == 1 and panels > block_panels)

        full = end_unit - (end_unit - first_unit) % vector
        barrier, arrivals = field.PART_BARRIERS + 8 * part, types.int64(0)
        offset = call[field.ROWS] if backwards else types.int64(0)
        for begin in range(0, steps, call[field.BLOCK_STEPS]):
            block_steps = min(call[field.BLOCK_STEPS], steps - begin)

            # The input projection of the block of steps. Its slots are in the order of time.
            earliest = steps - begin - block_steps if backwards else begin
            start = offset
            if backwards:
                for time in range(earliest, earliest + block_steps):
                    start -= rows_at(call, time)
            part_rows = end - first
            if save:
                gates_x, slot, slot_stride = advance(gates, direction * saved_size), batch, directions * saved_size
                gates_x = advance(gates_x, (start + first) * slot_stride)
            else:
                gates_x, slot, slot_stride = block_gates_x, part_rows, gate_size
            if dense and slot == part_rows and part_rows == batch:
                # the rows of all steps follow each other
                gate_product(
                    *(call, pairs, advance(x, start * x_stride), x_stride, block_steps * batch),
                    *(panels_ih, weight_ih, input_size, first_panel, end_panel, gates_x, slot_stride, size, bias, True),
                )
            elif dense and block_steps > part_rows:
                # full tiles of time steps, one sequence after the other
                for row in range(part_rows):
                    gate_product(
                        *(call, pairs, advance(x, (start + first + row) * x_stride), batch * x_stride, block_steps),
                        *(panels_ih, weight_ih, input_size, first_panel, end_panel),
                        *(advance(gates_x, row * slot_stride), slot * slot_stride, size, bias, True),
                    )
            else:
                source, target = advance(x, (start + first) * x_stride), gates_x
                for time in range(earliest, earliest + block_steps):
                    running = rows_at(call, time)
                    gate_product(
                        *(call, pairs, source, x_stride, min(end, running) - first),
                        *(panels_ih, weight_ih, input_size, first_panel, end_panel),
                        *(target, slot_stride, size, bias, True),
                    )
                    source = advance(source, running * x_stride)
                    target = advance(target, (running if save else part_rows) * slot_stride)

            for index in range(begin, begin + block_steps):
                time = steps - 1 - index if backwards else index
                running = rows_at(call, time)
                if backwards:
                    offset -= running
                stop = min(end, running)
                old, new = hidden, hidden
                if members > 1:
                    # other threads still read the old state; the last step's new one is in HIDDEN
                    old, new = (hidden, other) if (steps - index) % 2 == 0 else (other, hidden)
                for block in range(first, stop, call[field.BLOCK_ROWS]):
                    rows = min(call[field.BLOCK_ROWS], stop - block)
                    entry = (offset + block) * directions + direction
                    block_old, block_new = advance(old, block * state_size), advance(new, block * state_size)
                    if save:
                        copy_rows(
                            *(advance(block_old, first_state), state_size),
                            *(advance(hidden_prev, entry * state_size + first_state), state_stride, rows, states),
                        )
                        if call[field.CELL] != 0:
                            copy_rows(
                                *(advance(cell, block * size + first_unit), size),
                                *(advance(cell_prev, entry * size + first_unit), directions * size),
                                *(rows, end_unit - first_unit),
                            )
                    for panel in range(first_panel, end_panel, block_panels):
                        unit = panel * panel_vectors * vector
                        end_block = min(end_unit, unit + block_units)
                        # product[r, gate * block_units + unit], from this block's first unit on
                        block_product = advance(product, -unit)
                        gate_product(
                            *(call, pairs, block_old, state_size, rows, panels_hh, weight_hh, state_size),
                            *(panel, min(end_panel, panel + block_panels)),
                            *(block_product, product_size, block_units, block_product, False),
                        )
                        for row in range(rows):
                            row_gates = advance(gates, (entry + row * directions) * saved_size)
                            row_gates_x = row_gates
                            if not save:
                                slot_row = (time - earliest) * part_rows + block - first + row
                                row_gates_x = advance(block_gates_x, slot_row * gate_size)
                            row_product = advance(block_product, row * product_size)
                            row_old = advance(block_old, row * state_size)
                            row_new = advance(new_rows if aside else block_new, row * size)
                            row_cell = advance(cell, (block + row) * size)
                            for j in range(unit, min(full, end_block), vector):
                                step_forward(
                                    *(row_product, block_units, row_gates_x, bias_hn, row_old, row_new, row_cell),
                                    *(row_gates, size, j, vector, save),
                                )
                            if full < end_block:
                                step_forward(
                                    *(row_product, block_units, row_gates_x, bias_hn, row_old, row_new, row_cell),
                                    *(row_gates, size, full, end_block - full, save),
                                )
                    if projected:
                        project(call, pairs, new_rows, rows, panels_hr, weight_hr, block_new)
                    elif aside:
                        copy_rows(new_rows, size, block_new, size, rows, size)
                    copy_rows(
                        *(advance(block_new, first_state), state_size),
                        *(advance(output, entry * state_size + first_state), state_stride, rows, states),
                    )
                    if call[field.CELLS] != 0:
                        copy_rows(
                            *(advance(cell, block * size + first_unit), size),
                            *(advance(cells, entry * size + first_unit), directions * size),
                            *(rows, end_unit - first_unit),
                        )
                    if call[field.RESETS] != 0 and index + 1 < steps:
                        next_running = rows_at(call, time - 1 if backwards else time + 1)
                        following = entry + (-next_running if backwards else running) * directions
                        going_on = min(rows, next_running - block)
                        zero_at_resets(call, following, going_on, advance(block_new, first_state), states, state_size)
                        if call[field.CELL] != 0:
                            block_cell = advance(cell, block * size + first_unit)
                            zero_at_resets(call, following, going_on, block_cell, end_unit - first_unit, size)
                if not backwards:
                    offset += running
                if members > 1:
                    arrivals += members
                    wait_for(call, barrier, arrivals)

    return forward_part


def make_backward_part(layout: Layout, step_backward, operands: Operands, jit):
    """The backward time loop of one cell; ``jit`` compiles under the kernel's name."""
    gate_count, saved_count = layout
    # The GRU's n has a gradient of its own on the hidden state's side, and only the GRU's old state has a share of the
    # gradient that passes the product by.
    two_sided = saved_count > gate_count
    paired, stored, packed = operands.paired, operands.stored, operands.packed
    operand, depth_of = operands.rows, operands.depth

    @jit
    def state_gradient(call, pairs, dgates, stride, rows, panels, weight, first_panel, end_panel, out):
        """Gradients of some columns of the state before: out[r, c] = sum over gates of dgates[r, k] * weight[k, c]."""
        size, state_size, vector = call[field.HIDDEN_SIZE], call[field.STATE_SIZE], lanes(out)
        gate_size, wide = gate_count * size, WIDE * vector
        one_side = (gate_count - 1) * size if two_sided else gate_size
        # the gates with one gradient, an even number for the GRU, then its n on the hidden state's side
        for side in range(2 if two_sided else 1):
            first, depth = (one_side, size) if side else (0, one_side)
            source, add = advance(dgates, gate_size if side else 0), two_sided or side > 0
            if paired or call[field.PACKED] != 0:
                source, source_stride, deep = operand(source, stride, rows, depth, pairs)
                for begin in range(0, deep, call[field.BLOCK_DEPTH]):
                    count, adding = min(call[field.BLOCK_DEPTH], deep - begin), add or begin > 0
                    for panel in range(first_panel, end_panel):
                        column = panel * wide
                        target, columns = advance(out, column), state_size - column
                        line = neighbour_vectors(columns, vector) * vector
                        lines = advance(panels, column * depth_of(gate_size) + (depth_of(first) + begin) * line)
                        multiply_neighbours(
                            *(advance(source, begin), source_stride, 1, rows, lines, count, target, state_size),
                            *(columns, target, state_size, adding, call[field.AHEAD] != 0),
                        )
            else:
                column = first_panel * wide
                target = advance(out, column)
                multiply_lines(
                    *(source, stride, rows, advance(weight, first * state_size + column), state_size, depth),
                    *(min(state_size, end_panel * wide) - column, target, state_size, add),
                )

    @jit
    def backward_part(call, part, member, members, zero):
        # Back-propagation walks against the direction of the forward pass.
        direction, forwards, first, end = part_of(call, part)
        backwards = not forwards
        size, state_size = call[field.HIDDEN_SIZE], call[field.STATE_SIZE]
        gate_size, saved_size = gate_count * size, saved_count * size
        batch, directions, steps = call[field.BATCH], call[field.DIRECTIONS], call[field.STEPS]
        projected = call[field.WEIGHT_HR] != 0
        vector = lanes(as_pointer(call[field.DGATES], zero))
        wide = WIDE * vector
        panels = panels_of(state_size, wide)
        first_panel, end_panel = panels * member // members, panels * (member + 1) // members
        first_unit, end_unit = types.int64(0), size
        if not projected:
            first_unit, end_unit = first_panel * wide, min(size, end_panel * wide)
        first_state, states = (types.int64(0), state_size) if projected else (first_unit, end_unit - first_unit)

        weight_hh = advance(as_pointer(call[field.WEIGHT_HH], stored), direction * gate_size * state_size)
        weight_hr = advance(as_pointer(call[field.WEIGHT_HR], stored), direction * state_size * size)
        panels_hh = as_pointer(call[field.PANELS_HH], packed)
        panels_hh = advance(panels_hh, direction * depth_of(gate_size) * panels * wide)
        unit_panels = panels_of(size, wide)
        panels_hr = as_pointer(call[field.PANELS_HR], packed)
        panels_hr = advance(panels_hr, direction * depth_of(state_size) * unit_panels * wide)
        d_hidden = advance(as_pointer(call[field.D_HIDDEN], zero), direction * batch * state_size)
        d_cell = advance(as_pointer(call[field.D_CELL], zero), direction * batch * size)
        # scratch: the gradient of the hidden state before its projection, and rows in pairs
        scratch = (part * members + member) * call[field.SCRATCH_SIZE]
        d_unprojected = advance(as_pointer(call[field.SCRATCH], zero), scratch)
        pairs = as_pointer(call[field.SCRATCH], packed)
        pairs = advance(pairs, scratch + call[field.SCRATCH_SIZE] - call[field.PAIRS_SIZE])
        d_output, d_projected = as_pointer(call[field.D_OUTPUT], zero), as_pointer(call[field.D_PROJECTED], zero)
        d_cells = as_pointer(call[field.D_CELLS], zero)
        gates, dgates = as_pointer(call[field.GATES], zero), as_pointer(call[field.DGATES], zero)
        hidden_prev, cell_prev = as_pointer(call[field.HIDDEN_PREV], zero), as_pointer(call[field.CELL_PREV], zero)
        state_stride = directions * state_size

        full = end_unit - (end_unit - first_unit) % vector
        barrier, arrivals = field.PART_BARRIERS + 8 * part, types.int64(0)
        offset = call[field.ROWS] if backwards else types.int64(0)
        for index in range(steps):
            time = steps - 1 - index if backwards else index
            running = rows_at(call, time)
            if backwards:
                offset -= running
            stop = min(end, running)
            for block in range(first, stop, call[field.BLOCK_ROWS]):
                rows = min(call[field.BLOCK_ROWS], stop - block)
                entry = (offset + block) * directions + direction
                block_d_hidden = advance(d_hidden, block * state_size)
                if call[field.D_OUTPUT] != 0:
                    add_rows(
                        *(advance(d_output, entry * state_size + first_state), state_stride),
                        *(advance(block_d_hidden, first_state), state_size, rows, states),
                    )
                if call[field.D_CELLS] != 0:
                    add_rows(
                        *(advance(d_cells, entry * size + first_unit), directions * size),
                        *(advance(d_cell, block * size + first_unit), size, rows, end_unit - first_unit),
                    )
                if projected:
                    copy_rows(
                        *(block_d_hidden, state_size, advance(d_projected, entry * state_size), state_stride),
                        *(rows, state_size),
                    )
                    if paired or call[field.PACKED] != 0:
                        source, stride, deep = operand(block_d_hidden, state_size, rows, state_size, pairs)
                        for column in range(0, size, wide):
                            target = advance(d_unprojected, column)
                            multiply_neighbours(
                                *(source, stride, 1, rows, advance(panels_hr, column * deep), deep),
                                *(target, size, size - column, target, size, False, False),
                            )
                    else:
                        multiply_lines(
                            *(block_d_hidden, state_size, rows, weight_hr, size, state_size),
                            *(size, d_unprojected, size, False),
                        )
                for row in range(rows):
                    here = entry + row * directions
                    row_gates, row_dgates = advance(gates, here * saved_size), advance(dgates, here * saved_size)
                    row_hidden_prev = advance(hidden_prev, here * state_size)
                    row_cell_prev = advance(cell_prev, here * size)
                    row_dh = advance(d_unprojected if projected else block_d_hidden, row * size)
                    row_dc = advance(d_cell, (block + row) * size)
                    for j in range(first_unit, full, vector):
                        step_backward(
                            *(row_gates, row_hidden_prev, row_cell_prev, row_dh, row_dc, row_dgates, size, j, vector)
                        )
                    if full < end_unit:
                        step_backward(
                            *(row_gates, row_hidden_prev, row_cell_prev, row_dh, row_dc, row_dgates),
                            *(size, full, end_unit - full),
                        )
                if members > 1:
                    # the product needs the gradients of all units
                    arrivals += members
                    wait_for(call, barrier, arrivals)
                block_dgates = advance(dgates, entry * saved_size)
                state_gradient(
                    *(call, pairs, block_dgates, directions * saved_size, rows, panels_hh, weight_hh),
                    *(first_panel, end_panel, block_d_hidden),
                )
                if call[field.RESETS] != 0:
                    zero_at_resets(call, entry, rows, advance(block_d_hidden, first_state), states, state_size)
                    if call[field.D_CELL] != 0:
                        block_d_cell = advance(d_cell, block * size + first_unit)
                        zero_at_resets(call, entry, rows, block_d_cell, end_unit - first_unit, size)
            if not backwards:
                offset += running

    return backward_part
