// A stand-in for the CUDA runtime that runs kernels on the CPU, for tests. A block's threads are fibers of the calling
// thread, which really wait at every barrier and shuffle; global memory is host memory; a launch is done when it
// returns. Offers what csrc/cuda uses and no more. shim.cpp schedules; shim.h is for the tests that look behind it.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static thread_local  // one block at a time runs on a thread

struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3() = default;
  constexpr explicit dim3(unsigned x) : x(x) {}
};

// ---------------------------------------------------------------------------------------------------------
// Host side

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchFailure = 719
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
typedef struct CUstream_st* cudaStream_t;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);

// Runs body(context) on every thread of the grid.
cudaError_t cuda_shim_launch(const cudaLaunchConfig_t& config, const void* kernel, void (*body)(void*), void* context);

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... args) {
  auto call = [&] { kernel(P(args)...); };
  return cuda_shim_launch(
      *config, reinterpret_cast<const void*>(kernel), [](void* context) { (*static_cast<decltype(call)*>(context))(); },
      &call);
}

// ---------------------------------------------------------------------------------------------------------
// Device side

inline constinit thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

void* cuda_shim_dynamic_shared();

void __syncthreads();

// The lanes of `mask` meet, each with `bytes` at `value`; back comes what lane `source` brought.
void cuda_shim_exchange(unsigned mask, void* value, size_t bytes, unsigned source);

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  const unsigned lane = threadIdx.x % 32;
  cuda_shim_exchange(mask, &value, sizeof(T), lane ^ unsigned(lane_mask));
  return value;
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  const unsigned lane = threadIdx.x % 32;
  cuda_shim_exchange(mask, &value, sizeof(T), lane + delta < 32 ? lane + delta : lane);
  return value;
}

inline void __stcs(uint4* p, uint4 value) { *p = value; }
inline void __stcs(uint2* p, uint2 value) { *p = value; }
