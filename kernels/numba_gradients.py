"""Gradients of a layer's input, weights and biases, from those of its gates: products over all time steps at once.

Threads share out the rows of the input's gradient and the rows of the weights' gradients, so that every number is
summed up by one thread, in the same order whatever their number.
"""

from numba import types

from . import numba_call as field
from .numba_scan import Layout, panels_of
from .numba_simd import advance, as_pointer, jit, lanes, load, store
from .numba_team import PRODUCTS, take
from .numba_tile import WIDE, multiply_lines, multiply_neighbours, neighbour_vectors, pack_lines

# Rows of the input's gradient that one item covers.
INPUT_ROWS = 96
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
def _add_up(panel, count, columns, target, add):
    """target[c] (+)= sum of panel[r, c] over r < count, for one vector of columns."""
    vector = lanes(panel)
    # four sums side by side, each a quarter as long
    a, b = load(panel, 0, 0), load(panel, 0, 0)
    c, d = load(panel, 0, 0), load(panel, 0, 0)
    full = count - count % 4
    for row in range(0, full, 4):
        a = a + load(panel, row * vector, vector)
        b = b + load(panel, (row + 1) * vector, vector)
        c = c + load(panel, (row + 2) * vector, vector)
        d = d + load(panel, (row + 3) * vector, vector)
    for row in range(full, count):
        a = a + load(panel, row * vector, vector)
    total = (a + b) + (c + d)
    if add:
        total = total + load(target, 0, columns)
    store(target, 0, columns, total)


@jit
def weight_rows(gradients, gradients_stride, rows, count, source, source_stride, depth, out, bias, scratch, wanted):
    """Some rows of a weight's gradient and of its bias's: sums over ``count`` time steps.

    out[n, k] = sum_t gradients[t * gradients_stride + n] * source[t * source_stride + k] for n < rows, k < depth;
    bias[n] is the sum of the gradients alone. ``wanted``: 1 for out, 2 for bias, 3 for both.
    """
    vector = lanes(gradients)
    packed, panel = scratch, advance(scratch, MOST_SUM_ROWS * WEIGHT_ROWS)
    bias_sums = advance(panel, MOST_SUM_ROWS * WIDE * vector)
    at_once = types.int64(SUM_ROWS)
    while at_once < MOST_SUM_ROWS and count > MANY_SUMS * at_once:
        at_once *= 2
    blocks = (count + at_once - 1) // at_once
    for index in range(blocks):
        begin = index * at_once
        steps, add = min(at_once, count - begin), index > 0
        for n in range(0, rows, vector):
            block = advance(packed, n * steps)
            pack_lines(advance(gradients, begin * gradients_stride + n), gradients_stride, steps, 1, rows - n, block)
            if wanted & 2:
                _add_up(block, steps, vector, advance(bias_sums, n), index % BIAS_SUMS > 0)
        if wanted & 2 and (index % BIAS_SUMS == BIAS_SUMS - 1 or index == blocks - 1):
            for n in range(0, rows, vector):
                _add_up(advance(bias_sums, n), 1, rows - n, advance(bias, n), index >= BIAS_SUMS)
        for k in range(0, depth if wanted & 1 else 0, WIDE * vector):
            left = depth - k
            lines = advance(source, begin * source_stride + k)
            pack_lines(lines, source_stride, steps, neighbour_vectors(left, vector), left, panel)
            for n in range(0, rows, vector):
                target = advance(out, n * depth + k)
                multiply_neighbours(
                    *(advance(packed, n * steps), 1, vector, min(vector, rows - n), panel, steps),
                    *(target, depth, left, target, depth, add),
                )


def scratch_size(lanes: int) -> int:
    """Values of scratch that one thread needs here, for vectors of ``lanes`` values."""
    return MOST_SUM_ROWS * (WEIGHT_ROWS + WIDE * lanes) + WEIGHT_ROWS


def make_products(layout: Layout, jit):
    """The function by which every thread of a team computes its share of the gradients."""
    gate_count, saved_count = layout
    two_sided = saved_count > gate_count

    @jit
    def input_rows(call, first, source, zero):
        """INPUT_ROWS rows of the gradient of one source of the input, from row ``first`` on: dgates @ weight_ih."""
        rows = min(INPUT_ROWS, call[field.ROWS] - first)
        directions, sources = call[field.DIRECTIONS], call[field.SOURCES]
        size, input_size = call[field.HIDDEN_SIZE], call[field.INPUT_SIZE]
        gate_size, saved_size = gate_count * size, saved_count * size
        dx = advance(as_pointer(call[field.DX], zero), (first * sources + source) * input_size)
        stride, vector = sources * input_size, lanes(dx)
        wide = WIDE * vector
        dgates = as_pointer(call[field.DGATES], zero)
        panels = as_pointer(call[field.PANELS_IH], zero)
        weight = as_pointer(call[field.WEIGHT_IH], zero)
        groups = directions // sources
        for panel in range(panels_of(input_size, wide)):
            column = panel * wide
            target, columns = advance(dx, column), input_size - column
            for group in range(source * groups, (source + 1) * groups):
                gradients, add = advance(dgates, (first * directions + group) * saved_size), group > source * groups
                if call[field.PACKED] != 0:
                    lines = (group * panels_of(input_size, wide) + panel) * gate_size * wide
                    multiply_neighbours(
                        *(gradients, directions * saved_size, 1, rows, advance(panels, lines), gate_size),
                        *(target, stride, columns, target, stride, add),
                    )
                else:
                    multiply_lines(
                        *(gradients, directions * saved_size, rows),
                        *(advance(weight, group * gate_size * input_size + column), input_size, gate_size),
                        *(min(wide, columns), target, stride, add),
                    )

    @jit
    def products(call, thread, team, zero):
        directions, sources, examples = call[field.DIRECTIONS], call[field.SOURCES], call[field.EXAMPLES]
        size, state_size, input_size = call[field.HIDDEN_SIZE], call[field.STATE_SIZE], call[field.INPUT_SIZE]
        gate_size, saved_size = gate_count * size, saved_count * size
        # The GRU's n has a gradient of its own on the hidden state's side, behind the others.
        one_side = (gate_count - 1) * size if two_sided else gate_size
        scratch = advance(as_pointer(call[field.SCRATCH], zero), thread * call[field.SCRATCH_SIZE])
        wanted_ih = types.int64(call[field.D_WEIGHT_IH] != 0) + 2 * types.int64(call[field.D_BIAS_IH] != 0)
        wanted_hh = types.int64(call[field.D_WEIGHT_HH] != 0) + 2 * types.int64(call[field.D_BIAS_HH] != 0)
        wanted_hr = types.int64(call[field.D_WEIGHT_HR] != 0)
        dgates = as_pointer(call[field.DGATES], zero)
        count = call[field.ROWS] // examples

        rows = gate_size * directions * (types.int64(wanted_ih != 0) + types.int64(wanted_hh != 0))
        chunk = rows // (ITEMS_PER_THREAD * team) // WEIGHT_ROWS_LEAST * WEIGHT_ROWS_LEAST
        chunk = max(WEIGHT_ROWS_LEAST, min(WEIGHT_ROWS, chunk))
        groups = directions * examples
        items_ih = panels_of(gate_size, chunk) * groups if wanted_ih else types.int64(0)
        items_hh = panels_of(one_side, chunk) * groups if wanted_hh else types.int64(0)
        items_n = panels_of(size, chunk) * groups if wanted_hh and two_sided else types.int64(0)
        items_hr = panels_of(state_size, chunk) * groups if wanted_hr else types.int64(0)
        items_x = panels_of(call[field.ROWS], INPUT_ROWS) * sources if call[field.DX] != 0 else types.int64(0)

        while True:
            item = take(call, PRODUCTS)
            if item < items_x:
                input_rows(call, item // sources * INPUT_ROWS, item % sources, zero)
                continue
            item -= items_x
            if item < items_ih:
                n = item // groups * chunk
                direction, example = item % groups % directions, item % groups // directions
                of_group = example * directions + direction
                source = as_pointer(call[field.X], zero)
                source = advance(source, (example * sources + direction * sources // directions) * input_size)
                weight_rows(
                    *(advance(dgates, of_group * saved_size + n), groups * saved_size, min(chunk, gate_size - n)),
                    *(count, source, examples * sources * input_size, input_size),
                    advance(as_pointer(call[field.D_WEIGHT_IH], zero), (of_group * gate_size + n) * input_size),
                    advance(as_pointer(call[field.D_BIAS_IH], zero), of_group * gate_size + n),
                    *(scratch, wanted_ih),
                )
                continue
            item -= items_ih
            if item < items_hh + items_n:
                on_side = item < items_hh
                first, end = (types.int64(0), one_side) if on_side else (one_side, gate_size)
                item = item if on_side else item - items_hh
                n = first + item // groups * chunk
                of_group = item % groups  # example * directions + direction
                column = n if on_side else n + size
                source = advance(as_pointer(call[field.HIDDEN_PREV], zero), of_group * state_size)
                weight_rows(
                    *(advance(dgates, of_group * saved_size + column), groups * saved_size, min(chunk, end - n)),
                    *(count, source, groups * state_size, state_size),
                    advance(as_pointer(call[field.D_WEIGHT_HH], zero), (of_group * gate_size + n) * state_size),
                    advance(as_pointer(call[field.D_BIAS_HH], zero), of_group * gate_size + n),
                    *(scratch, wanted_hh),
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
                *(target, target, scratch, wanted_hr),
            )

    return products
