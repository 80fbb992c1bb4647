// What the model of the scans rests on, measured on the GPU at hand: prints CSV lines
// "experiment,what,size,value,unit".
//
// exchange: blocks that each publish a share of some bytes and wait for all of them, once a step. `flags` is what
// regime L does (the data is its own flag), `counter` a counter that every block raises behind a fence, `grid`
// cooperative groups' barrier. products: mma.sync with so many independent chains a warp. launch: an empty kernel.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "../../csrc/primitives.cuh"

#define CHECK(call)                                                             \
    do {                                                                        \
        const cudaError_t error = (call);                                       \
        if (error != cudaSuccess) {                                             \
            std::fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(error)); \
            return 1;                                                           \
        }                                                                       \
    } while (0)

constexpr int THREADS = 256;

struct Exchange {
    uint32_t *data, *counter, *sink;
    int steps, words;  // of all blocks a step
};

enum Protocol { FLAGS, COUNTER, GRID };

template <Protocol PROTOCOL>
__global__ void __launch_bounds__(THREADS) exchange(const Exchange p) {
    const int share = p.words / gridDim.x;
    uint32_t sum = 0;
    for (int step = 0; step < p.steps; ++step) {
        uint32_t* const row = p.data + static_cast<int64_t>(step) * p.words;
        for (int n = threadIdx.x; n < share; n += THREADS) publish(row + blockIdx.x * share + n, step + sum % 2);
        if (PROTOCOL == COUNTER) {
            __syncthreads();
            if (threadIdx.x == 0) {
                __threadfence();
                atomicAdd(p.counter, 1);
                while (load_flag(p.counter) < static_cast<uint32_t>(step + 1) * gridDim.x) {
                }
                __threadfence();
            }
            __syncthreads();
        } else if (PROTOCOL == GRID) {
            cooperative_groups::this_grid().sync();
        }
        for (int n = 4 * threadIdx.x; n < p.words; n += 4 * THREADS) {
            Words words = look(row + n);
            while (PROTOCOL == FLAGS && !are_published(words)) words = look(row + n);
            sum += words.word[0] ^ words.word[1] ^ words.word[2] ^ words.word[3];
        }
    }
    if (sum == 0x12345) *p.sink = sum;
}

template <int CHAINS>
__global__ void products(float* sink, int steps) {
    float accumulators[CHAINS][4] = {};
    for (int step = 0; step < steps; ++step) {
        UNROLLED (int chain = 0; chain < CHAINS; ++chain)
            mma(Bfloat16(), accumulators[chain], step, step + 1, step + 2, step + 3, step, chain);
    }
    float sum = 0;
    UNROLLED (int chain = 0; chain < CHAINS; ++chain) sum += accumulators[chain][0];
    if (sum == 1.5f) *sink = sum;
}

__global__ void nothing() {}

// The shortest of some runs in milliseconds, or less than zero if one failed.
template <class Run>
float shortest(int runs, const Run& run) {
    cudaEvent_t begin, end;
    cudaEventCreate(&begin), cudaEventCreate(&end);
    float best = 1e30f;
    for (int n = 0; n < runs; ++n) {
        if (!run(begin, end) || cudaEventSynchronize(end) != cudaSuccess) return -1;
        float milliseconds;
        cudaEventElapsedTime(&milliseconds, begin, end);
        best = std::min(best, milliseconds);
    }
    cudaEventDestroy(begin), cudaEventDestroy(end);
    return best;
}

template <Protocol PROTOCOL>
int measure_exchange(const char* name, int blocks, int bytes, const Exchange& base) {
    Exchange p = base;
    p.words = bytes / 4 / (4 * blocks) * (4 * blocks);
    const float best = shortest(5, [&](cudaEvent_t begin, cudaEvent_t end) {
        if (cudaMemset(p.data, 0xff, static_cast<size_t>(p.steps) * p.words * 4) != cudaSuccess) return false;
        if (cudaMemset(p.counter, 0, 4) != cudaSuccess) return false;
        void* arguments[] = {&p};
        cudaEventRecord(begin);
        const bool good = cudaLaunchCooperativeKernel(reinterpret_cast<void*>(exchange<PROTOCOL>), dim3(blocks),
                                                      dim3(THREADS), arguments, 0, nullptr) == cudaSuccess;
        cudaEventRecord(end);
        return good;
    });
    if (best < 0) return 1;
    std::printf("exchange,%s,%d blocks %d bytes,%.3f,us a step\n", name, blocks, bytes, best * 1e3 / p.steps);
    return 0;
}

template <int CHAINS>
int measure_products(int multiprocessors, float* sink) {
    const int steps = 4096, warps = 8;
    const float best = shortest(5, [&](cudaEvent_t begin, cudaEvent_t end) {
        cudaEventRecord(begin);
        products<CHAINS><<<multiprocessors, 32 * warps>>>(sink, steps);
        cudaEventRecord(end);
        return cudaGetLastError() == cudaSuccess;
    });
    if (best < 0) return 1;
    const double flops = 2.0 * 16 * 8 * 16 * CHAINS * warps * steps * multiprocessors;
    std::printf("products,mma.sync bf16 of 8 warps,%d chains,%.1f,TFLOP/s\n", CHAINS, flops / best / 1e9);
    std::printf("products,mma.sync bf16 of 8 warps,%d chains,%.1f,ns a product\n", CHAINS, best * 1e6 / steps / CHAINS);
    return 0;
}

int main() {
    cudaDeviceProp device;
    CHECK(cudaGetDeviceProperties(&device, 0));
    const int multiprocessors = device.multiProcessorCount;
    Exchange p = {};
    p.steps = 512;
    CHECK(cudaMalloc(&p.data, static_cast<size_t>(p.steps) << 17));
    CHECK(cudaMalloc(&p.counter, 4));
    CHECK(cudaMalloc(&p.sink, 4));
    int failed = 0;
    for (int blocks : {8, 16, 32, 64, 96, 128}) {
        if (blocks > multiprocessors) continue;
        for (int bytes : {4 << 10, 16 << 10, 64 << 10, 128 << 10}) {
            failed += measure_exchange<FLAGS>("flags", blocks, bytes, p);
            failed += measure_exchange<COUNTER>("counter", blocks, bytes, p);
            failed += measure_exchange<GRID>("grid", blocks, bytes, p);
        }
    }
    float* const sink = reinterpret_cast<float*>(p.sink);
    failed += measure_products<1>(multiprocessors, sink) + measure_products<2>(multiprocessors, sink) +
              measure_products<4>(multiprocessors, sink) + measure_products<8>(multiprocessors, sink);
    for (bool together : {false, true}) {
        const int launches = 200;
        const float best = shortest(5, [&](cudaEvent_t begin, cudaEvent_t end) {
            cudaEventRecord(begin);
            bool good = true;
            for (int n = 0; n < launches; ++n)
                good = good &&
                       (together ? cudaLaunchCooperativeKernel(reinterpret_cast<void*>(nothing), dim3(multiprocessors),
                                                               dim3(THREADS), nullptr, 0, nullptr)
                                 : cudaLaunchKernel(reinterpret_cast<void*>(nothing), dim3(multiprocessors),
                                                    dim3(THREADS), nullptr, 0, nullptr)) == cudaSuccess;
            cudaEventRecord(end);
            return good;
        });
        failed += best < 0;
        std::printf("launch,%s,%d blocks,%.2f,us\n", together ? "cooperative" : "plain", multiprocessors,
                    best * 1e3 / launches);
    }
    return failed != 0;
}
