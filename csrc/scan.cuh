// What the scans have in common: their arguments, the rows of time steps, and the product with the recurrent weights.
//
// A scan walks through time with the state of some sequences, in steps of one product and one pointwise part:
//
//     forward    products[g] = W[g] h                 state, output and the reserve from gates_x and the products
//     backward   dh = sum over g of W[g]^T dgates[g]  dgates from the reserve, d_output and dh
//
// Weights are (D, G, H, H) elements, for the backward pass each W[g] transposed: in both a product is rows of weights
// times columns of a batch. A warp takes 16 rows (hidden units) and 8 columns (sequences) at a time, as tensor cores
// do, and keeps its weights in registers for all steps.
//
// Row t of the tensors' first dimension and sequence b: first_row(t) + b. Sequences are sorted by falling length.
#pragma once

#include <type_traits>

#include "cells.cuh"

constexpr int UNITS = 16;   // rows of a tile of weights
constexpr int COLUMNS = 8;  // sequences of a tile of the batch
constexpr int WARP = 32;

// Tiles of 8 * `tiles` sequences that make up the batch.
HOST_DEVICE int batch_tiles(const Arguments& p, int tiles) {
    return (p.batch + COLUMNS * tiles - 1) / (COLUMNS * tiles);
}

// The rows of one time step.
struct Step {
    int64_t first;
    int running;  // sequences
};

DEVICE Step step_at(const Arguments& p, int time) {
    if (p.offsets == nullptr) return {static_cast<int64_t>(time) * p.batch, p.batch};
    const int64_t first = p.offsets[time];
    return {first, static_cast<int>(p.offsets[time + 1] - first)};
}

// The time step that a group comes to after `step` others. The backward pass walks the other way.
template <bool BACKWARD>
DEVICE int time_of(const Arguments& p, int group, int step) {
    const bool falling = ((p.reverse >> (group % p.period)) & 1) != BACKWARD;
    return falling ? p.steps - 1 - step : step;
}

DEVICE bool is_reset(const Arguments& p, int64_t row, int group) {
    return p.resets != nullptr && p.resets[row * p.groups + group] != 0;
}

// Four words of elements, zero from `there` on.
template <class T>
DEVICE Words load_lane(const T* source, int there) {
    Words words = {};
    if (there >= T::LANE && (reinterpret_cast<uintptr_t>(source) & 15) == 0) return load_vector<Words>(source);
    // an element a step, for rows that are no whole lanes
    UNROLLED (int k = 0; k < T::LANE && k < there; ++k) {
        uint32_t bits = 0;
        if constexpr (T::PER_WORD == 2)
            bits = static_cast<uint32_t>(source[k].bits) << (16 * (k & 1));
        else
            bits = as_bits(source[k].value);
        words.word[k / T::PER_WORD] |= bits;
    }
    return words;
}

// Two elements that share a word.
template <class T>
DEVICE uint32_t word_of(float first, float second) {
    T low, high;
    convert(first, low);
    convert(second, high);
    return low.bits | static_cast<uint32_t>(high.bits) << 16;
}

// A word as products take it: those of TF32 do not round by themselves.
template <class T>
DEVICE uint32_t as_operand(uint32_t word) {
    return std::is_same<T, Tf32>::value ? rounded_to_tf32(word) : word;
}

template <class T>
DEVICE Words as_operand(Words words) {
    UNROLLED (int k = 0; k < 4; ++k) words.word[k] = as_operand<T>(words.word[k]);
    return words;
}

// Products run over chunks of 4 lanes of elements. The order of elements within a chunk does not matter as long as both
// operands have the same: lane q of four holds elements q * LANE to q * LANE + LANE - 1 of its row or column, and takes
// its first two words to one product of the tensor core, the other two to another. So sixteen bytes as they lie in
// memory are the operand of two products.
template <class T>
constexpr int CHUNK = 4 * T::LANE;

// The weights of one tile and chunk: row 2r of the tile's units and row 2r + 1, so that a thread's accumulators belong
// to neighbouring units.
struct Tile {
    Words even, odd;
};

template <class T>
DEVICE Tile load_tile(const T* weights, int size, int first_unit, int chunk, int lane) {
    const int unit = first_unit + 2 * (lane / 4), element = chunk * CHUNK<T> + lane % 4 * T::LANE;
    const T* source = weights + static_cast<int64_t>(unit) * size + element;
    const int there = size - element;
    Tile tile;
    tile.even = as_operand<T>(load_lane(source, unit < size ? there : 0));
    tile.odd = as_operand<T>(load_lane(source + size, unit + 1 < size ? there : 0));
    return tile;
}

template <class T>
DEVICE void multiply_fragments(float* accumulator, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (std::is_same<T, Float32>::value) {
        // x = high + low, both in TF32: the product of the two low parts is below float32's last place
        uint32_t high_a[4], low_a[4], high_b[2], low_b[2];
        const auto split = [](uint32_t bits, uint32_t& high, uint32_t& low) {
            high = rounded_to_tf32(bits);
            const float rest = as_float(bits) - as_float(high);
            low = rest == rest ? rounded_to_tf32(as_bits(rest)) : 0;  // infinite: all is in the high part
        };
        UNROLLED (int n = 0; n < 4; ++n) split(a[n], high_a[n], low_a[n]);
        UNROLLED (int n = 0; n < 2; ++n) split(b[n], high_b[n], low_b[n]);
        mma(Tf32(), accumulator, low_a[0], low_a[1], low_a[2], low_a[3], high_b[0], high_b[1]);
        mma(Tf32(), accumulator, high_a[0], high_a[1], high_a[2], high_a[3], low_b[0], low_b[1]);
        mma(Tf32(), accumulator, high_a[0], high_a[1], high_a[2], high_a[3], high_b[0], high_b[1]);
    } else {
        mma(T(), accumulator, a[0], a[1], a[2], a[3], b[0], b[1]);
    }
}

// accumulator: units 2r (0, 1) and 2r + 1 (2, 3), columns 2q (0, 2) and 2q + 1 (1, 3), for lane 4r + q.
template <class T>
DEVICE void multiply(float* accumulator, const Tile& tile, const Words& column) {
    const uint32_t *even = tile.even.word, *odd = tile.odd.word, *b = column.word;
    multiply_fragments<T>(accumulator, {even[0], odd[0], even[1], odd[1]}, {b[0], b[1]});
    multiply_fragments<T>(accumulator, {even[2], odd[2], even[3], odd[3]}, {b[2], b[3]});
}

// Chunks of the depth whose weights a warp keeps in registers, 8 a gate and chunk: as many as leave no kernel short of
// registers (nvcc's report is tested).
#ifdef FASTRNN_KEPT_CHUNKS
template <class Cell, class T, int TILES, bool ALONE>
constexpr int KEPT_CHUNKS = FASTRNN_KEPT_CHUNKS;
#else
constexpr int kept_chunks(int gates, int tiles, bool alone, bool split) {
    const int most = gates == 1 ? 8 : gates == 3 || alone ? 4 : 3;
    const int kept = most - (tiles == 1 ? 0 : !alone ? 1 : gates == 1 ? 6 : gates - 1) - (split ? (alone ? 3 : 1) : 0);
    return kept < 1 ? 1 : kept;
}
template <class Cell, class T, int TILES, bool ALONE>
constexpr int KEPT_CHUNKS = kept_chunks(Cell::GATES, TILES, ALONE, std::is_same<T, Float32>::value);
#endif

// A warp's weights for some chunks of the depth, the first KEPT of them in registers, the others in shared memory.
template <class T, int GATES, int KEPT>
struct Weights {
    Tile kept[GATES][KEPT];
    uint32_t* extra;

    // Words of shared memory of a block, for so many chunks of every warp.
    static constexpr int extra_words(int chunks, int warps) {
        return chunks > KEPT ? (chunks - KEPT) * GATES * warps * 2 * WARP * 4 : 0;
    }

    // Load chunks `first`, `first + every`, ... of `chunks`, of 16 units, from weights (G, H, H). Each lane reads its
    // own.
    DEVICE void load(const T* matrix, int size, int first_unit, int first, int every, int chunks, uint32_t* shared) {
        const int lane = thread() % WARP;
        extra = shared + thread() / WARP * 2 * WARP * 4 + lane * 4;
        UNROLLED (int gate = 0; gate < GATES; ++gate, matrix += static_cast<int64_t>(size) * size) {
            UNROLLED (int slot = 0; slot < KEPT; ++slot)
                if (first + slot * every < chunks)
                    kept[gate][slot] = load_tile<T>(matrix, size, first_unit, first + slot * every, lane);
            for (int slot = KEPT; first + slot * every < chunks; ++slot) {
                const Tile tile = load_tile<T>(matrix, size, first_unit, first + slot * every, lane);
                store_shared4(place(gate, slot), tile.even);
                store_shared4(place(gate, slot) + WARP * 4, tile.odd);
            }
        }
    }

    // One of those in shared memory.
    DEVICE Tile extra_tile(int gate, int slot) const {
        return {load_shared4(place(gate, slot)), load_shared4(place(gate, slot) + WARP * 4)};
    }

  private:
    DEVICE uint32_t* place(int gate, int slot) const {
        return extra + ((slot - KEPT) * GATES + gate) * (threads() / WARP) * 2 * WARP * 4;
    }
};

// Where gate g of W_hh stands among a row's SAVED blocks of dgates: behind the GRU's n on the input's side.
template <class Cell>
constexpr int FIRST_DGATE = Cell::SAVED - Cell::GATES;
