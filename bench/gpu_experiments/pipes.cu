// Measures what a multiprocessor computes: products of tensor cores, and the functions that all share one slow pipe.
//
// mma.sync: eight warps, each with so many independent chains of products. wgmma: one or two groups of four warps, with
// weights in registers and columns in shared memory, as a scan would have them; `latency` waits for each product,
// `rate` for sixteen that go to the same accumulators. functions: eight warps, each with eight independent chains of
// tanh.approx or ex2.approx, alone and beside as many products.
#include "common.cuh"

template <class T, int CHAINS>
__global__ void products(float* sink, int steps) {
    float accumulators[CHAINS][4] = {};
    for (int step = 0; step < steps; ++step)
        UNROLLED (int chain = 0; chain < CHAINS; ++chain)
            mma(T(), accumulators[chain], step, step + 1, step + 2, step + 3, step, chain);
    float sum = 0;
    UNROLLED (int chain = 0; chain < CHAINS; ++chain) sum += accumulators[chain][0];
    if (sum == 1.5f) *sink = sum;
}

enum Function { NONE, TANH, EX2 };

template <bool PRODUCTS, Function FUNCTION>
__global__ void functions(float* sink, int steps) {
    constexpr int CHAINS = 8;
    float accumulators[CHAINS][4] = {}, values[CHAINS];
    UNROLLED (int chain = 0; chain < CHAINS; ++chain) values[chain] = 0.1f * chain + threadIdx.x;
    for (int step = 0; step < steps; ++step)
        UNROLLED (int chain = 0; chain < CHAINS; ++chain) {
            if (PRODUCTS) mma(Bfloat16(), accumulators[chain], step, step + 1, step + 2, step + 3, step, chain);
            if (FUNCTION == TANH) asm volatile("tanh.approx.f32 %0, %0;" : "+f"(values[chain]));
            if (FUNCTION == EX2) asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(values[chain]));
        }
    float sum = 0;
    UNROLLED (int chain = 0; chain < CHAINS; ++chain) sum += accumulators[chain][0] + values[chain];
    if (sum == 1.5f) *sink = sum;
}

// accumulator (64 x N) += a (64 x 16, four words a thread) b (16 x N, in shared memory).
#define FOUR(n) "+f"(d[n]), "+f"(d[n + 1]), "+f"(d[n + 2]), "+f"(d[n + 3])
#define EIGHT(n) FOUR(n), FOUR(n + 4)
#define SIXTEEN(n) EIGHT(n), EIGHT(n + 8)
#define WGMMA(N, WORDS, A, B, ...)                                                                                  \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" N "k16.f32.bf16.bf16 {" WORDS "}, {" A "}, " B ", 1, 1, 1, 0;" \
                 : __VA_ARGS__                                                                                      \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define WORDS_8 "%0, %1, %2, %3"
#define WORDS_16 WORDS_8 ", %4, %5, %6, %7"
#define WORDS_32 WORDS_16 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define WORDS_64 WORDS_32 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"

// Only code for sm_90a has wgmma.
template <int N, int DEEP>
__global__ void __launch_bounds__(256) warp_group_products(float* sink, int steps) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    __shared__ alignas(128) Words columns[2 * N];  // 16 x N elements: tiles of eight columns by 16 bytes of depth
    for (int n = threadIdx.x; n < 2 * N; n += blockDim.x) columns[n] = Words{};
    // plain stores, seen by the asynchronous proxy that reads for wgmma
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    // in units of 16 bytes: where the columns are; 128 bytes to the next tile in depth, 256 to the next eight columns
    const uint64_t b = (static_cast<uint64_t>(__cvta_generic_to_shared(columns)) & 0x3ffff) >> 4 | uint64_t{8} << 16 |
                       uint64_t{16} << 32;
    const uint32_t a[4] = {threadIdx.x, threadIdx.x + 1, threadIdx.x + 2, threadIdx.x + 3};
    float d[N / 2] = {};
    for (int step = 0; step < steps; step += DEEP) {
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
        UNROLLED (int n = 0; n < DEEP; ++n) {
            if constexpr (N == 8) WGMMA("8", WORDS_8, "%4, %5, %6, %7", "%8", FOUR(0));
            if constexpr (N == 16) WGMMA("16", WORDS_16, "%8, %9, %10, %11", "%12", EIGHT(0));
            if constexpr (N == 32) WGMMA("32", WORDS_32, "%16, %17, %18, %19", "%20", SIXTEEN(0));
            if constexpr (N == 64) WGMMA("64", WORDS_64, "%32, %33, %34, %35", "%36", SIXTEEN(0), SIXTEEN(16));
        }
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    }
    float sum = 0;
    UNROLLED (int n = 0; n < N / 2; ++n) sum += d[n];
    if (sum == 1.5f) *sink = sum;
#endif
}

constexpr int STEPS = 4096;

struct Machine {
    int multiprocessors;
    float* sink;
};

// A kernel of so many threads on every multiprocessor, in nanoseconds of one of `parts`.
template <class Kernel>
void measure_kernel(const Machine& on, const std::string& name, int threads, double parts, Kernel kernel) {
    measure(name, 1e9 / parts, "ns", nothing_to_prepare, [&] {
        kernel<<<on.multiprocessors, threads>>>(on.sink, STEPS);
        return cudaGetLastError();
    });
}

template <class T, int CHAINS>
void measure_products(const Machine& on, const char* type) {
    measure_kernel(on, std::string("mma.sync of 8 warps,") + type + "," + std::to_string(CHAINS) + " chains", 256,
                   double{STEPS} * CHAINS, products<T, CHAINS>);
}

template <class T>
void measure_chains(const Machine& on, const char* type) {
    measure_products<T, 1>(on, type), measure_products<T, 2>(on, type);
    measure_products<T, 4>(on, type), measure_products<T, 8>(on, type);
}

template <int N>
void measure_warp_groups(const Machine& on) {
    for (int groups : {1, 2}) {
        const std::string size = "m64n" + std::to_string(N) + "k16 of " + std::to_string(groups) + " warp groups";
        measure_kernel(on, "wgmma,latency," + size, 128 * groups, STEPS, warp_group_products<N, 1>);
        measure_kernel(on, "wgmma,rate," + size, 128 * groups, STEPS, warp_group_products<N, 16>);
    }
}

int main() {
    cudaDeviceProp device;
    CHECK(cudaGetDeviceProperties(&device, 0));
    Machine on = {device.multiProcessorCount, nullptr};
    CHECK(cudaMalloc(&on.sink, 4));
    measure_chains<Bfloat16>(on, "bf16");
    measure_chains<Tf32>(on, "tf32");
    const char* const what = "of 8 warps with 8 chains";
    const auto measure_functions = [&](const char* name, auto kernel) {
        measure_kernel(on, std::string("functions,") + name + "," + what, 256, 8.0 * STEPS, kernel);
    };
    measure_functions("mma.sync bf16", functions<true, NONE>);
    measure_functions("tanh.approx", functions<false, TANH>);
    measure_functions("tanh.approx and mma.sync bf16", functions<true, TANH>);
    measure_functions("ex2.approx", functions<false, EX2>);
    measure_functions("ex2.approx and mma.sync bf16", functions<true, EX2>);
    if (device.major == 9 && device.minor == 0) {
        measure_warp_groups<8>(on), measure_warp_groups<16>(on);
        measure_warp_groups<32>(on), measure_warp_groups<64>(on);
    }
    return failures != 0;
}
