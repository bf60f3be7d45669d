// What module.cpp puts into drsl_kernels._C besides facts. Plain Python C interface.
#pragma once

#include <Python.h>

namespace drsl {

// softmax_loss(logits, y, weight or None, tau, LossSpec.codes, return_stats) -> loss, or (loss, stats)
PyObject* python_softmax_loss(PyObject* self, PyObject* const* args, Py_ssize_t count);

}  // namespace drsl
