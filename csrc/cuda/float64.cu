// All kernels for float64 logits.
#include "run.cuh"

template const char* drsl::cuda::run_format<double>(const DeviceTask&, const Plan&, cudaStream_t);
