// The loss as a function of Python, for the hot path of a training loop: no dispatcher, no argument parser, no schema.
// At 128x10 those take longer than the loss. Whatever wants to see operators (modes, subclasses, transforms, tracing)
// sees the operator all the same. Relies on ops.h; drsl_kernels/backends/cpp.py calls the function.
#include "python.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "ops.h"

namespace drsl {
namespace {

using at::Tensor;

constexpr const char* kName = "drsl_kernels::softmax_loss";

enum Position { kLogits, kTarget, kWeight, kMargins, kTau, kCodes, kReturnStats, kCount };

// None is an undefined tensor.
Tensor tensor_of(PyObject* object, const char* name) {
  if (object == Py_None) return Tensor();
  TORCH_CHECK_TYPE(THPVariable_Check(object), name, " must be a Tensor");
  return THPVariable_Unpack(object);
}

double float_of(PyObject* object) {
  const double value = PyFloat_AsDouble(object);
  if (value == -1.0 && PyErr_Occurred()) throw python_error();
  return value;
}

int64_t int_of(PyObject* object) {
  const int64_t value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) throw python_error();
  return value;
}

// LossSpec.codes (drsl_kernels/spec.py).
Config config_of(PyObject* codes, double tau_value) {
  TORCH_CHECK_TYPE(PyTuple_Check(codes) && PyTuple_GET_SIZE(codes) == 11, "codes must be a tuple of eleven");
  const auto code = [codes](int i) { return PyTuple_GET_ITEM(codes, i); };
  return make_config(tau_value, int_of(code(0)), float_of(code(1)), int_of(code(2)), float_of(code(3)),
                     float_of(code(4)), int_of(code(5)), int_of(code(6)), float_of(code(7)), code(8) == Py_True,
                     float_of(code(9)), int_of(code(10)));
}

// Whether somebody must be shown the operator: a mode of this thread, or a tensor without memory of its own.
bool is_watched(std::initializer_list<const Tensor*> tensors) {
  using Key = c10::DispatchKey;
  constexpr c10::DispatchKeySet watchers(
      {Key::Python, Key::PythonTLSSnapshot, Key::PythonDispatcher, Key::PreDispatch, Key::Fake, Key::Tracer,
       Key::FuncTorchDynamicLayerFrontMode, Key::FuncTorchDynamicLayerBackMode, Key::FuncTorchGradWrapper,
       Key::FuncTorchBatched, Key::FuncTorchBatchedDecomposition, Key::FuncTorchVmapMode, Key::Batched, Key::VmapMode,
       Key::Functionalize, Key::Meta});
  const c10::impl::LocalDispatchKeySet local = c10::impl::tls_local_dispatch_key_set();
  c10::DispatchKeySet keys = local.included_;
  for (const Tensor* t : tensors) {
    if (t->defined()) keys = keys | t->key_set();
  }
  return (keys - local.excluded_).has_any(watchers);
}

std::tuple<Tensor, Tensor> through_dispatcher(const Tensor& logits, const Tensor& y, const Tensor& weight,
                                              const Tensor& margins, const Tensor& tau, const Config& c,
                                              bool return_stats) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow(kName, "")
                             .typed<std::tuple<Tensor, Tensor>(
                                 const Tensor&, const Tensor&, const std::optional<Tensor>&,
                                 const std::optional<Tensor>&, const std::optional<Tensor>&, double, int64_t, double,
                                 int64_t, double, double, int64_t, int64_t, double, bool, double, int64_t, bool)>();
  const auto optional = [](const Tensor& t) { return t.defined() ? std::optional<Tensor>(t) : std::nullopt; };
  return op.call(logits, y, optional(weight), optional(margins), optional(tau), c.tau_value,
                 static_cast<int64_t>(c.truth), c.q, static_cast<int64_t>(c.distance), c.scale, c.margin,
                 c.ignore_index, static_cast<int64_t>(c.reduction), c.label_smoothing, c.soft, c.threshold,
                 static_cast<int64_t>(c.activation), return_stats);
}

PyObject* wrapped(Tensor&& t) {
  if (!t.defined()) Py_RETURN_NONE;
  return THPVariable_Wrap(std::move(t));
}

}  // namespace

PyObject* python_softmax_loss(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == kCount, "softmax_loss takes ", static_cast<int>(kCount), " arguments, got ", count);
  const bool tau_is_tensor = THPVariable_Check(args[kTau]);
  const Tensor logits = tensor_of(args[kLogits], "logits"), y = tensor_of(args[kTarget], "y");
  const Tensor weight = tensor_of(args[kWeight], "weight"), margins = tensor_of(args[kMargins], "margin");
  const Tensor tau = tau_is_tensor ? THPVariable_Unpack(args[kTau]) : Tensor();
  TORCH_CHECK_TYPE(logits.defined() && y.defined(), "logits and y must be Tensors");
  const Config config = config_of(args[kCodes], tau_is_tensor ? 0 : float_of(args[kTau]));
  const bool return_stats = args[kReturnStats] == Py_True;
  std::tuple<Tensor, Tensor> result;
  {
    pybind11::gil_scoped_release no_gil;
    if (is_watched({&logits, &y, &weight, &margins, &tau})) {
      result = through_dispatcher(logits, y, weight, margins, tau, config, return_stats);
    } else {
      RECORD_FUNCTION(kName, c10::ArrayRef<const c10::IValue>{});
      result = softmax_loss(logits, y, weight, margins, tau, config, return_stats);
    }
  }
  if (!return_stats) return wrapped(std::move(std::get<0>(result)));
  const pybind11::object loss = pybind11::reinterpret_steal<pybind11::object>(wrapped(std::move(std::get<0>(result))));
  const pybind11::object stats = pybind11::reinterpret_steal<pybind11::object>(wrapped(std::move(std::get<1>(result))));
  return PyTuple_Pack(2, loss.ptr(), stats.ptr());
  END_HANDLE_TH_ERRORS
}

}  // namespace drsl
