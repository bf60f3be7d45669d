// All kernels for float16 logits.
#include "run.cuh"

template const char* drsl::cuda::run_format<drsl::cuda::Half>(const DeviceTask&, const Plan&, cudaStream_t);
