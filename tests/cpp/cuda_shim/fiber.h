// Fibers: stacks of their own on one thread, switched by hand. For shim.cpp.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_shim {

#if defined(__x86_64__)

// Saves the callee's registers on the stack and the stack in *from, and goes on at `to`.
extern "C" void cuda_shim_switch(void** from, void* to) __attribute__((visibility("hidden")));

struct Context {
  void* stack_pointer = nullptr;

  void prepare(char* stack, size_t bytes, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + bytes / 16 * 16);
    *--top = nullptr;  // where entry would return to; it never does
    *--top = reinterpret_cast<void*>(entry);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    stack_pointer = top;
  }
  static void go(Context& from, Context& to) { cuda_shim_switch(&from.stack_pointer, to.stack_pointer); }
};

#else

struct Context {
  ucontext_t state;

  void prepare(char* stack, size_t bytes, void (*entry)()) {
    getcontext(&state);
    state.uc_stack.ss_sp = stack;
    state.uc_stack.ss_size = bytes;
    state.uc_link = nullptr;
    makecontext(&state, entry, 0);
  }
  static void go(Context& from, Context& to) { swapcontext(&from.state, &to.state); }
};

#endif

// A context and its stack, with what AddressSanitizer must be told of them.
struct Fiber {
  Context context;
  char* stack = nullptr;  // null: the stack of the thread
  size_t bytes = 0;
  void* fake_stack = nullptr;

  // Goes on in `to`, until someone switches back. `last`: nobody will.
  static void go(Fiber& from, Fiber& to, [[maybe_unused]] bool last = false) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.stack, to.bytes);
#endif
    Context::go(from.context, to.context);
    arrived(from);
  }

  // To be called first on a new fiber, which finds out about the stack of the thread that way.
  static void arrived([[maybe_unused]] Fiber& here, [[maybe_unused]] Fiber* thread = nullptr) {
#if defined(__SANITIZE_ADDRESS__)
    const void* stack = nullptr;
    size_t bytes = 0;
    __sanitizer_finish_switch_fiber(here.fake_stack, &stack, &bytes);
    if (!thread) return;
    thread->stack = static_cast<char*>(const_cast<void*>(stack));
    thread->bytes = bytes;
#endif
  }
};

// The stacks of a block's threads, each with a page below it that must not be touched.
class Stacks {
 public:
  static constexpr int kCount = 1024;
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kBytes = 256 << 10;
#else
  static constexpr size_t kBytes = 64 << 10;
#endif

  Stacks() : guard_(size_t(sysconf(_SC_PAGESIZE))) {
    base_ = mmap(nullptr, size(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base_ == MAP_FAILED) std::abort();
    for (int i = 0; i < kCount; ++i) {
      if (mprotect(at(i) - guard_, guard_, PROT_NONE)) std::abort();
    }
  }
  ~Stacks() {
    forget_frames();
    munmap(base_, size());
  }
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;

  char* at(int i) const { return static_cast<char*>(base_) + size_t(i) * (guard_ + kBytes) + guard_; }

  // After fibers that did not return: what AddressSanitizer knows of their frames no longer holds.
  void forget_frames() {
#if defined(__SANITIZE_ADDRESS__)
    for (int i = 0; i < kCount; ++i) __asan_unpoison_memory_region(at(i), kBytes);
#endif
  }

 private:
  size_t guard_;
  void* base_;

  size_t size() const { return kCount * (guard_ + kBytes); }
};

}  // namespace cuda_shim
