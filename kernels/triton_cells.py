"""The step of each cell and its derivative on tiles of rows x hidden units: the only Triton cell maths.

Every function works on tuples of tiles, one of each gate. Forward: ``products`` are W_hh h, ``gates_x`` the input
projection with the biases that may be added to it, ``bias_hn`` is the GRU's bias on the hidden state's side of n.
Backward: ``dh`` and ``dc`` are the gradients of the state after the step, ``saved`` what the forward step saved. Tiles
that a cell has no use for (``cell`` of the GRU, say) are passed on as they come.
"""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x, EXACT: tl.constexpr):
    """tanh, to within a few float32 roundings of 1 if not EXACT, which is enough for half-precision results.

    If EXACT to within a few roundings of the result: near zero float32 takes the fit of ``numba_cells.tanh`` and
    float64 the eighth convergent of Lambert's continued fraction x / (1 + x² / (3 + x² / (5 + ...))).
    """
    size = tl.abs(x)
    elsewhere = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    result = tl.where(x < 0, -elsewhere, elsewhere)
    if EXACT:
        square = x * x
        if x.dtype == tl.float64:
            numerator = ((36.0 * square + 6930.0) * square + 270270.0) * square + 2027025.0
            denominator = (((square + 630.0) * square + 51975.0) * square + 945945.0) * square + 2027025.0
            near_zero = x * (numerator / denominator)
        else:
            q = square * -0.00570493 + 0.02063903
            q = q * square + -0.0537397
            q = q * square + 0.13331442
            q = q * square + -0.33333282
            near_zero = x + x * (square * q)
        result = tl.where(size < 0.625, near_zero, result)
    return result


@triton.jit
def forward_step(CELL: tl.constexpr, products, gates_x, bias_hn, hidden, cell, EXACT: tl.constexpr):
    """The tiles to save, and the hidden and the cell state after the step."""
    if CELL == "lstm":
        i = sigmoid(products[0] + gates_x[0])
        f = sigmoid(products[1] + gates_x[1])
        g = tanh(products[2] + gates_x[2], EXACT)
        o = sigmoid(products[3] + gates_x[3])
        new_cell = f * cell + i * g
        return (i, f, g, o), o * tanh(new_cell, EXACT), new_cell
    elif CELL == "gru":
        r = sigmoid(products[0] + gates_x[0])
        z = sigmoid(products[1] + gates_x[1])
        hidden_n = products[2] + bias_hn
        n = tanh(gates_x[2] + r * hidden_n, EXACT)
        return (r, z, n, hidden_n), (1.0 - z) * n + z * hidden, cell
    elif CELL == "rnn_tanh":
        h = tanh(products[0] + gates_x[0], EXACT)
        return (h,), h, cell
    else:
        a = products[0] + gates_x[0]
        h = tl.where(a <= 0, tl.zeros_like(a), a)  # NaN stays NaN
        return (h,), h, cell


@triton.jit
def backward_step(CELL: tl.constexpr, saved, hidden_prev, cell_prev, dh, dc, EXACT: tl.constexpr):
    """Gradients of the gates before activation, of the old hidden state past W_hh, and of the old cell state.

    The gates' are in the order in which they are stored: the GRU's are n on the input's side, r, z, n on the hidden
    state's side, so that each side's three are neighbours.
    """
    if CELL == "lstm":
        i, f, g, o = saved
        t = tanh(f * cell_prev + i * g, EXACT)
        d_cell = dc + dh * o * (1.0 - t * t)
        d_i = d_cell * g * i * (1.0 - i)
        d_f = d_cell * cell_prev * f * (1.0 - f)
        d_g = d_cell * i * (1.0 - g * g)
        d_o = dh * t * o * (1.0 - o)
        return (d_i, d_f, d_g, d_o), tl.zeros_like(dh), d_cell * f
    elif CELL == "gru":
        r, z, n, hidden_n = saved
        d_n = dh * (1.0 - z) * (1.0 - n * n)
        d_r = d_n * hidden_n * r * (1.0 - r)
        d_z = dh * (hidden_prev - n) * z * (1.0 - z)
        return (d_n, d_r, d_z, d_n * r), dh * z, dc
    elif CELL == "rnn_tanh":
        return (dh * (1.0 - saved[0] * saved[0]),), tl.zeros_like(dh), dc
    else:
        return (tl.where(saved[0] <= 0, tl.zeros_like(dh), dh),), tl.zeros_like(dh), dc
