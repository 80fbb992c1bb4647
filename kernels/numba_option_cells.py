"""The steps of cells beyond torch.nn's and their derivatives, and what is done to rows between them.

Functions of one vector work as those of ``numba_cells.py`` do, on ``count`` units from unit ``j`` on.
"""

import math

from .numba_cells import BACKWARD, FORWARD, sigmoid, tanh
from .numba_scan import LAYOUTS
from .numba_simd import advance, inline, jit, lanes, load, store, sum_of

EPSILON = 1e-5


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


each_scaled = each_vector(_scaled)


@jit
def normalize(source, target, columns):
    """target = (source - mean) / deviation, for ``columns`` values; gives 1 / deviation."""
    vector = lanes(source)
    full = columns - columns % vector
    total = load(source, 0, 0)
    for j in range(0, full, vector):
        total = total + load(source, j, vector)
    if full < columns:
        total = total + load(source, full, columns - full)
    mean = sum_of(total) / columns
    squares = load(source, 0, 0)
    for j in range(0, full, vector):
        squares = _centre(source, target, mean, squares, j, vector)
    if full < columns:
        squares = _centre(source, target, mean, squares, full, columns - full)
    scale = 1.0 / math.sqrt(sum_of(squares) / columns + EPSILON)
    each_scaled(columns, vector, target, scale)
    return scale


@inline
def _normalize_backward(normalized, scale, weight, gradient, target, mean, slope, j, count):
    d = load(gradient, j, count) * load(weight, j, count)
    store(target, j, count, (d - load(normalized, j, count) * slope - mean) * scale)


each_normalize_backward = each_vector(_normalize_backward)


@jit
def normalize_backward(normalized, scale, weight, gradient, target, columns):
    """The gradient of ``normalize``'s source, from that of weight * target + bias; may be written over it."""
    vector = lanes(normalized)
    full = columns - columns % vector
    total = product = load(gradient, 0, 0)
    for j in range(0, full, vector):
        d = load(gradient, j, vector) * load(weight, j, vector)
        total = total + d
        product = product + d * load(normalized, j, vector)
    if full < columns:
        d = load(gradient, full, columns - full) * load(weight, full, columns - full)
        total = total + d
        product = product + d * load(normalized, full, columns - full)
    mean, slope = sum_of(total) / columns, sum_of(product) / columns
    each_normalize_backward(columns, vector, normalized, scale, weight, gradient, target, mean, slope)


@inline
def _scale(factors, source, target, j, count):
    store(target, j, count, load(factors, j, count) * load(source, j, count))


each_scale = each_vector(_scale)


@jit
def scale_row(factors, source, target, columns):
    """target = factors ⊙ source."""
    each_scale(columns, lanes(target), factors, source, target)


@inline
def _scale_and_shift(source, factors, shift, target, j, count):
    store(target, j, count, load(source, j, count) * load(factors, j, count) + load(shift, j, count))


each_scaled_and_shifted = each_vector(_scale_and_shift)


@inline
def _mix(keep, old, new, target, j, count):
    share = load(keep, j, count)
    store(target, j, count, share * load(old, j, count) + (1.0 - share) * load(new, j, count))


each_mix = each_vector(_mix)


@jit
def mix_rows(keep, keep_stride, old, new, target, rows, columns):
    """target = keep ⊙ old + (1 - keep) ⊙ new; rows of ``keep`` are ``keep_stride`` apart."""
    for row in range(rows):
        at = row * columns
        row_old, row_new, row_target = advance(old, at), advance(new, at), advance(target, at)
        each_mix(columns, lanes(target), advance(keep, row * keep_stride), row_old, row_new, row_target)


@inline
def _split(keep, gradient, kept, j, count):
    share, d = load(keep, j, count), load(gradient, j, count)
    store(kept, j, count, share * d)
    store(gradient, j, count, (1.0 - share) * d)


each_split = each_vector(_split)


@jit
def split_rows(keep, keep_stride, gradient, kept, rows, columns):
    """kept = keep ⊙ gradient, and gradient = (1 - keep) ⊙ gradient: the backward pass of ``mix_rows``."""
    for row in range(rows):
        at = row * columns
        shares = advance(keep, row * keep_stride)
        each_split(columns, lanes(gradient), shares, advance(gradient, at), advance(kept, at))


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


each_combine = each_vector(_combine)


@jit
def combine(product, mask, masked, dh, direct, kept, keeps, size):
    """dh = product ⊙ mask, and what reaches the old state past W_hh: ``dh`` where ``direct``, ``kept`` of a mix."""
    each_combine(size, lanes(dh), product, mask, masked, dh, direct, kept, keeps)


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


each_lstm_step = each_vector(lstm_step)
each_lstm_output = each_vector(lstm_output)
each_lstm_new_cell = each_vector(lstm_new_cell)
each_lstm_output_backward = each_vector(lstm_output_backward)
each_lstm_step_backward = each_vector(lstm_step_backward)
each_gru_reset = each_vector(gru_reset)
each_gru_output = each_vector(gru_output)
each_gru_output_backward = each_vector(gru_output_backward)
each_gru_reset_backward = each_vector(gru_reset_backward)


def blocks(cell: str, reset_after: bool) -> tuple[int, int]:
    """Blocks of the hidden size in a cell's gates, and in what the backward pass needs of them."""
    gates, saved = LAYOUTS[cell]
    return gates, saved if reset_after else gates


def make_forward_step(cell: str, reset_after: bool, norm: bool, jit):
    """The cell's step for one row, and for the textbook's GRU the product within it."""
    if cell == "lstm":

        @jit
        def step(product, gates_x, bias_hn, old, new, cell, new_cell, seen, parameters, gates, size, save):
            weight_ci, weight_cf, weight_co, weight_ln, bias_ln, peephole = parameters
            vector = lanes(product)
            each_lstm_step(
                *(size, vector, product, gates_x, weight_ci, weight_cf, weight_co, cell, new_cell, gates),
                *(size, peephole, save),
            )
            if norm:
                normalize(new_cell, seen, size)
            else:
                seen = new_cell
            o = advance(product, 3 * size)
            each_lstm_output(size, vector, o, seen, weight_ln, bias_ln, new, norm)

        return step
    if reset_after:
        step_forward = FORWARD[cell]

        @jit
        def step(product, gates_x, bias_hn, old, new, cell, new_cell, seen, parameters, gates, size, save):
            vector = lanes(product)
            full = size - size % vector
            for j in range(0, full, vector):
                step_forward(product, size, gates_x, bias_hn, old, new, cell, gates, size, j, vector, save)
            if full < size:
                step_forward(product, size, gates_x, bias_hn, old, new, cell, gates, size, full, size - full, save)

        return step

    @jit
    def step(product, gates_x, bias_hn, old, new, cell, new_cell, seen, parameters, gates, size, save):
        each_gru_output(size, lanes(product), product, gates_x, old, new, gates, size, save)

    return step


def make_backward_step(cell: str, reset_after: bool, norm: bool, jit):
    """The derivative of the cell's step for one row.

    ``dgates`` takes the gradients of the gates, laid out as in ``numba_cells.py``. Of the LSTM ``new_cell`` takes c',
    and ``d_new_cell`` is scratch of the hidden size.
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
            new_cell,
            normalized_c,
            d_normalized_c,
            parameters,
            d_new_cell,
            size,
        ):
            weight_ci, weight_cf, weight_co, weight_ln, bias_ln, peephole = parameters
            vector = lanes(dh)
            each_lstm_new_cell(size, vector, gates, cell_prev, new_cell, size)
            scale = 1.0
            if norm:
                scale = normalize(new_cell, normalized_c, size)
            seen, d_seen = (normalized_c, d_normalized_c) if norm else (new_cell, d_new_cell)
            d_o = advance(dgates, 3 * size)
            each_lstm_output_backward(size, vector, gates, seen, weight_ln, bias_ln, dh, d_o, d_seen, size, norm)
            if norm:
                normalize_backward(normalized_c, scale, weight_ln, d_seen, d_new_cell, size)
            each_lstm_step_backward(
                *(size, vector, gates, cell_prev, weight_ci, weight_cf, weight_co, d_new_cell, dc, dgates),
                *(size, peephole),
            )

        return step
    each = each_vector(BACKWARD[cell])

    @jit
    def step(
        gates,
        hidden_prev,
        cell_prev,
        dh,
        dc,
        dgates,
        new_cell,
        normalized_c,
        d_normalized_c,
        parameters,
        d_new_cell,
        size,
    ):
        each(size, lanes(dh), gates, hidden_prev, cell_prev, dh, dc, dgates, size)

    return step
