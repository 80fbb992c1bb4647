"""The step of each cell and its derivative, one vector of hidden units at a time: the only Numba cell maths.

Every function works on ``count`` neighbouring units, from unit ``j`` of a row on. ``size`` is the hidden size:
gate k of unit j stands at ``k * size + j``.

Forward: ``product`` is W_hh h of the row, ``gates_x`` its input projection with the biases; ``hidden_prev`` and
``hidden`` are the state before and after the step (they may be the same), ``cell`` is updated in place; ``gates`` takes
what the backward step needs and may be the same as ``gates_x``.

Backward: ``dh`` holds the gradient of the new hidden state; ``dc`` that of the new cell state, replaced by that of the
old one. ``dgates`` takes the gradients of the pre-activation gates, and may be the same as ``gates``: of the LSTM and
the RNN in the order of the gates; of the GRU those of r, z and n on the input's side, then that of n on the hidden
state's side. ``dh`` is left with the share of the gradient that reaches the old hidden state past W_hh: of use to the
GRU only.
"""

from .numba_simd import (
    at_least,
    at_most,
    inline,
    is_single_precision,
    load,
    magnitude,
    power_of_two,
    rounder,
    store,
    where_below,
    with_sign_of,
    zero_unless_positive,
)

LOG2_E = 1.4426950408889634
# ln 2 in two parts: the first has few enough bits that n * LN2_HIGH is exact for every exponent n.
LN2_HIGH_32, LN2_LOW_32 = 0.693145751953125, 1.42860682030941723e-06
LN2_HIGH_64, LN2_LOW_64 = 6.93147180369123816490e-01, 1.90821492927058770002e-10


@inline
def _exp_parts(x):
    """``(s, p)`` with exp(x) = s * (1 + p) and s a power of two: p = expm1(r) for |r| <= ln(2) / 2.

    The Taylor series up to r**7 (float32) or r**13 (float64) is exact to a quarter of an ulp.
    """
    shifted = x * LOG2_E + rounder(x)
    n = shifted - rounder(x)
    if is_single_precision(x):
        r = (x - n * LN2_HIGH_32) - n * LN2_LOW_32
        q = r * (1.0 / 5040.0) + 1.0 / 720.0
    else:
        r = (x - n * LN2_HIGH_64) - n * LN2_LOW_64
        q = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0
        q = q * r + 1.0 / 39916800.0
        q = q * r + 1.0 / 3628800.0
        q = q * r + 1.0 / 362880.0
        q = q * r + 1.0 / 40320.0
        q = q * r + 1.0 / 5040.0
        q = q * r + 1.0 / 720.0
    q = q * r + 1.0 / 120.0
    q = q * r + 1.0 / 24.0
    q = q * r + 1.0 / 6.0
    q = q * r + 0.5
    return power_of_two(shifted), (q * r) * r + r


@inline
def sigmoid(x):
    """``1 / (1 + exp(-x))``; results under the smallest normal number become zero."""
    # exp(-x) must neither underflow to nonsense, where power_of_two would, nor stop short of infinity
    lowest, highest = (-87.0, 89.0) if is_single_precision(x) else (-708.0, 710.0)
    s, p = _exp_parts(at_most(at_least(-x, lowest), highest))
    return 1.0 / (s * (p + 1.0) + 1.0)


@inline
def tanh(x):
    """Within 1 ulp in float32, where 1 - tanh(x)**2 in the backward pass would magnify more; 3 ulp in float64."""
    if is_single_precision(x):
        # near zero x + x**3 * q(x**2), a minimax fit of (tanh(x) / x - 1) / x**2 on |x| < 0.625 with relative
        # error 4.4e-9
        square = x * x
        q = square * -0.00570493 + 0.02063903
        q = q * square + -0.0537397
        q = q * square + 0.13331442
        q = q * square + -0.33333282
        near_zero = x + x * (square * q)
        s, p = _exp_parts(at_most(magnitude(x) * 2.0, 60.0))
        elsewhere = with_sign_of(1.0 - 2.0 / (s * (p + 1.0) + 1.0), x)
        return where_below(magnitude(x), 0.625, near_zero, elsewhere)
    # -m / (2 + m) with m = expm1(-2 |x|) keeps its relative accuracy near zero
    s, p = _exp_parts(at_least(magnitude(x) * -2.0, -60.0))
    m = s * p + (s - 1.0)
    return with_sign_of(m / (m + 2.0), x)


@inline
def rnn_tanh_forward(product, across, gates_x, bias_hn, hidden_prev, hidden, cell, gates, size, j, count, save):
    h = tanh(load(product, j, count) + load(gates_x, j, count))
    store(hidden, j, count, h)
    if save:
        store(gates, j, count, h)


@inline
def rnn_tanh_backward(gates, hidden_prev, cell_prev, dh, dc, dgates, size, j, count):
    h = load(gates, j, count)
    store(dgates, j, count, load(dh, j, count) * (1.0 - h * h))


@inline
def rnn_relu_forward(product, across, gates_x, bias_hn, hidden_prev, hidden, cell, gates, size, j, count, save):
    h = at_least(load(product, j, count) + load(gates_x, j, count), 0.0)
    store(hidden, j, count, h)
    if save:
        store(gates, j, count, h)


@inline
def rnn_relu_backward(gates, hidden_prev, cell_prev, dh, dc, dgates, size, j, count):
    store(dgates, j, count, zero_unless_positive(load(dh, j, count), load(gates, j, count)))


@inline
def gru_forward(product, across, gates_x, bias_hn, hidden_prev, hidden, cell, gates, size, j, count, save):
    r = sigmoid(load(product, j, count) + load(gates_x, j, count))
    z = sigmoid(load(product, across + j, count) + load(gates_x, size + j, count))
    hn = load(product, 2 * across + j, count) + load(bias_hn, j, count)
    n = tanh(load(gates_x, 2 * size + j, count) + r * hn)
    store(hidden, j, count, (1.0 - z) * n + z * load(hidden_prev, j, count))
    if save:
        store(gates, j, count, r)
        store(gates, size + j, count, z)
        store(gates, 2 * size + j, count, n)
        store(gates, 3 * size + j, count, hn)


@inline
def gru_backward(gates, hidden_prev, cell_prev, dh, dc, dgates, size, j, count):
    r = load(gates, j, count)
    z = load(gates, size + j, count)
    n = load(gates, 2 * size + j, count)
    hn = load(gates, 3 * size + j, count)
    d = load(dh, j, count)
    dn = d * (1.0 - z) * (1.0 - n * n)
    dz = d * (load(hidden_prev, j, count) - n) * z * (1.0 - z)
    dr = dn * hn * r * (1.0 - r)
    store(dgates, j, count, dr)
    store(dgates, size + j, count, dz)
    store(dgates, 2 * size + j, count, dn)
    store(dgates, 3 * size + j, count, dn * r)
    store(dh, j, count, d * z)


@inline
def lstm_forward(product, across, gates_x, bias_hn, hidden_prev, hidden, cell, gates, size, j, count, save):
    i = sigmoid(load(product, j, count) + load(gates_x, j, count))
    f = sigmoid(load(product, across + j, count) + load(gates_x, size + j, count))
    g = tanh(load(product, 2 * across + j, count) + load(gates_x, 2 * size + j, count))
    o = sigmoid(load(product, 3 * across + j, count) + load(gates_x, 3 * size + j, count))
    c = f * load(cell, j, count) + i * g
    store(cell, j, count, c)
    store(hidden, j, count, o * tanh(c))
    if save:
        store(gates, j, count, i)
        store(gates, size + j, count, f)
        store(gates, 2 * size + j, count, g)
        store(gates, 3 * size + j, count, o)


@inline
def lstm_backward(gates, hidden_prev, cell_prev, dh, dc, dgates, size, j, count):
    i = load(gates, j, count)
    f = load(gates, size + j, count)
    g = load(gates, 2 * size + j, count)
    o = load(gates, 3 * size + j, count)
    c_prev = load(cell_prev, j, count)
    tanh_c = tanh(f * c_prev + i * g)
    d = load(dh, j, count)
    d_cell = load(dc, j, count) + d * o * (1.0 - tanh_c * tanh_c)
    store(dgates, j, count, d_cell * g * i * (1.0 - i))
    store(dgates, size + j, count, d_cell * c_prev * f * (1.0 - f))
    store(dgates, 2 * size + j, count, d_cell * i * (1.0 - g * g))
    store(dgates, 3 * size + j, count, d * tanh_c * o * (1.0 - o))
    store(dc, j, count, d_cell * f)


FORWARD = {
    "rnn_tanh": rnn_tanh_forward,
    "rnn_relu": rnn_relu_forward,
    "gru": gru_forward,
    "lstm": lstm_forward,
}
BACKWARD = {
    "rnn_tanh": rnn_tanh_backward,
    "rnn_relu": rnn_relu_backward,
    "gru": gru_backward,
    "lstm": lstm_backward,
}
