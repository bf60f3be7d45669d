// What the C++ tests share: CHECK, a comparison that knows NaN and infinity, and random numbers that are the same
// everywhere. No framework: a test's main() ends with `return check::report();`.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>

// CHECK(condition) or CHECK(condition, "printf format", ...)
#define CHECK(condition, ...)                                            \
  do {                                                                   \
    ++check::total;                                                      \
    if (!(condition) && check::failed(__FILE__, __LINE__, #condition)) { \
      std::printf("  " __VA_ARGS__);                                     \
      std::printf("\n");                                                 \
    }                                                                    \
  } while (false)

namespace check {

// The sanitizers make a test ten times slower: the longest then run a share of their cases.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

inline int64_t total = 0, failures = 0;

// Counts a failure; true for the first few, which are printed.
inline bool failed(const char* file, int line, const char* condition) {
  constexpr int kPrinted = 20;
  if (++failures > kPrinted) return false;
  std::printf("%s:%d: failed: %s\n", file, line, condition);
  return true;
}

inline int report() {
  std::printf("%lld checks, %lld failures\n", static_cast<long long>(total), static_cast<long long>(failures));
  return failures ? 1 : 0;
}

// NaN for NaN, the same infinity for an infinity, else at most `tolerance` apart.
template <class T>
bool close(T got, T want, T tolerance) {
  if (std::isnan(want)) return std::isnan(got);
  if (std::isinf(want) || std::isinf(got)) return got == want;
  return std::fabs(got - want) <= tolerance;
}

// SplitMix64 (Steele, Lea, Flood 2014).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t bits() {
    uint64_t x = state_ += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(n)); }
  bool chance(double p) { return uniform(0, 1) < p; }
  double uniform(double low, double high) { return low + (high - low) * (static_cast<double>(bits() >> 11) * 0x1p-53); }
  double normal() {
    const double radius = std::sqrt(-2 * std::log(uniform(0x1p-53, 1)));
    return radius * std::cos(uniform(0, 6.283185307179586));
  }
  template <class T, int N>
  T pick(const T (&values)[N]) {
    return values[below(N)];
  }

 private:
  uint64_t state_;
};

}  // namespace check
