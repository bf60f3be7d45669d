// Storage formats and memory on a device: conversion to the accumulator and back, packs of neighbouring elements that
// move in one instruction, and the shared memory whose size the launch decides. Relies on the CUDA headers only; every
// other file of this folder relies on it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>
#include <string.h>

#define DRSL_DEVICE __device__ __forceinline__

// Arrays indexed in such a loop stay in registers.
#if defined(__CUDACC__)
#define DRSL_UNROLL _Pragma("unroll")
#else
#define DRSL_UNROLL
#endif

namespace drsl {
namespace cuda {

using BFloat16 = __nv_bfloat16;
using Half = __half;

// The type in which a storage format is computed with.
template <class D>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class D>
using Accumulator = typename AccumulatorOf<D>::type;

DRSL_DEVICE float widen(float x) { return x; }
DRSL_DEVICE double widen(double x) { return x; }
DRSL_DEVICE float widen(BFloat16 x) { return __bfloat162float(x); }
DRSL_DEVICE float widen(Half x) { return __half2float(x); }

// Two at a time: the 16-bit formats have an instruction for it.
DRSL_DEVICE void narrow_pair(float x, float y, float* out) { out[0] = x, out[1] = y; }
DRSL_DEVICE void narrow_pair(double x, double y, double* out) { out[0] = x, out[1] = y; }
DRSL_DEVICE void narrow_pair(float x, float y, BFloat16* out) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(x, y);
  out[0] = both.x, out[1] = both.y;
}
DRSL_DEVICE void narrow_pair(float x, float y, Half* out) {
  const __half2 both = __floats2half2_rn(x, y);
  out[0] = both.x, out[1] = both.y;
}

DRSL_DEVICE float narrow(float x, float) { return x; }
DRSL_DEVICE double narrow(double x, double) { return x; }
DRSL_DEVICE BFloat16 narrow(float x, BFloat16) { return __float2bfloat16_rn(x); }
DRSL_DEVICE Half narrow(float x, Half) { return __float2half_rn(x); }

// ---------------------------------------------------------------------------------------------------------
// Packs: W neighbours, at an address that is a multiple of their size

template <int kBytes>
struct RawOf;
template <>
struct RawOf<8> {
  using type = uint2;
};
template <>
struct RawOf<16> {
  using type = uint4;
};

constexpr int kPackBytes = 16;  // the widest access of a thread

template <class D>
constexpr int kPackWidth = kPackBytes / int(sizeof(D));

template <class D, int W>
struct Pack {
  using Raw = typename RawOf<int(sizeof(D)) * W>::type;
  using S = Accumulator<D>;
  Raw raw;

  DRSL_DEVICE static Pack load(const D* p) { return {*reinterpret_cast<const Raw*>(p)}; }

  DRSL_DEVICE static Pack narrowed(const S (&x)[W]) {
    D elements[W];
    DRSL_UNROLL
    for (int i = 0; i < W; i += 2) narrow_pair(x[i], x[i + 1], elements + i);
    Pack pack;
    memcpy(&pack.raw, elements, sizeof(Raw));
    return pack;
  }

  DRSL_DEVICE void widened(S* out) const {
    D elements[W];
    memcpy(elements, &raw, sizeof(Raw));
    DRSL_UNROLL
    for (int i = 0; i < W; ++i) out[i] = widen(elements[i]);
  }

  DRSL_DEVICE void store(D* p) const { *reinterpret_cast<Raw*>(p) = raw; }
  // For data that nobody reads soon: it makes room in the cache for what will be read again.
  DRSL_DEVICE void store_streaming(D* p) const { __stcs(reinterpret_cast<Raw*>(p), raw); }
};

template <class D>
DRSL_DEVICE Accumulator<D> load_one(const D* p) {
  return widen(*p);
}

template <class D>
DRSL_DEVICE void store_one(D* p, Accumulator<D> x) {
  *p = narrow(x, D());
}

// Shared memory of the size given at launch, aligned to a pack.
DRSL_DEVICE uint4* dynamic_shared() {
#if defined(__CUDACC__)
  extern __shared__ uint4 drsl_dynamic_shared[];
  return drsl_dynamic_shared;
#else
  return static_cast<uint4*>(cuda_shim_dynamic_shared());
#endif
}

}  // namespace cuda
}  // namespace drsl
