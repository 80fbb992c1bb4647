// The step of each cell and its derivative, for one hidden unit of one sequence: the only CUDA cell maths.
//
// forward: `products` are W_hh h, one of each gate; `gates_x` the input projection with the biases that may be added to
// it; `bias_hn` the GRU's bias on the hidden state's side of n. It replaces the state and fills `saved`.
// backward: `dh` and `dc` are the gradients of the state after the step; `dgates` get those of the gates before
// activation, in the order in which they are stored: the GRU's are n on the input's side, r, z, n on the hidden state's
// side, so that those of each side are neighbours. `dh` is replaced by the part of the old state's gradient that does
// not go through W_hh, `dc` by the gradient of the old cell state.
#pragma once

#include "primitives.cuh"

DEVICE float sigmoid(float x) {
    return reciprocal(1.0f + exponential(-x));
}

// To within a few float32 roundings of 1, which is enough for half precision; if EXACT to within a few roundings of the
// result, near zero by the fit of numba_cells.tanh.
template <bool EXACT>
DEVICE float hyperbolic_tangent(float x) {
    const float size = x < 0 ? -x : x;
    const float elsewhere = 1.0f - 2.0f * reciprocal(exponential(2.0f * size) + 1.0f);
    const float result = x < 0 ? -elsewhere : elsewhere;
    if (!EXACT) return result;
    const float square = x * x;
    float q = square * -0.00570493f + 0.02063903f;
    q = q * square - 0.0537397f;
    q = q * square + 0.13331442f;
    q = q * square - 0.33333282f;
    const float near_zero = x + x * (square * q);
    return size < 0.625f ? near_zero : result;
}

struct Lstm {
    static constexpr int GATES = 4;  // blocks of hidden_size rows in W_hh: i, f, g, o
    static constexpr int SAVED = 4;  // blocks that the forward pass keeps, and blocks of dgates
    static constexpr bool HAS_CELL = true, HAS_BIAS_HN = false;

    template <bool EXACT>
    static DEVICE void forward(Variant, const float* products, const float* gates_x, float, float& hidden, float& cell,
                               float* saved) {
        const float i = sigmoid(products[0] + gates_x[0]);
        const float f = sigmoid(products[1] + gates_x[1]);
        const float g = hyperbolic_tangent<EXACT>(products[2] + gates_x[2]);
        const float o = sigmoid(products[3] + gates_x[3]);
        cell = f * cell + i * g;
        hidden = o * hyperbolic_tangent<EXACT>(cell);
        saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o;
    }

    template <bool EXACT>
    static DEVICE void backward(Variant, const float* saved, float, float cell_prev, float& dh, float& dc,
                                float* dgates) {
        const float i = saved[0], f = saved[1], g = saved[2], o = saved[3];
        const float t = hyperbolic_tangent<EXACT>(f * cell_prev + i * g);
        const float d_cell = dc + dh * o * (1.0f - t * t);
        dgates[0] = d_cell * g * i * (1.0f - i);
        dgates[1] = d_cell * cell_prev * f * (1.0f - f);
        dgates[2] = d_cell * i * (1.0f - g * g);
        dgates[3] = dh * t * o * (1.0f - o);
        dh = 0.0f;
        dc = d_cell * f;
    }
};

struct Gru {
    static constexpr int GATES = 3;  // r, z, n
    static constexpr int SAVED = 4;  // r, z, n and W_hn h + b_hn
    static constexpr bool HAS_CELL = false, HAS_BIAS_HN = true;

    template <bool EXACT>
    static DEVICE void forward(Variant, const float* products, const float* gates_x, float bias_hn, float& hidden,
                               float&, float* saved) {
        const float r = sigmoid(products[0] + gates_x[0]);
        const float z = sigmoid(products[1] + gates_x[1]);
        const float hidden_n = products[2] + bias_hn;
        const float n = hyperbolic_tangent<EXACT>(gates_x[2] + r * hidden_n);
        hidden = (1.0f - z) * n + z * hidden;
        saved[0] = r, saved[1] = z, saved[2] = n, saved[3] = hidden_n;
    }

    template <bool EXACT>
    static DEVICE void backward(Variant, const float* saved, float hidden_prev, float, float& dh, float&,
                                float* dgates) {
        const float r = saved[0], z = saved[1], n = saved[2], hidden_n = saved[3];
        const float d_n = dh * (1.0f - z) * (1.0f - n * n);
        dgates[0] = d_n;
        dgates[1] = d_n * hidden_n * r * (1.0f - r);
        dgates[2] = dh * (hidden_prev - n) * z * (1.0f - z);
        dgates[3] = d_n * r;
        dh = dh * z;
    }
};

struct Rnn {
    static constexpr int GATES = 1;
    static constexpr int SAVED = 1;  // h
    static constexpr bool HAS_CELL = false, HAS_BIAS_HN = false;

    template <bool EXACT>
    static DEVICE void forward(Variant variant, const float* products, const float* gates_x, float, float& hidden,
                               float&, float* saved) {
        const float a = products[0] + gates_x[0];
        // NaN stays NaN
        hidden = variant.relu ? (a <= 0 ? 0.0f : a) : hyperbolic_tangent<EXACT>(a);
        saved[0] = hidden;
    }

    template <bool EXACT>
    static DEVICE void backward(Variant variant, const float* saved, float, float, float& dh, float&, float* dgates) {
        const float h = saved[0];
        dgates[0] = variant.relu ? (h <= 0 ? 0.0f : dh) : dh * (1.0f - h * h);
        dh = 0.0f;
    }
};
