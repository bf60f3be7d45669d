// How the stand-in for the CUDA runtime is told what to do, and asked what it did. For tests of csrc/cuda.
#pragma once

#include <cstdint>

namespace cuda_shim {

// In which order threads that can run are resumed: all of a block in turn, from the first or from the last, or one warp
// at random as far as it gets, and then another. A kernel without a race computes the same bits in every order.
enum class Order { forward, backward, shuffled };

// Settings and counts belong to the calling thread.
void set_order(Order order, uint64_t seed = 0);

int64_t launches();  // kernels launched so far

// What went wrong in the last launch that failed: threads that waited for others in vain. Empty: nothing yet.
const char* last_failure();

// The devices that the stand-in pretends to have.
struct FakeDevice {
  int multiprocessors, shared_per_block, shared_per_multiprocessor, cache_bytes;
};
constexpr FakeDevice kDevices[] = {
    {132, 232448, 233472, 50 << 20},  // as large as they come
    {6, 7 << 10, 9 << 10, 8 << 10},   // shared memory for the beginning of a row only
    {2, 0, 0, 0},                     // none at all
    {64, 102400, 167936, 0},          // all the shared memory for one block, with rows split over blocks early
};

// Shared memory that each kernel is taken to declare; it counts towards the limits on what is asked for at the launch.
constexpr int kStaticShared = 1024;

}  // namespace cuda_shim
