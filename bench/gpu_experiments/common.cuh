// What the experiments share: waiting that ends, and the measurement of a launch as a line of CSV
// "experiment,what,size,value,unit".
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <string>

#include "../../csrc/primitives.cuh"

constexpr int THREADS = 256;

// No kernel here can hang: a thread that has waited this long says so, and waits no more. In the unit of wait_clock().
constexpr uint64_t MOST_NANOSECONDS = 1'000'000'000;

struct Patience {
    uint32_t* gave_up;
    bool lost = false;

    template <class Look>
    DEVICE void await(const Look& is_there) {
        uint64_t begin = 0;
        for (uint32_t looks = 1; !lost && !is_there(); ++looks) {
            if (looks % 64 != 0) continue;
            const uint64_t now = wait_clock();
            if (begin == 0) begin = now;
            if (now - begin > MOST_NANOSECONDS) {
                store_flag(gave_up, 1);
                lost = true;
            }
        }
    }
};

// The word of host memory that a kernel sets which gave up.
inline uint32_t* shared_word() {
    static uint32_t* word = nullptr;
    if (word == nullptr && cudaMallocHost(&word, sizeof *word) == cudaSuccess) *word = 0;
    return word;
}

// How many experiments went wrong.
inline int failures = 0;

// Print the shortest of five runs, in seconds times `scale`, or a comment that says what went wrong. `prepare` and
// `launch` return CUDA's error codes, and put what they do on the null stream; only `launch` is timed.
template <class Prepare, class Launch>
void measure(const std::string& name, double scale, const char* unit, const Prepare& prepare, const Launch& launch) {
    cudaEvent_t begin, end;
    cudaEventCreate(&begin), cudaEventCreate(&end);
    float best = 1e30f;
    cudaError_t error = cudaSuccess;
    for (int n = 0; n < 5 && error == cudaSuccess && *shared_word() == 0; ++n) {
        error = prepare();
        if (error == cudaSuccess) error = cudaEventRecord(begin);
        if (error == cudaSuccess) error = launch();
        if (error == cudaSuccess) error = cudaEventRecord(end);
        if (error == cudaSuccess) error = cudaDeviceSynchronize();
        float milliseconds = 0;
        if (error == cudaSuccess) error = cudaEventElapsedTime(&milliseconds, begin, end);
        best = std::min(best, milliseconds);
    }
    cudaEventDestroy(begin), cudaEventDestroy(end);
    if (error == cudaSuccess && *shared_word() == 0) {
        std::printf("%s,%.3f,%s\n", name.c_str(), best * 1e-3 * scale, unit);
    } else {
        std::printf("# %s: %s\n", name.c_str(), error == cudaSuccess ? "gave up waiting" : cudaGetErrorString(error));
        cudaGetLastError();
        *shared_word() = 0;
        ++failures;
    }
    std::fflush(stdout);  // what comes next may be cut short
}

inline cudaError_t nothing_to_prepare() {
    return cudaSuccess;
}

#define CHECK(call)                                                             \
    do {                                                                        \
        const cudaError_t error = (call);                                       \
        if (error != cudaSuccess) {                                             \
            std::fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(error)); \
            return 1;                                                           \
        }                                                                       \
    } while (0)
