// Memory of exactly the size asked for, so that a read or write outside of it is found: by AddressSanitizer on the
// heap, and in every build by a page without access rights, which also stops masked vector instructions that
// AddressSanitizer does not look at. For test_simd.cpp and test_kernels.cpp.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

enum class Place { heap, before_guard, after_guard };

class Buffer {
 public:
  Buffer(int64_t bytes, Place place, int64_t alignment = 1) : bytes_(static_cast<size_t>(bytes)), place_(place) {
    if (place == Place::heap) {
      const size_t heap_alignment = alignment < 16 ? 16 : static_cast<size_t>(alignment);
      if (posix_memalign(&base_, heap_alignment, bytes_ ? bytes_ : 1)) std::abort();
      data_ = static_cast<char*>(base_);
      return;
    }
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t body = (bytes_ + page - 1) / page * page;
    mapped_ = body + 2 * page;
    base_ = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base_ == MAP_FAILED) std::abort();
    char* const first = static_cast<char*>(base_) + page;
    if (body && mprotect(first, body, PROT_READ | PROT_WRITE)) std::abort();
    data_ = first;
    if (place == Place::before_guard) data_ += (body - bytes_) / alignment * alignment;
  }
  ~Buffer() {
    if (place_ == Place::heap) std::free(base_);
    else munmap(base_, mapped_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  template <class T>
  T* as() {
    return reinterpret_cast<T*>(data_);
  }
  size_t bytes() const { return bytes_; }
  void fill(int byte) {
    if (bytes_) std::memset(data_, byte, bytes_);
  }

 private:
  size_t bytes_, mapped_ = 0;
  Place place_;
  void* base_ = nullptr;
  char* data_ = nullptr;
};
