// The stand-in for the CUDA runtime: devices, launches, and the scheduler that runs a block's threads as fibers. Every
// thread that waits is really suspended, and goes on when all those have come that it waits for. When nobody can go on,
// the launch fails and says who waited. Relies on fiber.h.
#include "shim.h"

#include <cstdio>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "cuda_runtime.h"
#include "fiber.h"

#if defined(__x86_64__)
asm(R"(
.text
.globl cuda_shim_switch
.hidden cuda_shim_switch
.type cuda_shim_switch, @function
cuda_shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_shim_switch, .-cuda_shim_switch
)");
#endif

namespace cuda_shim {
namespace {

constexpr int kMaxThreads = 1024, kWarp = 32, kWarps = kMaxThreads / kWarp;
constexpr size_t kMaxBytes = 8;  // that a lane brings to an exchange

enum class State { ready, at_barrier, in_exchange, done };

// What the lanes of a warp exchange. Two sets of values: while some still read one, others bring the next.
struct Exchange {
  unsigned arrived = 0;
  size_t bytes = 0;
  int turn = 0;
  char values[2][kWarp][kMaxBytes];
};

struct Settings {
  Order order = Order::forward;
  uint64_t random = 0;
  int device = 0;
  int64_t launches = 0;
  cudaError_t error = cudaSuccess;
  std::string failure;
};

thread_local Settings settings;

uint64_t next_random() {  // xorshift64
  uint64_t& x = settings.random;
  x ^= x << 13;
  x ^= x >> 7;
  return x ^= x << 17;
}

// The order in which 0 .. count - 1 have their turn.
void arrange(std::vector<int>& turns, int count) {
  turns.resize(size_t(count));
  for (int i = 0; i < count; ++i) turns[size_t(i)] = settings.order == Order::backward ? count - 1 - i : i;
  if (settings.order != Order::shuffled) return;
  for (size_t i = turns.size(); i > 1; --i) std::swap(turns[i - 1], turns[next_random() % i]);
}

// Runs one block after the other.
class Block {
 public:
  void prepare(int threads, size_t shared_bytes, void (*body)(void*), void* context) {
    threads_ = threads;
    body_ = body;
    context_ = context;
    shared_bytes_ = shared_bytes;
    shared_.reset(new char[shared_bytes]);  // of exactly that size, for AddressSanitizer
  }
  void release() { shared_.reset(); }

  bool run() {
    memset(shared_.get(), 0xff, shared_bytes_);
    at_barrier_ = 0;
    for (Exchange& exchange : exchanges_) exchange.arrived = 0;
    for (int i = 0; i < threads_; ++i) {
      state_[i] = State::ready;
      Fiber& fiber = fibers_[i];
      fiber.stack = stacks_.at(i);
      fiber.bytes = Stacks::kBytes;
      fiber.fake_stack = nullptr;
      fiber.context.prepare(fiber.stack, fiber.bytes, start);
    }
    failed_ = false;
    running_ = threads_;
    while (running_ > 0 && !failed_ && (settings.order == Order::shuffled ? run_warps() : run_round(0, threads_))) {
    }
    if (running_ > 0 && !failed_) report_waiting();
    if (failed_) stacks_.forget_frames();
    return !failed_;
  }

  void* shared() { return shared_.get(); }

  void barrier() {
    if (++at_barrier_ < threads_) return suspend(State::at_barrier);
    at_barrier_ = 0;
    wake(0, threads_, State::at_barrier);
  }

  void exchange(unsigned mask, void* value, size_t bytes, unsigned source) {
    const unsigned lane = unsigned(current_ % kWarp), bit = 1u << lane;
    Exchange& e = exchanges_[current_ / kWarp];
    if (mask != 0xffffffffu || bytes > kMaxBytes || source >= kWarp) fail("an exchange that is not for a whole warp");
    else if (e.arrived && e.bytes != bytes) fail("lanes of a warp met in different exchanges");
    if (failed_) return suspend(State::done);
    const int turn = e.turn;
    e.bytes = bytes;
    e.arrived |= bit;
    memcpy(e.values[turn][lane], value, bytes);
    if (e.arrived != mask) {
      suspend(State::in_exchange);
    } else {
      e.arrived = 0;
      e.turn ^= 1;
      wake(current_ / kWarp * kWarp, kWarp, State::in_exchange);
    }
    memcpy(value, e.values[turn][source], bytes);
  }

 private:
  Stacks stacks_;
  Fiber thread_, fibers_[kMaxThreads];
  State state_[kMaxThreads];
  Exchange exchanges_[kWarps];
  std::vector<int> turns_, warp_turns_;
  std::unique_ptr<char[]> shared_;
  size_t shared_bytes_ = 0;
  int threads_ = 0, running_ = 0, at_barrier_ = 0, current_ = 0;
  bool failed_ = false;
  void (*body_)(void*) = nullptr;
  void* context_ = nullptr;

  static void start();

  void run_thread() {
    Fiber::arrived(fibers_[current_], &thread_);
    body_(context_);
    --running_;
    state_[current_] = State::done;
    Fiber::go(fibers_[current_], thread_, true);
  }

  // Each of these threads that can run has its turn; false if none could.
  bool run_round(int first, int count) {
    bool any = false;
    arrange(turns_, count);
    for (const int turn : turns_) {
      if (state_[first + turn] != State::ready || failed_) continue;
      any = true;
      resume(first + turn);
    }
    return any;
  }

  bool run_warps() {
    bool any = false;
    arrange(warp_turns_, threads_ / kWarp);
    for (const int warp : warp_turns_) {
      while (run_round(warp * kWarp, kWarp)) any = true;
    }
    return any;
  }

  void resume(int i) {
    current_ = i;
    threadIdx.x = unsigned(i);
    Fiber::go(thread_, fibers_[i]);
  }

  void suspend(State state) {
    state_[current_] = state;
    Fiber::go(fibers_[current_], thread_);
  }

  void wake(int first, int count, State state) {
    for (int i = first; i < first + count; ++i) {
      if (state_[i] == state) state_[i] = State::ready;
    }
  }

  void fail(const std::string& what) {
    failed_ = true;
    settings.failure = "block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(current_) + ": " + what;
  }

  void report_waiting() {
    int counts[4] = {};
    for (int i = 0; i < threads_; ++i) ++counts[int(state_[i])];
    fail(std::to_string(counts[int(State::at_barrier)]) + " threads wait at a barrier and " +
         std::to_string(counts[int(State::in_exchange)]) + " in an exchange, for others of which " +
         std::to_string(counts[int(State::done)]) + " have returned");
  }
};

// Made at the first launch of a thread. Kept as a plain pointer for the fibers, which all see the same.
Block& block() {
  static thread_local Block block;
  return block;
}

// No locals: the frame is left without returning.
void Block::start() { block().run_thread(); }

cudaError_t record(cudaError_t error) { return settings.error = error; }

std::mutex limits_mutex;
std::map<std::pair<const void*, int>, int> shared_limits;  // by kernel and device, where more was asked for

size_t shared_limit(const void* kernel) {
  const std::lock_guard<std::mutex> lock(limits_mutex);
  const auto found = shared_limits.find({kernel, settings.device});
  return size_t(found == shared_limits.end() ? (48 << 10) - kStaticShared : found->second);
}

}  // namespace

void set_order(Order order, uint64_t seed) {
  settings.order = order;
  settings.random = seed * 2 + 1;
}
int64_t launches() { return settings.launches; }
const char* last_failure() { return settings.failure.c_str(); }

}  // namespace cuda_shim

using namespace cuda_shim;

void __syncthreads() { block().barrier(); }

void cuda_shim_exchange(unsigned mask, void* value, size_t bytes, unsigned source) {
  block().exchange(mask, value, bytes, source);
}

void* cuda_shim_dynamic_shared() { return block().shared(); }

cudaError_t cuda_shim_launch(const cudaLaunchConfig_t& config, const void* kernel, void (*body)(void*), void* context) {
  const unsigned blocks = config.gridDim.x, threads = config.blockDim.x;
  const size_t shared = config.dynamicSmemBytes;
  if (blocks < 1 || blocks > 0x7fffffffu || threads < 1 || threads > kMaxThreads || threads % kWarp ||
      shared > shared_limit(kernel) || shared > size_t(kDevices[settings.device].shared_per_block)) {
    return record(cudaErrorInvalidValue);
  }
  ++settings.launches;
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  Block& running = block();
  running.prepare(int(threads), shared, body, context);
  std::vector<int> turns;
  arrange(turns, int(blocks));
  for (const int i : turns) {
    blockIdx.x = unsigned(i);
    if (!running.run()) return record(cudaErrorLaunchFailure);
  }
  running.release();
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = settings.error;
  settings.error = cudaSuccess;
  return error;
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorLaunchFailure:
      return last_failure();
  }
  return "unknown error";
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = int(sizeof(kDevices) / sizeof(kDevices[0]));
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = settings.device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || size_t(device) >= sizeof(kDevices) / sizeof(kDevices[0])) return record(cudaErrorInvalidDevice);
  settings.device = device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || size_t(device) >= sizeof(kDevices) / sizeof(kDevices[0])) return record(cudaErrorInvalidDevice);
  const FakeDevice& fake = kDevices[device];
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = fake.multiprocessors;
      return cudaSuccess;
    case cudaDevAttrL2CacheSize:
      *value = fake.cache_bytes;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = fake.shared_per_multiprocessor;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = fake.shared_per_block;
      return cudaSuccess;
  }
  return record(cudaErrorInvalidValue);
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (value + kStaticShared > kDevices[settings.device].shared_per_block) return record(cudaErrorInvalidValue);
  const std::lock_guard<std::mutex> lock(limits_mutex);
  const int kept = shared_limits.try_emplace({kernel, settings.device}, value).first->second;
  // CUDA allows a change, but another thread may be about to launch by the limit that it has set.
  return kept == value ? cudaSuccess : record(cudaErrorInvalidValue);
}
