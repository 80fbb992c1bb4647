// Measures the exchange between blocks: each publishes its share of some bytes and reads all of them, once a step.
//
// Through L2: `flags` is what regime L does (the data is its own flag); `tagged` packets of 8 or 16 bytes carry the
// number of the step beside 4 or 12 bytes of data, in a ring of two slots; `counter` is a counter that every block
// raises behind a fence; `grid` cooperative groups' barrier. "stores": each thread also stores 16 bytes a step that
// nobody waits for, as scans do with their results.
//
// Within a cluster, through distributed shared memory: `async` is st.async, which counts on the receiver's mbarrier;
// `barrier` plain stores and barrier.cluster. Of one cluster, and of all that run at once. `clusters` says how many
// those are with 200 KB of shared memory; 255 registers for each of 256 threads would not change it, for a
// multiprocessor has as many.
#include <cooperative_groups.h>

#include "common.cuh"

namespace cg = cooperative_groups;

struct Exchange {
    uint32_t *data, *counter, *sink, *gave_up;
    Words* output;     // or null
    int steps, words;  // of all blocks a step, without tags
};

enum Protocol { FLAGS, TAGGED_8, TAGGED_16, COUNTER, GRID };

// A scalar store is whole: who sees the tag sees the data. Vectors of words may come in parts.
DEVICE void publish8(uint32_t* target, uint32_t data, uint32_t tag) {
    const uint64_t value = static_cast<uint64_t>(tag) << 32 | data;
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(target), "l"(value) : "memory");
}
DEVICE bool look8(const uint32_t* source, uint32_t tag, uint32_t& sum) {
    uint64_t value;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(source) : "memory");
    sum += static_cast<uint32_t>(value);
    return value >> 32 == tag;
}
DEVICE void publish16(uint32_t* target, uint32_t data, uint32_t tag) {
    const uint64_t low = data, high = static_cast<uint64_t>(tag) << 32 | data;
    asm volatile(
        "{ .reg .b128 value; mov.b128 value, {%1, %2}; st.relaxed.gpu.global.b128 [%0], value; }" ::"l"(target),
        "l"(low), "l"(high)
        : "memory");
}
DEVICE bool look16(const uint32_t* source, uint32_t tag, uint32_t& sum) {
    uint64_t low, high;
    asm volatile("{ .reg .b128 value; ld.relaxed.gpu.global.b128 value, [%2]; mov.b128 {%0, %1}, value; }"
                 : "=l"(low), "=l"(high)
                 : "l"(source)
                 : "memory");
    sum += static_cast<uint32_t>(low);
    return high >> 32 == tag;
}

template <Protocol PROTOCOL>
__global__ void __launch_bounds__(THREADS) exchange(const Exchange p) {
    constexpr bool TAGGED = PROTOCOL == TAGGED_8 || PROTOCOL == TAGGED_16;
    // words of a packet, and how many of them are data
    constexpr int PACKET = PROTOCOL == TAGGED_16 ? 4 : 2, CARRIED = PACKET - 1;
    const int share = p.words / gridDim.x, packets = (share + CARRIED - 1) / CARRIED;
    Patience patience = {p.gave_up};
    uint32_t sum = 0;
    for (int step = 0; step < p.steps; ++step) {
        const uint32_t tag = step + 1;
        if (TAGGED) {
            uint32_t* const slot = p.data + static_cast<int64_t>(step & 1) * packets * gridDim.x * PACKET;
            for (int n = threadIdx.x; n < packets; n += THREADS) {
                uint32_t* const target = slot + (blockIdx.x * packets + n) * PACKET;
                PROTOCOL == TAGGED_16 ? publish16(target, sum, tag) : publish8(target, sum, tag);
            }
            for (int n = threadIdx.x; n < packets * gridDim.x; n += THREADS)
                patience.await([&] {
                    const uint32_t* const source = slot + n * PACKET;
                    return PROTOCOL == TAGGED_16 ? look16(source, tag, sum) : look8(source, tag, sum);
                });
            // two slots are enough only if a block publishes when all of it has read the step before
            __syncthreads();
        } else {
            uint32_t* const row = p.data + static_cast<int64_t>(step) * p.words;
            for (int n = threadIdx.x; n < share; n += THREADS) publish(row + blockIdx.x * share + n, step + sum % 2);
            if (PROTOCOL == COUNTER) {
                __syncthreads();
                if (threadIdx.x == 0) {
                    __threadfence();
                    atomicAdd(p.counter, 1);
                    patience.await([&] { return load_flag(p.counter) >= tag * gridDim.x; });
                    __threadfence();
                }
                __syncthreads();
            } else if (PROTOCOL == GRID) {
                cg::this_grid().sync();  // cannot hang: the launch is cooperative, and no thread leaves before
            }
            for (int n = 4 * threadIdx.x; n < p.words; n += 4 * THREADS) {
                Words words = look(row + n);
                if (PROTOCOL == FLAGS)
                    patience.await([&] { return are_published(words) || are_published(words = look(row + n)); });
                sum += words.word[0] ^ words.word[1] ^ words.word[2] ^ words.word[3];
            }
        }
        if (p.output != nullptr)
            p.output[(static_cast<int64_t>(step) * gridDim.x + blockIdx.x) * THREADS + threadIdx.x] = {{sum, sum}};
    }
    if (sum == 0x12345) *p.sink = sum;
}

// A block's receiving buffer holds all blocks' shares, twice: while one is read, the next step's arrive in the other.
template <bool ASYNC>
__global__ void __launch_bounds__(THREADS) exchange_in_cluster(const Exchange p) {
#if __CUDA_ARCH__ >= 900
    extern __shared__ Words received[];
    __shared__ alignas(8) uint64_t arrivals[2];
    const auto cluster = cg::this_cluster();
    const int blocks = cluster.num_blocks(), rank = cluster.block_rank(), all = p.words / 4, share = all / blocks;
    const auto address = [](const void* shared) { return static_cast<uint32_t>(__cvta_generic_to_shared(shared)); };
    const auto of_peer = [](uint32_t shared, int peer) {
        uint32_t result;
        asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(result) : "r"(shared), "r"(peer));
        return result;
    };
    if (threadIdx.x < 2)
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(arrivals + threadIdx.x)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    cluster.sync();

    Patience patience = {p.gave_up};
    uint32_t sum = 0;
    for (int step = 0; step < p.steps; ++step) {
        Words* const slot = received + (step & 1) * all;
        const uint32_t arrival = address(arrivals + (step & 1));
        if (ASYNC && threadIdx.x == 0)
            asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(arrival), "r"(16 * all)
                         : "memory");
        for (int n = threadIdx.x; n < share * blocks; n += THREADS) {
            const int peer = n / share;
            Words* const target = slot + rank * share + n % share;
            if (ASYNC)
                asm volatile(
                    "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %1, %1, %1}, [%2];" ::
                        "r"(of_peer(address(target), peer)),
                    "r"(sum), "r"(of_peer(arrival, peer))
                    : "memory");
            else
                *cluster.map_shared_rank(target, peer) = {{sum, sum, sum, sum}};
        }
        if (ASYNC)
            patience.await([&] {
                uint32_t done;
                asm volatile(
                    "{ .reg .pred done; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%1], %2;\n"
                    "selp.u32 %0, 1, 0, done; }"
                    : "=r"(done)
                    : "r"(arrival), "r"(step >> 1 & 1)
                    : "memory");
                return done != 0;
            });
        else
            cluster.sync();
        for (int n = threadIdx.x; n < all; n += THREADS) sum += slot[n].word[0] ^ slot[n].word[3];
        // a peer sends the step after next only when it has what this block sends next
        if (ASYNC) __syncthreads();
        if (p.output != nullptr)
            p.output[(static_cast<int64_t>(step) * gridDim.x + blockIdx.x) * THREADS + threadIdx.x] = {{sum, sum}};
    }
    cluster.sync();  // nobody leaves while others may still send to it
    if (sum == 0x12345) *p.sink = sum;
#endif
}

std::string size_of(int blocks, int bytes, bool stores) {
    return std::to_string(blocks) + " blocks " + std::to_string(bytes) + " bytes" + (stores ? " stores" : "");
}

template <Protocol PROTOCOL>
void measure_exchange(const char* name, int blocks, int bytes, Exchange p) {
    constexpr bool TAGGED = PROTOCOL == TAGGED_8 || PROTOCOL == TAGGED_16;
    p.words = bytes / 4 / (4 * blocks) * (4 * blocks);
    const auto prepare = [&] {
        const cudaError_t error = cudaMemset(p.counter, 0, 4);
        if (error != cudaSuccess) return error;
        // two slots of packets, at most twice as large as their data
        const size_t filled = TAGGED ? size_t{4} * bytes + 64 * blocks : static_cast<size_t>(p.steps) * p.words * 4;
        return cudaMemset(p.data, TAGGED ? 0 : 0xff, filled);
    };
    measure(std::string("exchange,") + name + "," + size_of(blocks, bytes, p.output != nullptr), 1e6 / p.steps,
            "us a step", prepare, [&] {
                void* arguments[] = {&p};
                return cudaLaunchCooperativeKernel(reinterpret_cast<void*>(exchange<PROTOCOL>), dim3(blocks),
                                                   dim3(THREADS), arguments, 0, nullptr);
            });
}

template <bool ASYNC>
int measure_clusters(const char* name, Exchange p) {
    const auto kernel = exchange_in_cluster<ASYNC>;
    CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 200 << 10));
    CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    for (int blocks : {2, 4, 8, 16}) {
        cudaLaunchAttribute cluster = {};
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
        cudaLaunchConfig_t config = {};
        config.gridDim = dim3(blocks), config.blockDim = dim3(THREADS);
        config.attrs = &cluster, config.numAttrs = 1;
        config.dynamicSmemBytes = 200 << 10;
        int clusters = 0;
        CHECK(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config));
        if (ASYNC) std::printf("clusters,200 KB a block,%d blocks,%d,clusters\n", blocks, clusters);
        if (clusters == 0) continue;
        for (int bytes : {2 << 10, 8 << 10, 32 << 10})
            for (int many : {1, clusters}) {
                config.gridDim = dim3(blocks * many);
                config.dynamicSmemBytes = 2 * bytes;
                p.words = bytes / 4;
                measure("cluster exchange," + std::string(name) + " of " + (many == 1 ? "one cluster," : "all,") +
                            size_of(blocks, bytes, p.output != nullptr),
                        1e6 / p.steps, "us a step", nothing_to_prepare,
                        [&] { return cudaLaunchKernelEx(&config, kernel, p); });
            }
    }
    return 0;
}

int main() {
    cudaDeviceProp device;
    CHECK(cudaGetDeviceProperties(&device, 0));
    Exchange p = {};
    p.steps = 512;
    Words* output;
    p.gave_up = shared_word();
    CHECK(cudaMalloc(&p.data, static_cast<size_t>(p.steps) << 17));
    CHECK(cudaMalloc(&p.counter, 4));
    CHECK(cudaMalloc(&p.sink, 4));
    CHECK(cudaMalloc(&output, sizeof(Words) * p.steps * THREADS * std::max(device.multiProcessorCount, 128)));
    for (Words* stores : {static_cast<Words*>(nullptr), output}) {
        p.output = stores;
        for (int blocks : {8, 16, 32, 64, 96, 128}) {
            if (blocks > device.multiProcessorCount) continue;
            for (int bytes : {4 << 10, 16 << 10, 64 << 10, 128 << 10}) {
                measure_exchange<FLAGS>("flags", blocks, bytes, p);
                measure_exchange<TAGGED_8>("tagged 8", blocks, bytes, p);
                measure_exchange<TAGGED_16>("tagged 16", blocks, bytes, p);
                measure_exchange<COUNTER>("counter", blocks, bytes, p);
                measure_exchange<GRID>("grid", blocks, bytes, p);
            }
        }
        if (device.major >= 9) {
            if (measure_clusters<true>("async", p) != 0) ++failures;
            if (measure_clusters<false>("barrier", p) != 0) ++failures;
        }
    }
    return failures != 0;
}
