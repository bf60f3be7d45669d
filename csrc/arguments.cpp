// What the tensors of a call must be for a kernel to read them. Relies on arguments.h.
#include "arguments.h"

#include <algorithm>
#include <cmath>

namespace drsl {

using at::Tensor;

int64_t class_dim(const Tensor& logits) { return logits.dim() == 1 ? 0 : 1; }

std::optional<DType> kernel_dtype(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return DType::float32;
    case at::kDouble:
      return DType::float64;
    case at::kBFloat16:
      return DType::bfloat16;
    case at::kHalf:
      return DType::float16;
    default:
      return std::nullopt;
  }
}

at::ScalarType accumulator_type(const Tensor& logits) {
  return logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

namespace {

void check_plain(const Tensor& t, at::Device device, const char* name) {
  TORCH_CHECK(t.device() == device && t.layout() == at::kStrided && !t.key_set().has(c10::DispatchKey::Python), name,
              " must be a dense tensor on ", device, ", got ", t.toString(), " on ", t.device());
}

}  // namespace

void check_shapes(const Tensor& logits, const Tensor& y, const Tensor& weight, const Tensor& margins, const Tensor& tau,
                  bool soft) {
  const at::Device device = logits.device();
  check_plain(logits, device, "logits");
  check_plain(y, device, "y");
  TORCH_CHECK_NOT_IMPLEMENTED(kernel_dtype(logits.scalar_type()), "logits have dtype ", logits.scalar_type());
  TORCH_CHECK(y.scalar_type() == at::kLong || y.scalar_type() == at::kByte, "y has dtype ", y.scalar_type());
  TORCH_CHECK(logits.dim() >= 1, "logits have no class dimension");
  if (logits.dim() == 1) {
    TORCH_CHECK(y.dim() == 0 || (y.dim() == 1 && y.numel() == 1), "y has shape ", y.sizes());
  } else {
    bool same = y.dim() == logits.dim() - 1 && y.size(0) == logits.size(0);
    for (int64_t d = 1; same && d < y.dim(); ++d) same = y.size(d) == logits.size(d + 1);
    TORCH_CHECK(same, "y has shape ", y.sizes(), ", logits ", logits.sizes());
  }
  TORCH_CHECK(weight.defined() || !soft, "class probabilities without weights");
  if (weight.defined()) {
    check_plain(weight, device, "weight");
    const int64_t classes = logits.size(class_dim(logits));
    TORCH_CHECK(weight.dim() == (soft ? 2 : 1) && weight.size(-1) == classes && weight.is_floating_point() &&
                    (!soft || weight.size(0) == y.numel()),
                "weight has shape ", weight.sizes());
  }
  if (margins.defined()) {
    check_plain(margins, device, "margin");
    TORCH_CHECK(
        !soft && margins.dim() == 1 && margins.size(0) == logits.size(class_dim(logits)) && margins.is_floating_point(),
        "margin has shape ", margins.sizes());
  }
  if (tau.defined()) {
    check_plain(tau, tau.dim() == 0 && tau.is_cpu() ? tau.device() : device, "tau");
    TORCH_CHECK(tau.dim() == 0 || tau.sizes() == y.sizes(), "tau has shape ", tau.sizes());
    TORCH_CHECK(tau.is_floating_point(), "tau has dtype ", tau.scalar_type());
  }
}

Tensor in_memory(const Tensor& t) {
  if (t._is_zerotensor()) return at::zeros(t.sizes(), t.options());
  return t.is_neg() ? t.resolve_neg() : t;
}

Tensor to_accumulator(const Tensor& t, at::ScalarType type) {
  return t.defined() ? in_memory(t).to(type).contiguous() : t;
}

namespace {

template <class S>
bool all_finite(const S* values, int64_t count) {
  return std::all_of(values, values + count, [](S x) { return std::isfinite(x); });
}

}  // namespace

bool all_finite(const Tensor& t) {
  return t.scalar_type() == at::kDouble ? all_finite(t.const_data_ptr<double>(), t.numel())
                                        : all_finite(t.const_data_ptr<float>(), t.numel());
}

}  // namespace drsl
