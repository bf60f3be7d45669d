// All kernels for bfloat16 logits.
#include "run.cuh"

template const char* drsl::cuda::run_format<drsl::cuda::BFloat16>(const DeviceTask&, const Plan&, cudaStream_t);
