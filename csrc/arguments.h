// What a launch is told, for the kernels and for the Python module alike.
#pragma once

#include <cstdint>

// What only some cells ask for.
struct Variant {
    bool relu;  // RNN: relu in place of tanh
};

struct Arguments {
    // Weights (D, G, H, H); bias_hn (D, H) or null; gates_x (rows, D, G*H). Elements.
    const void *weights, *bias_hn, *gates_x;
    // First rows of all time steps, and their end (T + 1,); null if all steps have the whole batch.
    const int64_t* offsets;
    // (rows, D), or null: whether the state is zero before the step of a row.
    const uint8_t* resets;
    // Where blocks publish what others wait for, filled with ones: forward h (rows, D, stride), backward dgates (rows,
    // D, SAVED, stride). It is the output, or dgates, if their rows are whole lanes: stride = H then.
    uint32_t* exchange;
    // Forward: the first state as elements, (D, B, stride).
    const void* initial;
    // (D, B, H) float32. Forward: the first state, replaced by the last. Backward: likewise their gradients, the last
    // state's replaced by the first's. cell is null where a cell has none.
    float *hidden, *cell;
    // Forward: output (rows, D, H), and unless null the reserve: gates (rows, D, SAVED, H), hidden_prev and cell_prev
    // (rows, D, H), the state before each step. Backward: the same reserve, read, and d_output, null for zeros.
    void *output, *gates, *hidden_prev, *cell_prev;
    // (rows, D, H), or null: forward the cell state after each step, backward its gradient.
    void* cells;
    // Backward: (rows, D, SAVED, H).
    void* dgates;
    // A word of host memory: not zero if a block has waited in vain.
    uint32_t* failure;
    // D (a group is one direction), B, T, H; elements between rows of exchange and initial.
    int groups, batch, steps, size, stride;
    // Whether group g walks back in time: bit g % period.
    uint32_t reverse;
    int period;
    Variant variant;
};

// A grid of blocks.
struct Grid {
    int x, y, threads, shared_bytes;
    // Blocks wait for each other: launch all of them at once, or fail.
    bool together;
};

// Which kernel to launch, and how.
struct Launch {
    int type;  // of elements: 0 bfloat16, 1 float16, 2 float32 with products in TF32, 3 float32
    bool backward;
    bool spread;  // regime L, else S
    int tiles;    // of 8 sequences, that a block works on: 1 or 2
    int teams;    // of blocks, in regime L
    uint64_t stream;
    // Unless null: only say what the grid would be.
    Grid* grid;
};

// Launch a scan of one cell. The result is an error code of the machine's, 0 if the kernel is on its way.
int launch_lstm(const Arguments& p, const Launch& launch);
int launch_gru(const Arguments& p, const Launch& launch);
int launch_rnn(const Arguments& p, const Launch& launch);

// A word of host memory, zero, that kernels of all devices may write, for as long as the process lives. The result is
// an error code.
int new_host_word(uint32_t** word);

// What an error code means.
const char* describe_error(int code);
