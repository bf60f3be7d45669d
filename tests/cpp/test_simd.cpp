// csrc/cpu/simd.h and memory.h against the C library in higher precision and against scalar models. This file is
// compiled once per instruction set, with the flags and the DRSL_ISA of that set; simd_main.cpp, compiled without
// them, calls it where the processor can run it.
#include <algorithm>
#include <memory>
#include <vector>

#include "buffers.h"
#include "check.h"
#include "cpu/memory.h"
#include "formats.h"

namespace drsl {
inline namespace DRSL_ISA {
namespace {

constexpr Place kPlaces[] = {Place::heap, Place::before_guard, Place::after_guard};

// ---------------------------------------------------------------------------------------------------------
// Elementary functions. Errors are in units in the last place of the result.

template <class S>
constexpr int kMantissa = sizeof(S) == 4 ? 23 : 52;
template <class S>
constexpr S kSmallestNormal = sizeof(S) == 4 ? S(0x1p-126) : S(0x1p-1022);
// Truth is computed two formats up: double for float, long double for double.
template <class S>
struct WiderOf {
  using type = double;
};
template <>
struct WiderOf<double> {
  using type = long double;
};
template <class S>
using Wider = typename WiderOf<S>::type;

template <class S>
double ulps(S got, Wider<S> want) {
  if (std::isnan(got)) return INFINITY;
  const int exponent = std::max(std::ilogb(want), std::ilogb(kSmallestNormal<S>));
  return static_cast<double>(std::fabs(std::ldexp(static_cast<Wider<S>>(got) - want, kMantissa<S> - exponent)));
}

// The largest error of `function` over `inputs`, found on vectors that hold different numbers.
template <class S, class Function, class Truth>
double largest_error(const std::vector<S>& inputs, Function function, Truth truth, S* where) {
  constexpr int kLanes = Vec<S>::kLanes;
  double worst = 0;
  for (size_t i = 0; i + kLanes <= inputs.size(); i += kLanes) {
    S results[kLanes];
    store(static_cast<S*>(results), function(load(&inputs[i])));
    for (int lane = 0; lane < kLanes; ++lane) {
      const double error = ulps<S>(results[lane], truth(static_cast<Wider<S>>(inputs[i + lane])));
      if (error <= worst) continue;
      worst = error;
      *where = inputs[i + lane];
    }
  }
  return worst;
}

template <class S, class Function, class Truth>
void test_function(const char* name, const std::vector<S>& inputs, Function function, Truth truth, double bound) {
  S where = 0;
  const double worst = largest_error<S>(inputs, function, truth, &where);
  std::printf("%s %s: at most %.2f ulp over %zu arguments (%.9g)\n", sizeof(S) == 4 ? "float" : "double", name, worst,
              inputs.size(), static_cast<double>(where));
  CHECK(worst <= bound, "%s at %.17g: %.3f ulp, allowed %.3f", name, static_cast<double>(where), worst, bound);
}

// Evenly spaced numbers, mixed with their neighbours in floating point and with numbers of every magnitude.
template <class S>
std::vector<S> grid(S low, S high, int64_t count) {
  std::vector<S> all;
  check::Random random(1);
  for (int64_t i = 0; i < count; ++i) {
    const S x = S(low + (high - low) * (double(i) / double(count)));
    all.push_back(x);
    all.push_back(S(random.uniform(low, high)));
    const S small = S(x * std::exp2(-random.uniform(0, sizeof(S) == 4 ? 30 : 60)));
    all.push_back(small > low && small < high ? small : x);
  }
  all.push_back(low);
  all.push_back(high);
  while (all.size() % Vec<S>::kLanes) all.push_back(high);
  return all;
}

// Positive normal numbers of every exponent, and many close to 1.
template <class S>
std::vector<S> positive_numbers(int64_t count) {
  std::vector<S> all;
  check::Random random(2);
  const double range = std::ilogb(1 / kSmallestNormal<S>);
  for (int64_t i = 0; i < count; ++i) {
    all.push_back(S(std::exp2(random.uniform(-range, range))));
    all.push_back(S(1 + random.uniform(-1, 1) * std::exp2(-random.uniform(1, kMantissa<S>))));
  }
  for (const S x : {S(1), S(0.75), S(1.5), std::nextafter(S(0.75), S(0)), std::nextafter(S(1.5), S(0)),
                    std::nextafter(S(1), S(0)), std::nextafter(S(1), S(2)), S(2), kSmallestNormal<S>}) {
    all.push_back(x);
  }
  while (all.size() % Vec<S>::kLanes) all.push_back(S(3));
  return all;
}

template <class S>
void test_functions(int64_t count) {
  using K = Tables<S>;
  const auto exp = [](auto x) { return exp_(x); };
  const auto expm1 = [](auto x) { return expm1_(x); };
  const auto log = [](auto x) { return log_(x); };
  const auto log1p = [](auto x) { return log1p_(x); };
  using W = Wider<S>;
  // From the argument whose exponential is the smallest normal number up to the largest allowed one.
  const S first = std::nextafter(S(K::kSmallestNormalLog), S(0));
  test_function<S>("exp", grid<S>(first, K::kHighest, count), exp, [](W x) { return std::exp(x); }, 1.1);
  const auto exp_of_fall = [](auto x) { return drsl::exp_of_fall(x); };
  test_function<S>("exp_of_fall", grid<S>(first, S(0), count), exp_of_fall, [](W x) { return std::exp(x); }, 1.1);
  test_function<S>("expm1", grid<S>(-40, S(-1e-30), count), expm1, [](W x) { return std::expm1(x); }, 1.9);
  test_function<S>("log", positive_numbers<S>(count), log, [](W x) { return std::log(x); }, 1.1);
  test_function<S>("log1p", grid<S>(S(-0.5), S(1), count), log1p, [](W x) { return std::log1p(x); }, 1.5);
}

// One argument in one lane, something else in the others.
template <class S, class Function>
S at(Function function, S x, S other = S(0.25)) {
  S result = 0;
  for (int lane = 0; lane < Vec<S>::kLanes; ++lane) {
    Vec<S> v(other);
    v.v[lane] = x;
    const S here = function(v).v[lane];
    CHECK(lane == 0 || std::isnan(here) || here == result, "lane %d differs from lane 0", lane);
    result = here;
  }
  return result;
}

template <class S, class Function>
S at_negative(Function function, S x) {
  return at<S>(function, x, S(-0.25));
}

template <class S>
void test_specials() {
  const S inf = std::numeric_limits<S>::infinity(), nan = std::numeric_limits<S>::quiet_NaN();
  const auto exp = [](Vec<S> x) { return exp_(x); };
  const auto exp_of_fall = [](Vec<S> x) { return drsl::exp_of_fall(x); };
  CHECK(at<S>(exp, -inf) == 0 && !std::signbit(at<S>(exp, -inf)));
  CHECK(at<S>(exp, S(-1e30)) == 0);
  CHECK(at<S>(exp, -std::numeric_limits<S>::max()) == 0);
  CHECK(at<S>(exp, S(0)) == 1 && at<S>(exp, -S(0)) == 1);
  for (const S x : {-inf, -std::numeric_limits<S>::max(), S(-1e30), S(-1e6), 2 * Tables<S>::kLowest, -S(0), S(0)}) {
    CHECK(at_negative<S>(exp_of_fall, x) == at<S>(exp, x), "exp_of_fall(%g)", double(x));
  }
  CHECK(std::isnan(at<S>(exp, nan)));
  CHECK(std::isnan(at<S>(exp, -nan)));

  // Where the result is no normal number it is 0, or within one of the smallest steps.
  const S step = std::numeric_limits<S>::denorm_min();
  for (S x = Tables<S>::kSmallestNormalLog; x > 2 * Tables<S>::kLowest; x -= S(0.037)) {
    const S got = at<S>(exp, x), want = S(std::exp(Wider<S>(x)));
    CHECK(got == 0 || std::fabs(got - want) <= step, "exp(%.9g) = %g, not %g", double(x), double(got), double(want));
    const S fall = at_negative<S>(exp_of_fall, x);
    CHECK(fall == 0 || std::fabs(fall - want) <= step, "exp_of_fall(%.9g) = %g", double(x), double(fall));
  }

  const auto expm1 = [](Vec<S> x) { return expm1_(x); };
  CHECK(at<S>(expm1, -inf) == -1);
  CHECK(at<S>(expm1, S(0)) == 0);
  CHECK(std::isnan(at<S>(expm1, nan)));
  CHECK(at<S>(expm1, -kSmallestNormal<S>) == -kSmallestNormal<S>);

  const auto log = [](Vec<S> x) { return log_(x); };
  CHECK(at<S>(log, S(0)) == -inf);
  CHECK(at<S>(log, S(1)) == 0);
  CHECK(std::isnan(at<S>(log, nan)));

  const auto log1p = [](Vec<S> x) { return log1p_(x); };
  CHECK(at<S>(log1p, S(0)) == 0);
  CHECK(at<S>(log1p, kSmallestNormal<S>) == kSmallestNormal<S>);
  CHECK(std::isnan(at<S>(log1p, nan)));

  const auto abs = [](Vec<S> x) { return abs_(x); };
  CHECK(at<S>(abs, -inf) == inf && at<S>(abs, S(-2)) == 2 && at<S>(abs, S(2)) == 2);
  CHECK(!std::signbit(at<S>(abs, -S(0))) && std::isnan(at<S>(abs, nan)));
  CHECK(std::signbit(Vec<S>(-S(0)).v[0]), "a vector made of -0 holds -0");
}

// ---------------------------------------------------------------------------------------------------------
// Lanes

template <class S>
void test_lanes() {
  constexpr int kLanes = Vec<S>::kLanes;
  Vec<S> square[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < kLanes; ++j) square[i].v[j] = S(100 * i + j);
  }
  transpose(square);
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < kLanes; ++j) CHECK(square[i].v[j] == S(100 * j + i), "transpose: row %d, column %d", i, j);
  }

  const S inf = std::numeric_limits<S>::infinity();
  for (int top = 0; top < kLanes; ++top) {
    Vec<S> x;
    S sum = 0;
    for (int j = 0; j < kLanes; ++j) sum += x.v[j] = S(j == top ? 1000 : -1 - j);
    CHECK(reduce_max(x) == 1000, "largest in lane %d", top);
    CHECK(reduce_add(x) == sum);
    x.v[top] = -inf;
    CHECK(reduce_add(x) == -inf);
    x.v[top] = std::numeric_limits<S>::quiet_NaN();
    CHECK(std::isnan(reduce_add(x)));
    for (int j = 0; j < kLanes; ++j) {
      CHECK((lane_is<S>(top).v[j] != 0) == (j == top));
      CHECK((lane_below<S>(top).v[j] != 0) == (j < top));
    }
  }
  CHECK(reduce_max(Vec<S>(-inf)) == -inf);

  // max_ keeps NaN of its second argument, and select chooses lane by lane.
  const S nan = std::numeric_limits<S>::quiet_NaN();
  CHECK(max_(Vec<S>(S(1)), Vec<S>(S(2))).v[0] == 2 && max_(Vec<S>(S(2)), Vec<S>(S(1))).v[0] == 2);
  CHECK(std::isnan(max_(Vec<S>(S(1)), Vec<S>(nan)).v[kLanes - 1]));
  const Vec<S> chosen = select(lane_below<S>(1), Vec<S>(S(1)), Vec<S>(S(2)));
  for (int j = 0; j < kLanes; ++j) CHECK(chosen.v[j] == (j < 1 ? 1 : 2));
}

// ---------------------------------------------------------------------------------------------------------
// Memory

bool same(double a, double b) { return std::isnan(b) ? std::isnan(a) : a == b && std::signbit(a) == std::signbit(b); }

template <class D>
void test_widen(const Format& format) {
  constexpr int kLanes = Vec<float>::kLanes;
  for (int first = 0; first < 65536; first += kLanes) {
    D in[kLanes];
    float out[kLanes];
    for (int i = 0; i < kLanes; ++i) in[i].bits = static_cast<uint16_t>(first + i);
    store(static_cast<float*>(out), load(static_cast<const D*>(in)));
    for (int i = 0; i < kLanes; ++i) {
      const double want = format.widen(in[i].bits);
      CHECK(same(out[i], want), "widen %04x: %g, not %g", in[i].bits, double(out[i]), want);
      CHECK(same(load_one(in + i), want), "load_one %04x", in[i].bits);
    }
  }
}

// Every number of the format, the middle between it and the next, and the floats beside these; floats at random.
std::vector<float> narrow_inputs(const Format& format) {
  std::vector<float> all;
  for (int bits = 0; bits < 65536; ++bits) {
    const float x = float(format.widen(uint16_t(bits))), next = float(format.widen(uint16_t(bits + 1)));
    // Beyond the largest number lies what would be the next one.
    const float middle = std::isinf(next)
                             ? float(format.largest() + std::ldexp(1.0, format.bias() - 1 - format.mantissa_bits))
                             : float((double(x) + next) / 2);
    for (const float y : {x, std::copysign(middle, x)}) {
      all.insert(all.end(), {y, std::nextafter(y, -INFINITY), std::nextafter(y, INFINITY)});
    }
  }
  check::Random random(3);
  for (int i = 0; i < 100000; ++i) {
    const uint32_t bits = static_cast<uint32_t>(random.bits());
    float x;
    std::memcpy(&x, &bits, sizeof(x));
    all.push_back(x);
  }
  while (all.size() % Vec<float>::kLanes) all.push_back(-0.0f);
  return all;
}

template <class D>
void test_narrow(const Format& format) {
  constexpr int kLanes = Vec<float>::kLanes;
  const std::vector<float> inputs = narrow_inputs(format);
  for (size_t first = 0; first < inputs.size(); first += kLanes) {
    D out[kLanes], one;
    store(static_cast<D*>(out), load(&inputs[first]));
    for (int i = 0; i < kLanes; ++i) {
      const float x = inputs[first + i];
      const uint16_t want = format.narrow(x);
      const bool right = std::isnan(x) ? std::isnan(format.widen(out[i].bits)) : out[i].bits == want;
      CHECK(right, "narrow %.9g (%a): %04x, not %04x", double(x), double(x), out[i].bits, want);
      store_one(&one, x);
      CHECK(one.bits == out[i].bits, "store_one %.9g: %04x, not %04x", double(x), one.bits, out[i].bits);
    }
  }
}

// The format's own bytes: whatever the type, numbers that it holds exactly.
template <class D>
D number(int i) {
  const double x = (i % 2 ? -1 : 1) * (0.5 + i);
  if constexpr (std::is_same_v<D, Half>) return {kHalf.narrow(x)};
  else if constexpr (std::is_same_v<D, BFloat16>) return {kBFloat16.narrow(x)};
  else return D(x);
}

template <class D>
void test_partial(const char* name) {
  using S = Accumulator<D>;
  constexpr int kLanes = Vec<S>::kLanes;
  for (const Place place : kPlaces) {
    for (int n = 0; n <= kLanes; ++n) {
      Buffer in(n * int64_t(sizeof(D)), place, alignof(D)), out(n * int64_t(sizeof(D)), place, alignof(D));
      for (int i = 0; i < n; ++i) in.as<D>()[i] = number<D>(i);
      out.fill(0x5a);
      const Vec<S> v = load_first(in.as<const D>(), n);
      for (int i = 0; i < kLanes; ++i) {
        const S want = i < n ? S((i % 2 ? -1 : 1) * (0.5 + i)) : S(0);
        CHECK(v.v[i] == want, "%s: lane %d of the first %d", name, i, n);
      }
      store_first(out.as<D>(), v, n);
      CHECK(!n || !std::memcmp(in.as<char>(), out.as<char>(), in.bytes()), "%s: first %d there and back", name, n);
      for (int i = 0; i < n; ++i) CHECK(load_one(in.as<const D>() + i) == v.v[i]);

      // In the middle of memory that may be written, nothing beside the n elements changes.
      D around[2 * kLanes], before[2 * kLanes];
      for (int i = 0; i < 2 * kLanes; ++i) around[i] = number<D>(40 + i);
      std::memcpy(before, around, sizeof(around));
      store_first(around + 1, v, n);
      CHECK(!n || !std::memcmp(around + 1, in.as<char>(), in.bytes()));
      std::memcpy(before + 1, around + 1, in.bytes());
      CHECK(!std::memcmp(before, around, sizeof(around)), "%s: store of the first %d", name, n);
    }
    // Whole vectors at addresses that only the element type aligns.
    Buffer memory((kLanes + 1) * int64_t(sizeof(D)), place, alignof(D));
    for (int i = 0; i <= kLanes; ++i) memory.as<D>()[i] = number<D>(i);
    for (int shift = 0; shift < 2; ++shift) {
      const Vec<S> v = load(memory.as<const D>() + shift);
      for (int i = 0; i < kLanes; ++i) CHECK(v.v[i] == load_one(memory.as<const D>() + shift + i), "%s", name);
      D copy[kLanes + 1];
      store(static_cast<D*>(copy) + (1 - shift), v);
      CHECK(!std::memcmp(copy + (1 - shift), memory.as<D>() + shift, kLanes * sizeof(D)), "%s", name);
    }
  }
}

}  // namespace
}  // namespace DRSL_ISA
}  // namespace drsl

int run_simd_tests() {
  using namespace drsl;
  test_functions<float>(200000);
  test_functions<double>(60000);
  test_specials<float>();
  test_specials<double>();
  test_lanes<float>();
  test_lanes<double>();
  test_widen<Half>(kHalf);
  test_widen<BFloat16>(kBFloat16);
  test_narrow<Half>(kHalf);
  test_narrow<BFloat16>(kBFloat16);
  test_partial<float>("float");
  test_partial<double>("double");
  test_partial<Half>("float16");
  test_partial<BFloat16>("bfloat16");
  return check::report();
}
