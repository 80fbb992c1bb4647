// Regime S: one block walks through time alone, with all hidden units of some sequences of one direction.
//
// Warp w has units 16w to 16w + 15, all gates, the whole depth: its weights stay in registers, and the products come
// out in the threads that take the pointwise step. What the next product needs (h, or dgates) goes through shared
// memory, two copies in turn, with one barrier a step:
//
//     shared memory (sequence, element) -> products -> pointwise step -> shared memory, other copy -> barrier
//
// Grid: directions times batch tiles of 8 * TILES sequences. A thread has, for each tile, units 2r and 2r + 1 of its
// warp's 16 and sequences 2q and 2q + 1, as `multiply` leaves them.
#pragma once

#include "scan.cuh"

// Words between the columns in shared memory: 16 words more than a multiple of 32, so that the lanes of a load meet in
// no bank.
HOST_DEVICE int shared_stride(int chunks) {
    return chunks * 16 + (chunks % 2 == 0 ? 16 : 0);
}

// Chunks of the depth that a block takes alone: what fits into registers and, for the kernels that need more of these
// for other things, into shared memory.
template <class Cell>
constexpr int ALONE_MOST_CHUNKS = Cell::GATES == 1 ? 8 : 4;

// Whether what a step reads is loaded one step ahead. With two tiles, or three products for one, there are no registers
// for it.
template <class T, int TILES>
constexpr bool AHEAD = TILES == 1 && !std::is_same<T, Float32>::value;

// Elements of two neighbouring units.
template <class T>
struct alignas(2 * sizeof(T)) Pair {
    T first, second;
};

// `even`: whether H is even, so that all pairs are whole and aligned (tensors begin at multiples of 16 bytes). It is
// the same for the whole launch.
template <class T>
DEVICE Pair<T> load_pair(const T* source, int there, bool even) {
    Pair<T> pair = {};
    if (even) {
        if (there > 0) pair = load_vector<Pair<T>>(source);
        return pair;
    }
    if (there >= 1) pair.first = source[0];
    if (there >= 2) pair.second = source[1];
    return pair;
}

template <class T>
DEVICE void store_pair(T* target, float first, float second, int there, bool even) {
    Pair<T> pair;
    convert(first, pair.first);
    convert(second, pair.second);
    if (even) {
        if (there > 0) store_vector(target, pair);
    } else {
        if (there >= 1) target[0] = pair.first;
        if (there >= 2) target[1] = pair.second;
    }
}

// Put two neighbouring units where products find them. Those that are not there are zeros: an infinite state makes NaN
// of them, by their weights of zero.
template <class T>
DEVICE void share_pair(uint32_t* column, int unit, float first, float second, int there) {
    first = there > 0 ? first : 0.0f;
    second = there > 1 ? second : 0.0f;
    if constexpr (T::PER_WORD == 2) {
        store_shared(column + unit / 2, word_of<T>(first, second));
    } else {
        store_shared(column + unit, as_operand<T>(as_bits(first)));
        store_shared(column + unit + 1, as_operand<T>(as_bits(second)));
    }
}

// What a thread of a block that is alone works on.
struct Place {
    int group, lane;
    int unit, there;  // the first of its two units, and how many of the two there are
    int sequence;     // the first of its two sequences in the block's first tile
    bool even;        // whether H is
};

template <int TILES>
DEVICE Place place_of(const Arguments& p) {
    const int tiles = batch_tiles(p, TILES);
    Place at;
    at.group = block_x() / tiles;
    at.lane = thread() % WARP;
    at.unit = thread() / WARP * UNITS + 2 * (at.lane / 4);
    at.there = p.size - at.unit;
    at.sequence = block_x() % tiles * COLUMNS * TILES + 2 * (at.lane % 4);
    at.even = p.size % 2 == 0;
    return at;
}

// Index of the thread's first unit in an array (rows, D, blocks, H), of a block of units.
DEVICE int64_t index_of(const Arguments& p, const Place& at, int64_t row, int blocks = 1, int block = 0) {
    return ((row * p.groups + at.group) * blocks + block) * p.size + at.unit;
}

// Index of the thread's first unit in a state (D, B, H).
DEVICE int64_t state_of(const Arguments& p, const Place& at, int sequence) {
    return (static_cast<int64_t>(at.group) * p.batch + sequence) * p.size + at.unit;
}

// The other copy is written while one is read. Products run over whole chunks, so that what no unit fills must be zero.
DEVICE void clear_shared(int words) {
    for (int n = 4 * thread(); n < words; n += 4 * threads()) store_shared4(shared_memory() + n, Words{});
}

// Sums of products of weights and columns in shared memory, of gate g those `gate_stride` words after those of gate 0.
template <int MOST, class T, int GATES, int KEPT, int TILES>
DEVICE void multiply_shared(const Weights<T, GATES, KEPT>& weights, int chunks, const uint32_t* columns, int stride,
                            int gate_stride, float (&products)[TILES][GATES][4]) {
    columns += thread() % WARP / 4 * stride + thread() % 4 * 4;
    const auto add = [&](int chunk, const auto& tile_of) {
        UNROLLED (int tile = 0; tile < TILES; ++tile) {
            Words column;
            UNROLLED (int gate = 0; gate < GATES; ++gate) {
                if (gate == 0 || gate_stride != 0)
                    column = load_shared4(columns + tile * COLUMNS * stride + gate * gate_stride + chunk * 16);
                multiply<T>(products[tile][gate], tile_of(gate), column);
            }
        }
    };
    UNROLLED (int chunk = 0; chunk < KEPT; ++chunk)
        if (chunk < chunks) add(chunk, [&](int gate) -> const Tile& { return weights.kept[gate][chunk]; });
    UNROLLED (int chunk = KEPT; chunk < MOST; ++chunk)
        if (chunk < chunks) add(chunk, [&](int gate) { return weights.extra_tile(gate, chunk); });
}

template <class Cell, class T, int TILES>
DEVICE void forward_alone(const Arguments& p) {
    constexpr int GATES = Cell::GATES, SAVED = Cell::SAVED;
    const Place at = place_of<TILES>(p);
    const int chunks = (p.size + CHUNK<T> - 1) / CHUNK<T>, stride = shared_stride(chunks);
    const int copy = COLUMNS * TILES * stride;
    uint32_t* const shared = shared_memory();
    T *const output = static_cast<T*>(p.output), *const reserve = static_cast<T*>(p.gates);
    T *const hidden_prev = static_cast<T*>(p.hidden_prev), *const cell_prev = static_cast<T*>(p.cell_prev);

    Weights<T, GATES, KEPT_CHUNKS<Cell, T, TILES, true>> weights;
    weights.load(static_cast<const T*>(p.weights) + static_cast<int64_t>(at.group) * GATES * p.size * p.size, p.size,
                 thread() / WARP * UNITS, 0, 1, chunks, shared + 2 * copy);
    Pair<T> bias_hn = {};
    if (Cell::HAS_BIAS_HN)
        bias_hn = load_pair(static_cast<const T*>(p.bias_hn) + static_cast<int64_t>(at.group) * p.size + at.unit,
                            at.there, at.even);
    const float bias[2] = {to_float(bias_hn.first), to_float(bias_hn.second)};

    // of every tile's sequences 2q and 2q + 1, units 2r and 2r + 1
    float hidden[TILES][2][2] = {}, cell[TILES][2][2] = {};
    UNROLLED (int tile = 0; tile < TILES; ++tile)
        UNROLLED (int j = 0; j < 2; ++j) {
            const int sequence = at.sequence + tile * COLUMNS + j;
            UNROLLED (int i = 0; i < 2; ++i)
                if (sequence < p.batch && i < at.there) {
                    hidden[tile][j][i] = p.hidden[state_of(p, at, sequence) + i];
                    if (Cell::HAS_CELL) cell[tile][j][i] = p.cell[state_of(p, at, sequence) + i];
                }
        }

    Pair<T> gates_x[TILES][2][GATES], coming[TILES][2][GATES];
    const auto load_gates = [&](const Step& step, auto& into) {
        UNROLLED (int tile = 0; tile < TILES; ++tile)
            UNROLLED (int j = 0; j < 2; ++j) {
                const int sequence = at.sequence + tile * COLUMNS + j;
                UNROLLED (int gate = 0; gate < GATES; ++gate)
                    into[tile][j][gate] = load_pair(
                        static_cast<const T*>(p.gates_x) + index_of(p, at, step.first + sequence, GATES, gate),
                        sequence < step.running ? at.there : 0, at.even);
            }
    };
    bool reset[TILES][2];
    const auto load_resets = [&](const Step& step) {
        UNROLLED (int tile = 0; tile < TILES; ++tile)
            UNROLLED (int j = 0; j < 2; ++j) {
                const int sequence = at.sequence + tile * COLUMNS + j;
                reset[tile][j] = sequence < step.running && is_reset(p, step.first + sequence, at.group);
            }
    };
    // Before the step: forget what is reset, and put the state where the products find it.
    const auto share_state = [&](uint32_t* target) {
        UNROLLED (int tile = 0; tile < TILES; ++tile)
            UNROLLED (int j = 0; j < 2; ++j) {
                float (&h)[2] = hidden[tile][j];
                if (reset[tile][j]) h[0] = h[1] = cell[tile][j][0] = cell[tile][j][1] = 0.0f;
                share_pair<T>(target + (tile * COLUMNS + 2 * (at.lane % 4) + j) * stride, at.unit, h[0], h[1],
                              at.there);
            }
    };

    clear_shared(2 * copy);
    block_sync();
    Step step = step_at(p, time_of<false>(p, at.group, 0));
    if (AHEAD<T, TILES>) load_gates(step, coming);
    load_resets(step);
    share_state(shared);
    block_sync();

    for (int count = 0; count < p.steps; ++count) {
        const Step next = step_at(p, time_of<false>(p, at.group, count + 1 < p.steps ? count + 1 : count));
        if (AHEAD<T, TILES>) {
            UNROLLED (int tile = 0; tile < TILES; ++tile)
                UNROLLED (int j = 0; j < 2; ++j)
                    UNROLLED (int gate = 0; gate < GATES; ++gate) gates_x[tile][j][gate] = coming[tile][j][gate];
            load_gates(next, coming);
        } else {
            load_gates(step, gates_x);
        }
        load_resets(next);  // here, not where they are asked for: others wait for this thread then

        float products[TILES][GATES][4] = {};
        multiply_shared<ALONE_MOST_CHUNKS<Cell>>(weights, chunks, shared + (count & 1) * copy, stride, 0, products);

        UNROLLED (int tile = 0; tile < TILES; ++tile)
            UNROLLED (int j = 0; j < 2; ++j) {
                const int sequence = at.sequence + tile * COLUMNS + j;
                if (sequence >= step.running) continue;
                const int64_t row = step.first + sequence;
                float (&h)[2] = hidden[tile][j], (&c)[2] = cell[tile][j];
                if (reserve != nullptr) {
                    store_pair(hidden_prev + index_of(p, at, row), h[0], h[1], at.there, at.even);
                    if (Cell::HAS_CELL) store_pair(cell_prev + index_of(p, at, row), c[0], c[1], at.there, at.even);
                }
                float saved[2][SAVED];
                UNROLLED (int i = 0; i < 2; ++i) {
                    float of_gate[GATES], x[GATES];
                    UNROLLED (int gate = 0; gate < GATES; ++gate) {
                        const Pair<T>& pair = gates_x[tile][j][gate];
                        of_gate[gate] = products[tile][gate][2 * i + j];
                        x[gate] = to_float(i ? pair.second : pair.first);
                    }
                    Cell::template forward<T::EXACT>(p.variant, of_gate, x, bias[i], h[i], c[i], saved[i]);
                }
                store_pair(output + index_of(p, at, row), h[0], h[1], at.there, at.even);
                if (Cell::HAS_CELL && p.cells != nullptr)
                    store_pair(static_cast<T*>(p.cells) + index_of(p, at, row), c[0], c[1], at.there, at.even);
                if (reserve != nullptr)
                    UNROLLED (int block = 0; block < SAVED; ++block)
                        store_pair(reserve + index_of(p, at, row, SAVED, block), saved[0][block], saved[1][block],
                                   at.there, at.even);
            }

        step = next;
        if (count + 1 < p.steps) share_state(shared + ((count + 1) & 1) * copy);
        block_sync();
    }

    UNROLLED (int tile = 0; tile < TILES; ++tile)
        UNROLLED (int j = 0; j < 2; ++j) {
            const int sequence = at.sequence + tile * COLUMNS + j;
            UNROLLED (int i = 0; i < 2; ++i)
                if (sequence < p.batch && i < at.there) {
                    p.hidden[state_of(p, at, sequence) + i] = hidden[tile][j][i];
                    if (Cell::HAS_CELL) p.cell[state_of(p, at, sequence) + i] = cell[tile][j][i];
                }
        }
}

template <class Cell, class T, int TILES>
DEVICE void backward_alone(const Arguments& p) {
    constexpr int GATES = Cell::GATES, SAVED = Cell::SAVED, FIRST = FIRST_DGATE<Cell>;
    const Place at = place_of<TILES>(p);
    const int chunks = (p.size + CHUNK<T> - 1) / CHUNK<T>, stride = shared_stride(GATES * chunks);
    const int copy = COLUMNS * TILES * stride;
    uint32_t* const shared = shared_memory();
    T* const dgates = static_cast<T*>(p.dgates);

    Weights<T, GATES, KEPT_CHUNKS<Cell, T, TILES, true>> weights;
    weights.load(static_cast<const T*>(p.weights) + static_cast<int64_t>(at.group) * GATES * p.size * p.size, p.size,
                 thread() / WARP * UNITS, 0, 1, chunks, shared + 2 * copy);

    // The gradient of the state after the step, or of the part of it that has no product in it yet.
    float dh[TILES][2][2] = {}, dc[TILES][2][2] = {};
    // Whether a sequence took the step before, and whether its state was reset there.
    bool ran[TILES][2] = {}, reset[TILES][2] = {};
    UNROLLED (int tile = 0; tile < TILES; ++tile)
        UNROLLED (int j = 0; j < 2; ++j) {
            const int sequence = at.sequence + tile * COLUMNS + j;
            UNROLLED (int i = 0; i < 2; ++i)
                if (sequence < p.batch && i < at.there) {
                    dh[tile][j][i] = p.hidden[state_of(p, at, sequence) + i];
                    if (Cell::HAS_CELL) dc[tile][j][i] = p.cell[state_of(p, at, sequence) + i];
                }
        }

    struct Inputs {
        Pair<T> saved[SAVED], hidden_prev, cell_prev, d_output;
    };
    const auto gradient_at = [&](const void* gradient, int64_t row, int there) {
        return load_pair(static_cast<const T*>(gradient) + index_of(p, at, row), gradient != nullptr ? there : 0,
                         at.even);
    };
    const auto load_inputs = [&](const Step& step, int tile, int j) {
        const int sequence = at.sequence + tile * COLUMNS + j;
        const int64_t row = step.first + sequence;
        const int there = sequence < step.running ? at.there : 0;
        Inputs in = {};
        UNROLLED (int block = 0; block < SAVED; ++block)
            in.saved[block] =
                load_pair(static_cast<const T*>(p.gates) + index_of(p, at, row, SAVED, block), there, at.even);
        if (Cell::HAS_BIAS_HN)
            in.hidden_prev = load_pair(static_cast<const T*>(p.hidden_prev) + index_of(p, at, row), there, at.even);
        if (Cell::HAS_CELL)
            in.cell_prev = load_pair(static_cast<const T*>(p.cell_prev) + index_of(p, at, row), there, at.even);
        in.d_output = gradient_at(p.output, row, there);
        return in;
    };
    Inputs inputs[TILES][2] = {};
    const auto load_ahead = [&](const Step& step) {
        UNROLLED (int tile = 0; tile < TILES; ++tile)
            UNROLLED (int j = 0; j < 2; ++j) inputs[tile][j] = load_inputs(step, tile, j);
    };
    // dh += W^T dgates of the step before, which copy `count & 1` holds.
    const auto add_products = [&](int count) {
        float products[TILES][GATES][4] = {};
        multiply_shared<ALONE_MOST_CHUNKS<Cell>>(weights, chunks, shared + (count & 1) * copy, stride, chunks * 16,
                                                 products);
        UNROLLED (int tile = 0; tile < TILES; ++tile)
            UNROLLED (int j = 0; j < 2; ++j)
                if (ran[tile][j])
                    UNROLLED (int i = 0; i < 2; ++i) {
                        UNROLLED (int gate = 0; gate < GATES; ++gate) dh[tile][j][i] += products[tile][gate][2 * i + j];
                        if (reset[tile][j]) dh[tile][j][i] = dc[tile][j][i] = 0.0f;
                    }
    };

    clear_shared(2 * copy);
    Step step = step_at(p, time_of<true>(p, at.group, 0));
    if (AHEAD<T, TILES>) load_ahead(step);
    block_sync();

    for (int count = 0; count < p.steps; ++count) {
        const Step next = step_at(p, time_of<true>(p, at.group, count + 1 < p.steps ? count + 1 : count));
        Inputs now[TILES][2];
        if (AHEAD<T, TILES>) {
            UNROLLED (int tile = 0; tile < TILES; ++tile)
                UNROLLED (int j = 0; j < 2; ++j) now[tile][j] = inputs[tile][j];
            load_ahead(next);
        }
        add_products(count);

        uint32_t* const target = shared + ((count + 1) & 1) * copy + 2 * (at.lane % 4) * stride;
        UNROLLED (int tile = 0; tile < TILES; ++tile)
            UNROLLED (int j = 0; j < 2; ++j) {
                const int sequence = at.sequence + tile * COLUMNS + j;
                const int64_t row = step.first + sequence;
                ran[tile][j] = sequence < step.running;
                if (!ran[tile][j]) continue;
                reset[tile][j] = is_reset(p, row, at.group);
                const Inputs in = AHEAD<T, TILES> ? now[tile][j] : load_inputs(step, tile, j);
                Pair<T> d_cells = {};
                if (Cell::HAS_CELL) d_cells = gradient_at(p.cells, row, at.there);
                float d[2][SAVED];
                UNROLLED (int i = 0; i < 2; ++i) {
                    const auto one = [i](const Pair<T>& pair) { return to_float(i ? pair.second : pair.first); };
                    float saved[SAVED];
                    UNROLLED (int block = 0; block < SAVED; ++block) saved[block] = one(in.saved[block]);
                    dh[tile][j][i] += one(in.d_output);
                    if (Cell::HAS_CELL) dc[tile][j][i] += one(d_cells);
                    Cell::template backward<T::EXACT>(p.variant, saved, Cell::HAS_BIAS_HN ? one(in.hidden_prev) : 0.0f,
                                                      Cell::HAS_CELL ? one(in.cell_prev) : 0.0f, dh[tile][j][i],
                                                      dc[tile][j][i], d[i]);
                }
                UNROLLED (int block = 0; block < SAVED; ++block) {
                    store_pair(dgates + index_of(p, at, row, SAVED, block), d[0][block], d[1][block], at.there,
                               at.even);
                    if (block >= FIRST)
                        share_pair<T>(target + (tile * COLUMNS + j) * stride + (block - FIRST) * chunks * 16, at.unit,
                                      d[0][block], d[1][block], at.there);
                }
            }
        step = next;
        block_sync();
    }
    add_products(p.steps);

    UNROLLED (int tile = 0; tile < TILES; ++tile)
        UNROLLED (int j = 0; j < 2; ++j) {
            const int sequence = at.sequence + tile * COLUMNS + j;
            UNROLLED (int i = 0; i < 2; ++i)
                if (sequence < p.batch && i < at.there) {
                    p.hidden[state_of(p, at, sequence) + i] = dh[tile][j][i];
                    if (Cell::HAS_CELL) p.cell[state_of(p, at, sequence) + i] = dc[tile][j][i];
                }
        }
}
