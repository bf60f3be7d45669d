// The Python module drsl_kernels._C: the loss as a function of Python, and facts about this build, as attributes.
// Importing it loads the shared library, and with it the operators that ops.cpp registers with torch. The facts are
// compile definitions from CMakeLists.txt, which also writes them to _build_info.json for drsl_kernels/_build.py to read
// before the library is opened.

#include <pybind11/pybind11.h>

#include <string>

#include "cpu/kernels.h"
#include "python.h"

namespace py = pybind11;

static PyMethodDef softmax_loss = {
    "softmax_loss", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(drsl::python_softmax_loss)),
    METH_FASTCALL, "The loss of tensors, as drsl_kernels/backends/cpp.py calls it."};

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled part of drsl_kernels: registers its operators, and tells how it was built.";
  module.attr("softmax_loss") = py::reinterpret_steal<py::object>(PyCFunction_New(&softmax_loss, nullptr));
  module.def("cpu_capability", [] { return std::string(drsl::kernels().name); });
  module.attr("torch_version") = DRSL_TORCH_VERSION;
  module.attr("compiler") = DRSL_COMPILER;
  module.attr("cxx11_abi") = _GLIBCXX_USE_CXX11_ABI != 0;  // libstdc++ strings and lists: the new layout or the old
  module.attr("commit") = DRSL_COMMIT;  // empty when built outside a git checkout
  module.attr("instruction_sets") = py::tuple(py::str(DRSL_INSTRUCTION_SETS).attr("split")(","));
}
