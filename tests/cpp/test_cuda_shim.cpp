// The stand-in for the CUDA runtime itself: a kernel that waits in vain fails, and one without a barrier that it needs
// gives other results in another order of threads.
#include <cstring>
#include <vector>

#include "check.h"
#include "cuda_shim/cuda_runtime.h"
#include "cuda_shim/shim.h"

namespace {

using cuda_shim::Order;

cudaError_t launch(void (*kernel)(int*), int* out, int threads) {
  cudaLaunchConfig_t config;
  config.blockDim = dim3(unsigned(threads));
  return cudaLaunchKernelEx(&config, kernel, out);
}

void test_shim() {
  cuda_shim::set_order(Order::forward);
  int out[64];
  const auto fails = [&](void (*kernel)(int*), const char* why) {
    CHECK(launch(kernel, out, 64) == cudaErrorLaunchFailure, "%s", why);
    CHECK(std::strstr(cudaGetErrorString(cudaErrorLaunchFailure), why), "%s", cuda_shim::last_failure());
    CHECK(cudaGetLastError() == cudaErrorLaunchFailure && cudaGetLastError() == cudaSuccess);
  };
  fails(
      [](int*) {
        if (threadIdx.x) __syncthreads();
      },
      "63 threads wait at a barrier");
  fails(
      [](int*) {
        if (threadIdx.x % 32) __shfl_xor_sync(~0u, 1, 1);
      },
      "62 in an exchange");
  fails(
      [](int*) {
        if (threadIdx.x < 32) __syncthreads();
        else __shfl_xor_sync(~0u, 1, 1), __syncthreads(), __syncthreads();
      },
      "32 threads wait at a barrier");
  fails(
      [](int*) {
        if (threadIdx.x % 2) __shfl_xor_sync(~0u, 1, 1);
        else __shfl_xor_sync(~0u, 1.0, 1);
      },
      "different exchanges");
  fails([](int*) { __shfl_xor_sync(1u, 1, 1); }, "not for a whole warp");

  const auto no_race = [](int* out) {
    __shared__ int all[64];
    all[threadIdx.x] = int(threadIdx.x);
    __syncthreads();
    out[threadIdx.x] = all[63 - threadIdx.x];
  };
  const auto missing_barrier = [](int* out) {
    __shared__ int all[64];
    all[threadIdx.x] = 0;
    __syncthreads();
    all[threadIdx.x] = int(threadIdx.x) + 1;
    out[threadIdx.x] = all[63 - threadIdx.x];
  };
  const auto result = [&](void (*kernel)(int*), Order order) {
    cuda_shim::set_order(order, 7);
    CHECK(launch(kernel, out, 64) == cudaSuccess);
    return std::vector<int>(out, out + 64);
  };
  CHECK(result(no_race, Order::forward) == result(no_race, Order::backward));
  CHECK(result(no_race, Order::forward) == result(no_race, Order::shuffled));
  CHECK(result(missing_barrier, Order::forward) != result(missing_barrier, Order::backward));
  CHECK(result(missing_barrier, Order::forward) != result(missing_barrier, Order::shuffled));
}

}  // namespace

int main() {
  test_shim();
  return check::report();
}
