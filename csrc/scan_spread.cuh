// Regime L: the hidden units of a layer are spread over many blocks, which exchange the state once a step.
//
// Block x of a team has units 16x to 16x + 15, all gates. Its warps share out the depth: warp w takes chunks w, w + 8,
// ...; some stay in its registers, the others in shared memory. A step:
//
//     look for the columns (h, or dgates) that other blocks publish
//     -> products -> one partial sum a warp in shared memory -> barrier
//     -> sum and pointwise step, one unit and sequence a thread -> publish
//
// The data is its own flag: the exchange is filled with ones before the launch, nothing published is all ones, and
// every row is written once. So a warp begins as soon as its own share of the depth is there, nothing has to be
// ordered, and a launch that was given up leaves nothing behind. Blocks wait for each other: all of the grid must be
// resident.
//
// Grid: x blocks of a team, y teams. A team takes tasks y, y + teams, ...: a direction and 8 * TILES sequences each.
#pragma once

#include "scan.cuh"

constexpr int WARPS = 8;
// A partial sum of a tile: four words a lane, and four more after every fourth lane, so that neither the writing lanes
// nor the reading ones (a unit each) meet in a bank.
constexpr int PARTIAL = 8 * 20;

// The patience of one thread: how long it has been waiting for other blocks.
struct Patience {
    uint32_t* failure;
    uint64_t begin = 0;
    uint32_t looks = 0;
    bool lost = false;

    // Called after a look in vain; true if there is no hope.
    DEVICE bool is_lost() {
        looked_in_vain();
        if (lost || (++looks & 1023) != 0) return lost;
        const uint64_t now = wait_clock();
        if (begin == 0) begin = now;
        if (load_flag(failure) != 0) {
            lost = true;
        } else if (now - begin > LONGEST_WAIT) {
            store_flag(failure, 1);
            lost = true;
        }
        return lost;
    }
    // What was waited for is there. Looks are counted anew: the word is in the host's memory, and all
    // wait for a thread that asks for it.
    DEVICE void renew() { begin = looks = 0; }
};

// What a thread goes on with that has waited in vain, in every element type: its results show it.
constexpr Words NOT_A_NUMBER = {{0x7fc07fc0u, 0x7fc07fc0u, 0x7fc07fc0u, 0x7fc07fc0u}};

// Where a lane's column of a tile is.
struct Column {
    enum { ZEROS, AT_HAND, PUBLISHED } state;
    const uint32_t* words;
};

// What a block works on: a direction, the first of some sequences.
struct Task {
    int group, sequence;
};

DEVICE Task task_of(const Arguments& p, int number, int tiles) {
    return {number / batch_tiles(p, tiles), number % batch_tiles(p, tiles) * COLUMNS * tiles};
}

// A block's share of the products. PASSES: how many different columns the gates take, 1 or GATES.
template <class Cell, class T, int TILES, int PASSES>
struct Products {
    static constexpr int GATES = Cell::GATES, KEPT = KEPT_CHUNKS<Cell, T, TILES, false>;
    // What a warp hands on of every tile: a product of each gate, or their sum.
    static constexpr int SUMS = PASSES == 1 ? GATES : 1;

    const Arguments& p;
    const int lane = thread() % WARP, warp = thread() / WARP, first_unit = block_x() * UNITS;
    const int chunks = (p.size + CHUNK<T> - 1) / CHUNK<T>;
    // Warps that have a part of the depth.
    const int active = chunks < WARPS ? chunks : WARPS;
    Patience patience = {p.failure};
    Weights<T, GATES, KEPT> weights;
    // Which of two copies in shared memory takes the partial sums: one is written while the other may still be read.
    int copy = 0;

    DEVICE explicit Products(const Arguments& p) : p(p) {}

    DEVICE void load_weights(int group) {
        const T* const matrix =
            static_cast<const T*>(p.weights) + static_cast<int64_t>(group) * GATES * p.size * p.size;
        uint32_t* const extra = shared_memory() + 2 * WARPS * SUMS * TILES * PARTIAL;
        weights.load(matrix, p.size, first_unit, warp, WARPS, chunks, extra);
    }

    // A first look at this lane's words of a chunk of a column.
    DEVICE Words glance(const Column& column, int pass, int chunk) {
        const int element = chunk * CHUNK<T> + lane % 4 * T::LANE;
        if (column.state == Column::ZEROS || element >= p.stride) return Words{};
        const uint32_t* const source = column.words + (pass * p.stride + element) / T::PER_WORD;
        return column.state == Column::PUBLISHED ? look(source) : load_vector<Words>(source);
    }

    // The same words once they are there.
    DEVICE Words await(const Column& column, int pass, int chunk, Words words) {
        if (column.state == Column::PUBLISHED) {
            while (!are_published(words)) {
                if (patience.is_lost()) return NOT_A_NUMBER;
                words = glance(column, pass, chunk);
            }
            patience.renew();
        }
        return as_operand<T>(words);
    }

    // sums[gate] for one unit and column of the block, of the weights' products with the columns of all tiles; `unit`
    // counts from the block's first one.
    DEVICE void multiply_columns(const Column (&columns)[TILES], int unit, int column, float (&sums)[SUMS]) {
        float products[TILES][GATES][4] = {};
        // one pass ahead: its latency hides behind the products
        Words words[2][TILES][KEPT];
        UNROLLED (int pass = 0; pass <= PASSES; ++pass) {
            if (pass < PASSES)
                UNROLLED (int slot = 0; slot < KEPT; ++slot)
                    UNROLLED (int tile = 0; tile < TILES; ++tile)
                        if (slot * WARPS + warp < chunks)
                            words[pass & 1][tile][slot] = glance(columns[tile], pass, slot * WARPS + warp);
            if (pass == 0) continue;
            const int done = pass - 1;
            UNROLLED (int slot = 0; slot < KEPT; ++slot)
                if (slot * WARPS + warp < chunks) {
                    UNROLLED (int tile = 0; tile < TILES; ++tile) {
                        const Words operand =
                            await(columns[tile], done, slot * WARPS + warp, words[done & 1][tile][slot]);
                        warp_sync();
                        UNROLLED (int gate = 0; gate < GATES; ++gate)
                            if (PASSES == 1 || gate == done)
                                multiply<T>(products[tile][gate], weights.kept[gate][slot], operand);
                    }
                }
            for (int slot = KEPT; slot * WARPS + warp < chunks; ++slot) {
                UNROLLED (int tile = 0; tile < TILES; ++tile) {
                    const int chunk = slot * WARPS + warp;
                    const Words operand = await(columns[tile], done, chunk, glance(columns[tile], done, chunk));
                    warp_sync();
                    UNROLLED (int gate = 0; gate < GATES; ++gate)
                        if (PASSES == 1 || gate == done)
                            multiply<T>(products[tile][gate], weights.extra_tile(gate, slot), operand);
                }
            }
        }

        uint32_t* const partials = shared_memory() + copy * WARPS * SUMS * TILES * PARTIAL;
        copy ^= 1;
        if (warp < active)
            UNROLLED (int tile = 0; tile < TILES; ++tile)
                UNROLLED (int sum = 0; sum < SUMS; ++sum) {
                    Words total;
                    UNROLLED (int k = 0; k < 4; ++k) {
                        float value = products[tile][sum][k];
                        if (SUMS < GATES)
                            UNROLLED (int gate = 1; gate < GATES; ++gate) value += products[tile][gate][k];
                        total.word[k] = as_bits(value);
                    }
                    store_shared4(
                        partials + ((warp * TILES + tile) * SUMS + sum) * PARTIAL + lane / 4 * 20 + lane % 4 * 4,
                        total);
                }
        block_sync();
        // in a fixed order: the same bits every time
        const uint32_t* const mine = partials + column / COLUMNS * SUMS * PARTIAL + unit / 2 * 20 +
                                     column % COLUMNS / 2 * 4 + unit % 2 * 2 + column % 2;
        UNROLLED (int sum = 0; sum < SUMS; ++sum) {
            float total = 0.0f;
            if (column < COLUMNS * TILES)
                UNROLLED (int other = 0; other < WARPS; ++other)
                    if (other < active) total += as_float(load_shared(mine + (other * TILES * SUMS + sum) * PARTIAL));
            sums[sum] = total;
        }
    }
};

// Publish an element of a unit, with its neighbour where they share a word. All lanes of a warp call it.
template <class T>
DEVICE void publish_element(uint32_t* exchange, int64_t element, int unit, float value, bool there) {
    T mine;
    convert(value, mine);
    if constexpr (T::PER_WORD == 1) {
        if (there) publish(exchange + element, as_bits(mine.value));
    } else {
        const uint32_t neighbour = shuffle_xor(mine.bits, 1);
        if (there && unit % 2 == 0) publish(exchange + element / 2, mine.bits | neighbour << 16);
    }
}

// A thread's unit and sequence in the pointwise step. Not there: neither is loaded nor stored, but lanes stay together.
struct Element {
    int unit, column, sequence;
    bool there;
    int64_t state;  // in (D, B, H)
};

DEVICE Element element_of(const Arguments& p, const Task& task, int tiles) {
    Element at;
    at.unit = block_x() * UNITS + thread() % UNITS;
    at.column = thread() / UNITS;
    at.sequence = task.sequence + at.column;
    at.there = at.column < COLUMNS * tiles && at.sequence < p.batch && at.unit < p.size;
    at.state = (static_cast<int64_t>(task.group) * p.batch + at.sequence) * p.size + at.unit;
    return at;
}

// Index of an element of a tensor (rows, D, blocks, size).
DEVICE int64_t index_of(const Arguments& p, int64_t row, int group, int blocks, int block, int size, int unit) {
    return ((row * p.groups + group) * blocks + block) * size + unit;
}

template <class Cell, class T, int TILES>
DEVICE void forward_spread(const Arguments& p) {
    constexpr int GATES = Cell::GATES, SAVED = Cell::SAVED;
    const T* const gates_x = static_cast<const T*>(p.gates_x);
    T *const output = static_cast<T*>(p.output), *const reserve = static_cast<T*>(p.gates);
    T *const hidden_prev = static_cast<T*>(p.hidden_prev), *const cell_prev = static_cast<T*>(p.cell_prev);
    Products<Cell, T, TILES, 1> products(p);
    int loaded = -1;

    for (int number = block_y(); number < p.groups * batch_tiles(p, TILES); number += blocks_y()) {
        const Task task = task_of(p, number, TILES);
        if (task.group != loaded) products.load_weights(loaded = task.group);
        const Element at = element_of(p, task, TILES);
        float bias_hn = 0.0f, hidden = 0.0f, cell = 0.0f;
        if (at.there) {
            hidden = p.hidden[at.state];
            if (Cell::HAS_CELL) cell = p.cell[at.state];
            if (Cell::HAS_BIAS_HN)
                bias_hn =
                    to_float(static_cast<const T*>(p.bias_hn)[static_cast<int64_t>(task.group) * p.size + at.unit]);
        }
        T x[GATES], coming[GATES] = {};
        const auto load_gates = [&](const Step& step) {
            if (at.there && at.sequence < step.running)
                UNROLLED (int gate = 0; gate < GATES; ++gate)
                    coming[gate] =
                        gates_x[index_of(p, step.first + at.sequence, task.group, GATES, gate, p.size, at.unit)];
        };
        Step step = step_at(p, time_of<false>(p, task.group, 0)), before = step;
        load_gates(step);

        for (int count = 0; count < p.steps; ++count) {
            const Step next = step_at(p, time_of<false>(p, task.group, count + 1 < p.steps ? count + 1 : count));
            UNROLLED (int gate = 0; gate < GATES; ++gate) x[gate] = coming[gate];
            load_gates(next);

            Column columns[TILES];
            UNROLLED (int tile = 0; tile < TILES; ++tile) {
                const int sequence = task.sequence + tile * COLUMNS + products.lane / 4;
                const bool zero = sequence >= step.running || is_reset(p, step.first + sequence, task.group);
                const bool first = count == 0 || sequence >= before.running;
                const int64_t row = first ? 0 : before.first + sequence;
                const int64_t state = (static_cast<int64_t>(task.group) * p.batch + sequence) * p.stride;
                const uint32_t* const words =
                    first ? static_cast<const uint32_t*>(p.initial) + state / T::PER_WORD
                          : p.exchange + index_of(p, row, task.group, 1, 0, p.stride, 0) / T::PER_WORD;
                columns[tile] = {zero ? Column::ZEROS : first ? Column::AT_HAND : Column::PUBLISHED, words};
            }
            float sums[GATES];
            products.multiply_columns(columns, thread() % UNITS, at.column, sums);

            const int64_t row = step.first + at.sequence;
            const bool runs = at.there && at.sequence < step.running;
            if (runs && is_reset(p, row, task.group)) hidden = cell = 0.0f;
            const float old_hidden = hidden, old_cell = cell;
            float saved[SAVED] = {};
            if (runs) {
                float of_gate[GATES];
                UNROLLED (int gate = 0; gate < GATES; ++gate) of_gate[gate] = to_float(x[gate]);
                Cell::template forward<T::EXACT>(p.variant, sums, of_gate, bias_hn, hidden, cell, saved);
            }
            // first of all: others wait for it
            if (at.column < COLUMNS * TILES)
                publish_element<T>(p.exchange, index_of(p, row, task.group, 1, 0, p.stride, at.unit), at.unit, hidden,
                                   at.unit < p.stride && at.sequence < step.running);
            if (runs) {
                const int64_t state = index_of(p, row, task.group, 1, 0, p.size, at.unit);
                if (p.output != p.exchange) convert(hidden, output[state]);
                if (Cell::HAS_CELL && p.cells != nullptr) convert(cell, static_cast<T*>(p.cells)[state]);
                if (reserve != nullptr) {
                    convert(old_hidden, hidden_prev[state]);
                    if (Cell::HAS_CELL) convert(old_cell, cell_prev[state]);
                    UNROLLED (int block = 0; block < SAVED; ++block)
                        convert(saved[block], reserve[index_of(p, row, task.group, SAVED, block, p.size, at.unit)]);
                }
            }
            before = step;
            step = next;
        }
        if (at.there) {
            p.hidden[at.state] = hidden;
            if (Cell::HAS_CELL) p.cell[at.state] = cell;
        }
    }
}

template <class Cell, class T, int TILES>
DEVICE void backward_spread(const Arguments& p) {
    constexpr int GATES = Cell::GATES, SAVED = Cell::SAVED, FIRST = FIRST_DGATE<Cell>;
    const T *const reserve = static_cast<const T*>(p.gates), *const d_output = static_cast<const T*>(p.output);
    T* const dgates = static_cast<T*>(p.dgates);
    Products<Cell, T, TILES, GATES> products(p);
    int loaded = -1;

    for (int number = block_y(); number < p.groups * batch_tiles(p, TILES); number += blocks_y()) {
        const Task task = task_of(p, number, TILES);
        if (task.group != loaded) products.load_weights(loaded = task.group);
        const Element at = element_of(p, task, TILES);
        // The gradient of the state after the step, or of the part of it that has no product in it yet.
        float dh = 0.0f, dc = 0.0f;
        if (at.there) {
            dh = p.hidden[at.state];
            if (Cell::HAS_CELL) dc = p.cell[at.state];
        }
        // Whether the state was reset in the step before.
        bool reset = false;
        struct Inputs {
            T saved[SAVED], hidden_prev, cell_prev, d_output;
        };
        Inputs in, coming = {};
        const auto load_inputs = [&](const Step& step) {
            if (!at.there || at.sequence >= step.running) return;
            const int64_t row = step.first + at.sequence;
            const int64_t state = index_of(p, row, task.group, 1, 0, p.size, at.unit);
            UNROLLED (int block = 0; block < SAVED; ++block)
                coming.saved[block] = reserve[index_of(p, row, task.group, SAVED, block, p.size, at.unit)];
            if (Cell::HAS_BIAS_HN) coming.hidden_prev = static_cast<const T*>(p.hidden_prev)[state];
            if (Cell::HAS_CELL) coming.cell_prev = static_cast<const T*>(p.cell_prev)[state];
            if (d_output != nullptr) coming.d_output = d_output[state];
        };
        Step step = step_at(p, time_of<true>(p, task.group, 0)), before = step;
        load_inputs(step);

        // the last time round, only the product with the dgates of the last step
        for (int count = 0; count <= p.steps; ++count) {
            const Step next = step_at(p, time_of<true>(p, task.group, count + 1 < p.steps ? count + 1 : p.steps - 1));
            in = coming;
            if (count < p.steps) load_inputs(next);

            if (count > 0) {
                Column columns[TILES];
                UNROLLED (int tile = 0; tile < TILES; ++tile) {
                    const int sequence = task.sequence + tile * COLUMNS + products.lane / 4;
                    const int64_t row = before.first + sequence;
                    columns[tile] = {
                        sequence < before.running ? Column::PUBLISHED : Column::ZEROS,
                        p.exchange + index_of(p, row, task.group, SAVED, FIRST, p.stride, 0) / T::PER_WORD};
                }
                float sum[1];
                products.multiply_columns(columns, thread() % UNITS, at.column, sum);
                if (at.sequence < before.running) {
                    dh += sum[0];
                    if (reset) dh = dc = 0.0f;
                }
            }
            if (count == p.steps) break;

            const int64_t row = step.first + at.sequence;
            const bool runs = at.there && at.sequence < step.running;
            float d[SAVED] = {};
            if (runs) {
                reset = is_reset(p, row, task.group);
                float saved[SAVED];
                UNROLLED (int block = 0; block < SAVED; ++block) saved[block] = to_float(in.saved[block]);
                if (d_output != nullptr) dh += to_float(in.d_output);
                if (Cell::HAS_CELL && p.cells != nullptr)
                    dc += to_float(static_cast<const T*>(p.cells)[index_of(p, row, task.group, 1, 0, p.size, at.unit)]);
                Cell::template backward<T::EXACT>(p.variant, saved, Cell::HAS_BIAS_HN ? to_float(in.hidden_prev) : 0.0f,
                                                  Cell::HAS_CELL ? to_float(in.cell_prev) : 0.0f, dh, dc, d);
            }
            // first of all: others wait for it
            if (at.column < COLUMNS * TILES)
                UNROLLED (int block = FIRST; block < SAVED; ++block)
                    publish_element<T>(p.exchange, index_of(p, row, task.group, SAVED, block, p.stride, at.unit),
                                       at.unit, d[block], at.unit < p.stride && at.sequence < step.running);
            if (runs)
                UNROLLED (int block = 0; block < SAVED; ++block) {
                    if (block < FIRST || p.dgates != p.exchange)
                        convert(d[block], dgates[index_of(p, row, task.group, SAVED, block, p.size, at.unit)]);
                }
            before = step;
            step = next;
        }
        if (at.there) {
            p.hidden[at.state] = dh;
            if (Cell::HAS_CELL) p.cell[at.state] = dc;
        }
    }
}
