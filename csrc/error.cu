// How the host hears of what went wrong: error codes of launches, and a word that a kernel sets.
#include "arguments.h"

#ifdef FASTRNN_HOST_RUN
const char* describe_error(int) {
    return "the hidden size is too large for one block";
}
int new_host_word(uint32_t** word) {
    *word = new uint32_t(0);
    return 0;
}
#else
#include <cuda_runtime.h>
const char* describe_error(int code) {
    return cudaGetErrorString(static_cast<cudaError_t>(code));
}
int new_host_word(uint32_t** word) {
    // the first call may be one that is recorded in a CUDA graph, which forbids to allocate otherwise
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    cudaThreadExchangeStreamCaptureMode(&mode);
    const cudaError_t error = cudaHostAlloc(word, sizeof **word, cudaHostAllocMapped | cudaHostAllocPortable);
    cudaThreadExchangeStreamCaptureMode(&mode);
    if (error == cudaSuccess)
        **word = 0;
    else
        cudaGetLastError();  // it is reported here, not by the next call
    return error;
}
#endif
