// Measures what a launch costs: plain, cooperative and, where the GPU has them, cooperative with clusters of four; one
// after another on a stream, and recorded in a CUDA graph that is replayed. Blocks of a cooperative launch meet at a
// barrier of the whole grid, and a counter says whether every launch ran.
#include <cooperative_groups.h>

#include "common.cuh"

constexpr int LAUNCHES = 100;

template <bool TOGETHER>
__global__ void count(uint32_t* counter) {
    if (TOGETHER) cooperative_groups::this_grid().sync();
    if (blockIdx.x == 0 && threadIdx.x == 0) *counter += 1;
}

int main() {
    cudaDeviceProp device;
    CHECK(cudaGetDeviceProperties(&device, 0));
    uint32_t* counter;
    CHECK(cudaMalloc(&counter, 4));
    cudaStream_t stream;
    CHECK(cudaStreamCreate(&stream));  // waits for the null stream, and is waited for
    const int blocks = device.multiProcessorCount / 4 * 4;

    struct Way {
        const char* name;
        int attributes;
    };
    for (const Way way : {Way{"plain", 0}, Way{"cooperative", 1}, Way{"cooperative with clusters", 2}}) {
        if (way.attributes == 2 && device.major < 9) continue;
        cudaLaunchAttribute attributes[2] = {};
        attributes[0].id = cudaLaunchAttributeCooperative;
        attributes[0].val.cooperative = 1;
        attributes[1].id = cudaLaunchAttributeClusterDimension;
        attributes[1].val.clusterDim = {4, 1, 1};
        cudaLaunchConfig_t config = {};
        // not every multiprocessor has three others beside it
        config.gridDim = dim3(way.attributes == 2 ? blocks / 8 * 4 : blocks), config.blockDim = dim3(THREADS);
        config.stream = stream, config.attrs = attributes, config.numAttrs = way.attributes;
        const auto launch = [&] {
            const auto kernel = way.attributes == 0 ? count<false> : count<true>;
            for (int n = 0; n < LAUNCHES; ++n) {
                const cudaError_t error = cudaLaunchKernelEx(&config, kernel, counter);
                if (error != cudaSuccess) return error;
            }
            return cudaSuccess;
        };
        const auto clear = [&] { return cudaMemset(counter, 0, 4); };
        const auto check = [&](const std::string& name) {
            uint32_t launched = 0;
            if (cudaMemcpy(&launched, counter, 4, cudaMemcpyDeviceToHost) == cudaSuccess && launched == LAUNCHES)
                return;
            std::printf("# %s: %u of %d launches ran\n", name.c_str(), launched, LAUNCHES);
            cudaGetLastError();
            ++failures;
        };
        const std::string size = std::to_string(config.gridDim.x) + " blocks";
        const std::string plain = std::string("launch,") + way.name + "," + size;
        measure(plain, 1e6 / LAUNCHES, "us", clear, launch);
        check(plain);

        const std::string replayed = std::string("launch,") + way.name + " in a graph," + size;
        cudaGraph_t graph = nullptr;
        cudaGraphExec_t executable = nullptr;
        cudaError_t error = cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal);
        if (error == cudaSuccess) {
            error = launch();
            const cudaError_t ended = cudaStreamEndCapture(stream, &graph);
            if (error == cudaSuccess) error = ended;
        }
        if (error == cudaSuccess) error = cudaGraphInstantiate(&executable, graph, 0);
        if (error == cudaSuccess) {
            measure(replayed, 1e6 / LAUNCHES, "us", clear, [&] { return cudaGraphLaunch(executable, stream); });
            check(replayed);
        } else {
            std::printf("# %s: %s\n", replayed.c_str(), cudaGetErrorString(error));
            cudaGetLastError();
            ++failures;
        }
    }
    return failures != 0;
}
