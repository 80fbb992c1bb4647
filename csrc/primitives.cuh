// What kernels ask of the machine: threads, barriers, matrix products, and the exchange between blocks.
//
// Kernels are written against these functions alone. There are two implementations: the GPU's, below, and one in plain
// C++ (host_run.h) that runs a whole grid on the CPU, under random schedules and with stores that arrive late, so that
// the same sources are tested where there is no GPU.
#pragma once

#include <cstdint>

#include "arguments.h"

// Sixteen bytes: what a lane reads at a time.
struct alignas(16) Words {
    uint32_t word[4];
};

// What words that blocks publish hold before: never published.
constexpr uint32_t NOT_YET = 0xffffffffu;

// Element types. A word holds PER_WORD elements; a lane reads LANE of them at a time.
struct Bfloat16 {
    uint16_t bits;
    static constexpr int PER_WORD = 2, LANE = 8;
    static constexpr bool EXACT = false;
};
struct Float16 {
    uint16_t bits;
    static constexpr int PER_WORD = 2, LANE = 8;
    static constexpr bool EXACT = false;
};
// float32 in memory; products round it to TF32.
struct Tf32 {
    float value;
    static constexpr int PER_WORD = 1, LANE = 4;
    static constexpr bool EXACT = true;
};
// float32; products are sums of three in TF32.
struct Float32 {
    float value;
    static constexpr int PER_WORD = 1, LANE = 4;
    static constexpr bool EXACT = true;
};

#ifdef FASTRNN_HOST_RUN
#include "host_run.h"
#else

#include <cuda_runtime.h>

#define DEVICE __device__ __forceinline__
#define HOST_DEVICE __host__ __device__ __forceinline__
// A loop over an array that should stay in registers.
#define UNROLLED _Pragma("unroll") for

DEVICE int thread() {
    return threadIdx.x;
}
DEVICE int threads() {
    return blockDim.x;
}
DEVICE int block_x() {
    return blockIdx.x;
}
DEVICE int block_y() {
    return blockIdx.y;
}
DEVICE int blocks_y() {
    return gridDim.y;
}

// One access to global memory as wide as a vector, whose address must be a multiple of its size.
template <class Vector>
DEVICE Vector load_vector(const void* source) {
    return *static_cast<const Vector*>(source);
}
template <class Vector>
DEVICE void store_vector(void* target, const Vector& value) {
    *static_cast<Vector*>(target) = value;
}

// The block's shared memory.
DEVICE uint32_t* shared_memory() {
    extern __shared__ Words memory[];
    return memory->word;
}
DEVICE uint32_t load_shared(const uint32_t* source) {
    return *source;
}
DEVICE Words load_shared4(const uint32_t* source) {
    return *reinterpret_cast<const Words*>(source);
}
DEVICE void store_shared(uint32_t* target, uint32_t value) {
    *target = value;
}
DEVICE void store_shared4(uint32_t* target, Words value) {
    *reinterpret_cast<Words*>(target) = value;
}

// All threads of the block are here, and see each other's stores to shared memory.
DEVICE void block_sync() {
    __syncthreads();
}
// All lanes of the warp are here.
DEVICE void warp_sync() {
    __syncwarp();
}
// The value of the lane whose number differs in the bits of `mask`.
DEVICE uint32_t shuffle_xor(uint32_t value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}

DEVICE float as_float(uint32_t bits) {
    return __uint_as_float(bits);
}
DEVICE uint32_t as_bits(float value) {
    return __float_as_uint(value);
}

// Publish a word to other blocks. Nothing is ordered by it: the word itself is the message.
DEVICE void publish(uint32_t* target, uint32_t value) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(target), "r"(value) : "memory");
}
// Look at four words that other blocks publish. Each word is whole, the four may be of different ages.
DEVICE Words look(const uint32_t* source) {
    Words v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                 : "l"(source)
                 : "memory");
    return v;
}
// Whether none of four words is still as it was before the launch.
DEVICE bool are_published(const Words& words) {
    return words.word[0] != NOT_YET && words.word[1] != NOT_YET && words.word[2] != NOT_YET && words.word[3] != NOT_YET;
}
// Called after a look in vain.
DEVICE void looked_in_vain() {}
// A word of the host's memory, for failures.
DEVICE uint32_t load_flag(const uint32_t* flag) {
    return *reinterpret_cast<const volatile uint32_t*>(flag);
}
DEVICE void store_flag(uint32_t* flag, uint32_t value) {
    *reinterpret_cast<volatile uint32_t*>(flag) = value;
}

// How long a thread may wait for another block, in the unit of wait_clock().
constexpr uint64_t LONGEST_WAIT = 20'000'000'000;  // 20 s
DEVICE uint64_t wait_clock() {
    uint64_t nanoseconds;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(nanoseconds));
    return nanoseconds;
}

// accumulator (16 x 8, float32) += a (16 x K) b (K x 8), K = 16, or 8 for TF32, in the fragments of mma.sync: with lane
// = 4 r + q, a holds rows r (a0, a2) and r + 8 (a1, a3), b column r, the accumulator rows r and r + 8, columns 2q, 2q
// + 1.
#define FASTRNN_MMA(SHAPE)                                                                           \
    asm("mma.sync.aligned." SHAPE " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
        : "+f"(accumulator[0]), "+f"(accumulator[1]), "+f"(accumulator[2]), "+f"(accumulator[3])     \
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1))

DEVICE void mma(Bfloat16, float* accumulator, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                uint32_t b1) {
    FASTRNN_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
}
DEVICE void mma(Float16, float* accumulator, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                uint32_t b1) {
    FASTRNN_MMA("m16n8k16.row.col.f32.f16.f16.f32");
}
DEVICE void mma(Tf32, float* accumulator, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                uint32_t b1) {
    FASTRNN_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
}
#undef FASTRNN_MMA

// Conversions round to nearest, ties to even; a NaN becomes one whose bits are not all ones.
DEVICE float to_float(Bfloat16 element) {
    return as_float(static_cast<uint32_t>(element.bits) << 16);
}
DEVICE float to_float(Float16 element) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(element.bits));
    return result;
}
DEVICE float to_float(Tf32 element) {
    return element.value;
}
DEVICE float to_float(Float32 element) {
    return element.value;
}
DEVICE void convert(float value, Bfloat16& element) {
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(element.bits) : "f"(value));
}
DEVICE void convert(float value, Float16& element) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(element.bits) : "f"(value));
}
DEVICE void convert(float value, Tf32& element) {
    element.value = value == value ? value : as_float(0x7fc00000u);
}
DEVICE void convert(float value, Float32& element) {
    element.value = value == value ? value : as_float(0x7fc00000u);
}
// float32 as an operand of a TF32 product.
DEVICE uint32_t rounded_to_tf32(uint32_t bits) {
    uint32_t result;
    // volatile: or weights would be split once before the loop over time, into twice as many registers
    asm volatile("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(as_float(bits)));
    return result;
}

DEVICE float exponential(float x) {
    return __expf(x);
}
DEVICE float reciprocal(float x) {
    return __fdividef(1.0f, x);
}

constexpr int INVALID_VALUE = cudaErrorInvalidValue;

template <class Kernel, class Arguments>
__global__ void __launch_bounds__(Kernel::MOST_THREADS, 1) entry(const __grid_constant__ Arguments p) {
    Kernel::run(p);
}

// Put a kernel on the stream `launch` names. Returns CUDA's error code.
template <class Kernel, class Arguments, class Launch>
int start(const Arguments& p, const Launch& launch) {
    const Grid grid = Kernel::grid(p, launch);
    if (launch.grid != nullptr) {
        *launch.grid = grid;
        return cudaSuccess;
    }
    const auto kernel = entry<Kernel, Arguments>;
    cudaError_t error = cudaSuccess;
    if (grid.shared_bytes > 48 << 10) {
        // always to the same limit: a smaller one would be another launch's loss
        int device, most;
        cudaGetDevice(&device);
        error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
        if (error == cudaSuccess)
            error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    }
    if (error == cudaSuccess) {
        cudaLaunchAttribute together = {};
        together.id = cudaLaunchAttributeCooperative;
        together.val.cooperative = 1;
        cudaLaunchConfig_t config = {};
        config.gridDim = dim3(grid.x, grid.y);
        config.blockDim = dim3(grid.threads);
        config.dynamicSmemBytes = grid.shared_bytes;
        config.stream = reinterpret_cast<cudaStream_t>(launch.stream);
        config.attrs = &together;
        config.numAttrs = grid.together ? 1 : 0;
        error = cudaLaunchKernelEx(&config, kernel, p);
    }
    if (error != cudaSuccess) cudaGetLastError();  // it is reported here, not by the next call
    return error;
}

#endif
