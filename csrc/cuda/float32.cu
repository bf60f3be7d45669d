// All kernels for float32 logits.
#include "run.cuh"

template const char* drsl::cuda::run_format<float>(const DeviceTask&, const Plan&, cudaStream_t);
