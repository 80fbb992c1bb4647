"""Gradients of a layer's input, weights and biases, from those of its gates: products over all time steps at once.

Threads share out the rows of the input's gradient and the rows of the weights' gradients, so that every number is
summed up by one thread, in the same order whatever their number.
"""

from typing import NamedTuple

from numba import types

from . import numba_call as field
from .numba_pairs import PAIR_ROWS
from .numba_scan import Layout, panels_of
from .numba_simd import advance, as_pointer, jit, lanes, load, store
from .numba_team import PRODUCTS, SUMMING, take
from .numba_tile import WIDE, Operands, multiply_lines, multiply_neighbours, neighbour_vectors

# Rows of the input's gradient that one item covers.
INPUT_ROWS = PAIR_ROWS
# Time steps of one partial sum of a weight's gradient, at least and at most. One float32 sum over thousands of steps
# would lose digits: torch.nn adds up one product a step. Too many partial sums would lose as many.
SUM_ROWS, MOST_SUM_ROWS = 64, 256
MANY_SUMS = 128
# Partial sums of a bias's gradient that are added up before they go to the whole: torch.nn's sum is one of pairs.
BIAS_SUMS = 16
# Rows of a weight's gradient that one item covers: as many as give every thread a few items, within these bounds.
WEIGHT_ROWS_LEAST, WEIGHT_ROWS = 64, 256
ITEMS_PER_THREAD = 2


@jit
def _add_up(lines, stride, count, columns, target, add):
    """target[c] (+)= sum of lines[r * stride + c] over r < count, for one vector of columns."""
    # four sums side by side, each a quarter as long
    a, b = load(lines, 0, 0), load(lines, 0, 0)
    c, d = load(lines, 0, 0), load(lines, 0, 0)
    full = count - count % 4
    for row in range(0, full, 4):
        a = a + load(lines, row * stride, columns)
        b = b + load(lines, (row + 1) * stride, columns)
        c = c + load(lines, (row + 2) * stride, columns)
        d = d + load(lines, (row + 3) * stride, columns)
    for row in range(full, count):
        a = a + load(lines, row * stride, columns)
    total = (a + b) + (c + d)
    if add:
        total = total + load(target, 0, columns)
    store(target, 0, columns, total)


def _make_weight_rows(operands: Operands, jit):
    pack, depth_of = operands.pack_lines, operands.depth

    @jit
    def weight_rows(
        gradients, gradients_stride, rows, count, source, source_stride, depth, out, bias, scratch, packed, wanted
    ):
        """Some rows of a weight's gradient and of its bias's: sums over ``count`` time steps.

        out[n, k] = sum_t gradients[t * gradients_stride + n] * source[t * source_stride + k] for n < rows, k < depth;
        bias[n] is the sum of the gradients alone. ``wanted``: 1 for out, 2 for bias, 3 for both.
        ``scratch`` and ``packed`` are the same memory, as float32 or float64 and as products take it.
        """
        vector = lanes(gradients)
        panel = advance(packed, MOST_SUM_ROWS * WEIGHT_ROWS)
        bias_sums = advance(scratch, MOST_SUM_ROWS * (WEIGHT_ROWS + WIDE * vector))
        at_once = types.int64(SUM_ROWS)
        while at_once < MOST_SUM_ROWS and count > MANY_SUMS * at_once:
            at_once *= 2
        blocks = (count + at_once - 1) // at_once
        for index in range(blocks):
            begin = index * at_once
            steps, add = min(at_once, count - begin), index > 0
            deep = depth_of(steps)
            for n in range(0, rows, WIDE * vector):
                lines, vectors = advance(gradients, begin * gradients_stride + n), panels_of(rows - n, vector)
                target = advance(packed, n * deep)
                pack(
                    *(lines, gradients_stride, steps, min(vectors, WIDE), rows - n, target, vector, deep * vector),
                )
            for n in range(0, rows if wanted & 2 else 0, vector):
                lines = advance(gradients, begin * gradients_stride + n)
                _add_up(lines, gradients_stride, steps, rows - n, advance(bias_sums, n), index % BIAS_SUMS > 0)
            if wanted & 2 and (index % BIAS_SUMS == BIAS_SUMS - 1 or index == blocks - 1):
                for n in range(0, rows, vector):
                    _add_up(advance(bias_sums, n), 0, 1, rows - n, advance(bias, n), index >= BIAS_SUMS)
            for k in range(0, depth if wanted & 1 else 0, WIDE * vector):
                left = depth - k
                lines = advance(source, begin * source_stride + k)
                vectors = neighbour_vectors(left, vector)
                pack(lines, source_stride, steps, vectors, left, panel, vectors * vector, vector)
                for n in range(0, rows, vector):
                    target = advance(out, n * depth + k)
                    multiply_neighbours(
                        *(advance(packed, n * deep), 1, vector, min(vector, rows - n), panel, deep),
                        *(target, depth, left, target, depth, add, False),
                    )

    return weight_rows


def scratch_size(lanes: int) -> int:
    """Values of scratch that one thread needs here, for vectors of ``lanes`` values."""
    return MOST_SUM_ROWS * (WEIGHT_ROWS + WIDE * lanes) + WEIGHT_ROWS


class Factors(NamedTuple):
    """Where the factors of a layer's products stand: fields of the call, and blocks of the hidden size in a row."""

    # the gradient of W_ih x
    of_input: int
    input_width: int
    # the gradient of W_hh h; that of the GRU's n may stand a block further than n does among the gates
    of_state: int
    state_width: int
    n_is_apart: bool
    # what W_hh was multiplied with, all rows of it and those of n
    state: int
    state_of_n: int
    # whether the gradients of biases are the sums of these gradients
    with_biases: bool


def plain_factors(layout: Layout) -> Factors:
    """Those of a layer as torch.nn has it. The GRU's n has a gradient of its own on the hidden state's side."""
    gates, saved = layout
    sides = (field.DGATES, saved, field.DGATES, saved, saved > gates)
    return Factors(*sides, field.HIDDEN_PREV, field.HIDDEN_PREV, with_biases=True)


def make_products(layout: Layout, operands: Operands, factors: Factors, jit):
    """The function by which every thread of a team computes its share of the gradients."""
    gate_count = layout.gates
    of_input, input_width, of_state, state_width, n_is_apart, state, state_of_n, with_biases = factors
    # the rows of n are items of their own
    split = n_is_apart or state != state_of_n
    shift = 1 if n_is_apart else 0
    with_biases = 2 if with_biases else 0
    paired, stored, panel_value, operand = operands.paired, operands.stored, operands.packed, operands.rows
    weight_rows = _make_weight_rows(operands, jit)

    @jit
    def input_rows(call, pairs, first, source, zero):
        """INPUT_ROWS rows of the gradient of one source of the input, from row ``first`` on: dgates @ weight_ih."""
        rows = min(INPUT_ROWS, call[field.ROWS] - first)
        directions, sources = call[field.DIRECTIONS], call[field.SOURCES]
        size, input_size = call[field.HIDDEN_SIZE], call[field.INPUT_SIZE]
        gate_size, width = gate_count * size, input_width * size
        dx = advance(as_pointer(call[field.DX], zero), (first * sources + source) * input_size)
        stride, vector = sources * input_size, lanes(dx)
        wide = WIDE * vector
        dgates = as_pointer(call[of_input], zero)
        panels = as_pointer(call[field.PANELS_IH], panel_value)
        weight = as_pointer(call[field.WEIGHT_IH], stored)
        groups = directions // sources
        for group in range(source * groups, (source + 1) * groups):
            gradients, add = advance(dgates, (first * directions + group) * width), group > source * groups
            if paired or call[field.PACKED] != 0:
                block, block_stride, deep = operand(gradients, directions * width, rows, gate_size, pairs)
                for panel in range(panels_of(input_size, wide)):
                    lines = advance(panels, (group * panels_of(input_size, wide) + panel) * deep * wide)
                    target = advance(dx, panel * wide)
                    multiply_neighbours(
                        *(block, block_stride, 1, rows, lines, deep),
                        *(target, stride, input_size - panel * wide, target, stride, add, call[field.AHEAD] != 0),
                    )
            else:
                multiply_lines(
                    *(gradients, directions * width, rows),
                    *(advance(weight, group * gate_size * input_size), input_size, gate_size),
                    *(input_size, dx, stride, add),
                )

    @jit
    def products(call, thread, team, zero):
        directions, sources, examples = call[field.DIRECTIONS], call[field.SOURCES], call[field.EXAMPLES]
        size, state_size, input_size = call[field.HIDDEN_SIZE], call[field.STATE_SIZE], call[field.INPUT_SIZE]
        gate_size, width_ih, width_hh = gate_count * size, input_width * size, state_width * size
        one_side = (gate_count - 1) * size if split else gate_size
        scratch = advance(as_pointer(call[field.SCRATCH], zero), thread * call[field.SCRATCH_SIZE])
        packed = advance(as_pointer(call[field.SCRATCH], panel_value), thread * call[field.SCRATCH_SIZE])
        pairs = advance(packed, call[field.SCRATCH_SIZE] - call[field.PAIRS_SIZE])
        wanted_ih = types.int64(call[field.D_WEIGHT_IH] != 0) + with_biases * types.int64(call[field.D_BIAS_IH] != 0)
        wanted_hh = types.int64(call[field.D_WEIGHT_HH] != 0) + with_biases * types.int64(call[field.D_BIAS_HH] != 0)
        wanted_hr = types.int64(call[field.D_WEIGHT_HR] != 0)
        gradients_ih, gradients_hh = as_pointer(call[of_input], zero), as_pointer(call[of_state], zero)
        count = call[field.ROWS] // examples

        rows = gate_size * directions * (types.int64(wanted_ih != 0) + types.int64(wanted_hh != 0))
        chunk = rows // (ITEMS_PER_THREAD * team) // WEIGHT_ROWS_LEAST * WEIGHT_ROWS_LEAST
        chunk = max(WEIGHT_ROWS_LEAST, min(WEIGHT_ROWS, chunk))
        groups = directions * examples
        items_ih = panels_of(gate_size, chunk) * groups if wanted_ih else types.int64(0)
        items_hh = panels_of(one_side, chunk) * groups if wanted_hh else types.int64(0)
        items_n = panels_of(size, chunk) * groups if wanted_hh and split else types.int64(0)
        items_hr = panels_of(state_size, chunk) * groups if wanted_hr else types.int64(0)
        items_x = panels_of(call[field.ROWS], INPUT_ROWS) * sources if call[field.DX] != 0 else types.int64(0)

        while True:
            item = take(call, PRODUCTS)
            if item < items_x:
                input_rows(call, pairs, item // sources * INPUT_ROWS, item % sources, zero)
                continue
            item -= items_x
            if item < items_ih:
                n = item // groups * chunk
                direction, example = item % groups % directions, item % groups // directions
                of_group = example * directions + direction
                source = as_pointer(call[field.X], stored)
                source = advance(source, (example * sources + direction * sources // directions) * input_size)
                weight_rows(
                    *(advance(gradients_ih, of_group * width_ih + n), groups * width_ih, min(chunk, gate_size - n)),
                    *(count, source, examples * sources * input_size, input_size),
                    advance(as_pointer(call[field.D_WEIGHT_IH], zero), (of_group * gate_size + n) * input_size),
                    advance(as_pointer(call[field.D_BIAS_IH], zero), of_group * gate_size + n),
                    *(scratch, packed, wanted_ih),
                )
                continue
            item -= items_ih
            if item < items_hh + items_n:
                on_side = item < items_hh
                first, end = (types.int64(0), one_side) if on_side else (one_side, gate_size)
                item = item if on_side else item - items_hh
                n = first + item // groups * chunk
                of_group = item % groups  # example * directions + direction
                column = n if on_side else n + shift * size
                source = as_pointer(call[state] if on_side else call[state_of_n], zero)
                source = advance(source, of_group * state_size)
                weight_rows(
                    *(advance(gradients_hh, of_group * width_hh + column), groups * width_hh, min(chunk, end - n)),
                    *(count, source, groups * state_size, state_size),
                    advance(as_pointer(call[field.D_WEIGHT_HH], zero), (of_group * gate_size + n) * state_size),
                    advance(as_pointer(call[field.D_BIAS_HH], zero), of_group * gate_size + n),
                    *(scratch, packed, wanted_hh),
                )
                continue
            item -= items_hh + items_n
            if item >= items_hr:
                break
            n, of_group = item // groups * chunk, item % groups
            gradients = advance(as_pointer(call[field.D_PROJECTED], zero), of_group * state_size + n)
            source = advance(as_pointer(call[field.UNPROJECTED], zero), of_group * size)
            target = advance(as_pointer(call[field.D_WEIGHT_HR], zero), (of_group * state_size + n) * size)
            weight_rows(
                *(gradients, groups * state_size, min(chunk, state_size - n), count, source, groups * size, size),
                *(target, target, scratch, packed, wanted_hr),
            )

    return products


@jit
def _column_sums(values, stride, factors, factors_stride, rows, count, sums, products):
    """Sums over all rows of ``count`` columns, one vector, and of the same multiplied by ``factors``.

    Added up in parts of parts, for one float32 sum over thousands of rows would lose digits.
    """
    total, total_of_products = load(values, 0, 0), load(values, 0, 0)
    part, part_of_products = total, total_of_products
    for block in range(0, rows, SUM_ROWS):
        a, b, c, d = load(values, 0, 0), load(values, 0, 0), load(values, 0, 0), load(values, 0, 0)
        stop = min(block + SUM_ROWS, rows)
        for row in range(block, stop - 1, 2):
            value, other = load(values, row * stride, count), load(values, (row + 1) * stride, count)
            a, b = a + value, b + other
            c = c + value * load(factors, row * factors_stride, count)
            d = d + other * load(factors, (row + 1) * factors_stride, count)
        if (stop - block) % 2:
            value = load(values, (stop - 1) * stride, count)
            a, c = a + value, c + value * load(factors, (stop - 1) * factors_stride, count)
        part, part_of_products = part + (a + b), part_of_products + (c + d)
        if block // SUM_ROWS % BIAS_SUMS == BIAS_SUMS - 1:
            total, total_of_products = total + part, total_of_products + part_of_products
            part, part_of_products = load(values, 0, 0), load(values, 0, 0)
    store(sums, 0, count, total + part)
    store(products, 0, count, total_of_products + part_of_products)


@jit
def sum_columns(call, zero):
    """Every thread's share of the sums of the sum table (``numba_call.py``)."""
    directions, vector = call[field.DIRECTIONS], lanes(as_pointer(call[field.DGATES], zero))
    item, begin = take(call, SUMMING), types.int64(0)
    for index in range(call[field.SUMS]):
        row = call[field.SUM_TABLE] + index * field.SUM_FIELDS
        values, width = advance(as_pointer(call[call[row]], zero), call[row + 2]), call[row + 1]
        factors, factors_width = advance(as_pointer(call[call[row + 3]], zero), call[row + 5]), call[row + 4]
        columns, out_width, first = call[row + 6], call[row + 9], call[row + 10]
        sums = advance(as_pointer(call[call[row + 7]], zero), first)
        products = advance(as_pointer(call[call[row + 8]], zero), first)
        chunks = panels_of(columns, vector)
        while item < begin + chunks * directions:
            direction, column = (item - begin) // chunks, (item - begin) % chunks * vector
            out = direction * out_width + column
            _column_sums(
                *(advance(values, direction * width + column), directions * width),
                *(advance(factors, direction * factors_width + column), directions * factors_width),
                *(call[field.ROWS], min(vector, columns - column), advance(sums, out), advance(products, out)),
            )
            item = take(call, SUMMING)
        begin += chunks * directions
