// Tensors as a kernel can read them: shapes and dtypes that are safe, plain memory, the type of the statistics. The words
// for what is wrong are in drsl_kernels/checks.py. compute.cpp relies on it.
#pragma once

#include <ATen/ATen.h>

#include <optional>

#include "task.h"

namespace drsl {

int64_t class_dim(const at::Tensor& logits);
std::optional<DType> kernel_dtype(at::ScalarType type);
at::ScalarType accumulator_type(const at::Tensor& logits);
void check_shapes(const at::Tensor& logits, const at::Tensor& y, const at::Tensor& weight, const at::Tensor& margins,
                  const at::Tensor& tau, bool soft);

// What a reader of the memory would not see: lazy negation (of an imaginary part that was conjugated, say), and zeros
// without memory.
at::Tensor in_memory(const at::Tensor& t);

at::Tensor to_accumulator(const at::Tensor& t, at::ScalarType type);

// Of a contiguous tensor on the CPU, in less time than an operator takes to begin.
bool all_finite(const at::Tensor& t);

}  // namespace drsl
