// What the error codes of launches mean.
#include "arguments.h"

#ifdef FASTRNN_HOST_RUN
const char* describe_error(int) {
    return "the hidden size is too large for one block";
}
#else
#include <cuda_runtime.h>
const char* describe_error(int code) {
    return cudaGetErrorString(static_cast<cudaError_t>(code));
}
#endif
