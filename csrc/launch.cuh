// Launches the scans of one cell: chooses among the kernels that were compiled, by element type and tile count.
#pragma once

#include "scan_alone.cuh"
#include "scan_spread.cuh"

// Threads of a block that is alone: a warp for every 16 units.
inline int alone_threads(int size) {
    return (size + UNITS - 1) / UNITS * WARP;
}

template <class Cell, class T>
constexpr int ALONE_MOST_UNITS = ALONE_MOST_CHUNKS<Cell> * CHUNK<T>;

template <class Cell, class T, int TILES, bool BACKWARD>
struct Alone {
    static constexpr int MOST_THREADS = ALONE_MOST_UNITS<Cell, T> / UNITS * WARP;
    static DEVICE void run(const Arguments& p) {
        if constexpr (BACKWARD)
            backward_alone<Cell, T, TILES>(p);
        else
            forward_alone<Cell, T, TILES>(p);
    }
    static Grid grid(const Arguments& p, const Launch&) {
        const int chunks = (p.size + CHUNK<T> - 1) / CHUNK<T>, columns = COLUMNS * TILES,
                  threads = alone_threads(p.size);
        const int extra =
            Weights<T, Cell::GATES, KEPT_CHUNKS<Cell, T, TILES, true>>::extra_words(chunks, threads / WARP);
        const int copies = 2 * columns * shared_stride(BACKWARD ? Cell::GATES * chunks : chunks);
        return {batch_tiles(p, TILES) * p.groups, 1, threads, (copies + extra) * 4, false};
    }
};

template <class Cell, class T, int TILES, bool BACKWARD>
struct SpreadOut {
    static constexpr int MOST_THREADS = WARPS * WARP;
    static DEVICE void run(const Arguments& p) {
        if constexpr (BACKWARD)
            backward_spread<Cell, T, TILES>(p);
        else
            forward_spread<Cell, T, TILES>(p);
    }
    static Grid grid(const Arguments& p, const Launch& launch) {
        const int chunks = (p.size + CHUNK<T> - 1) / CHUNK<T>;
        const int most = (chunks + WARPS - 1) / WARPS;
        const int partials = 2 * WARPS * (BACKWARD ? 1 : Cell::GATES) * TILES * PARTIAL;
        const int extra = Weights<T, Cell::GATES, KEPT_CHUNKS<Cell, T, TILES, false>>::extra_words(most, WARPS);
        return {(p.size + UNITS - 1) / UNITS, launch.teams, WARPS * WARP, (partials + extra) * 4, true};
    }
};

template <class Cell, class T, bool BACKWARD>
int launch_pass(const Arguments& p, const Launch& launch) {
    if (launch.spread)
        return launch.tiles == 1 ? start<SpreadOut<Cell, T, 1, BACKWARD>>(p, launch)
                                 : start<SpreadOut<Cell, T, 2, BACKWARD>>(p, launch);
    if (p.size > ALONE_MOST_UNITS<Cell, T>) return INVALID_VALUE;
    if (launch.tiles == 1) return start<Alone<Cell, T, 1, BACKWARD>>(p, launch);
    if constexpr (std::is_same<T, Float32>::value)
        return INVALID_VALUE;  // no registers for a second tile: each product is three
    else
        return start<Alone<Cell, T, 2, BACKWARD>>(p, launch);
}

template <class Cell, class T>
int launch_type(const Arguments& p, const Launch& launch) {
    return launch.backward ? launch_pass<Cell, T, true>(p, launch) : launch_pass<Cell, T, false>(p, launch);
}

template <class Cell>
int launch_cell(const Arguments& p, const Launch& launch) {
    switch (launch.type) {
        case 0:
            return launch_type<Cell, Bfloat16>(p, launch);
        case 1:
            return launch_type<Cell, Float16>(p, launch);
        case 2:
            return launch_type<Cell, Tf32>(p, launch);
        case 3:
            return launch_type<Cell, Float32>(p, launch);
        default:
            return INVALID_VALUE;
    }
}
