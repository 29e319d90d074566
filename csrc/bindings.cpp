// The Python face of the extension: each kernel of kernels.h under its own name, the interpreter lock released.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cuda_driver.h"
#include "kernels.h"

namespace py = pybind11;

namespace {

// One Python function per slot; the table is read at each call, so set_isa takes effect at once.
template <class... Args>
void bind(py::module_& m, const char* name, void (*gpt2::Kernels::*slot)(Args...)) {
  m.def(name, [slot](Args... args) { (gpt2::kernels().*slot)(args...); },
        py::call_guard<py::gil_scoped_release>());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "gpt2_fast's C++ kernels; arguments are raw addresses, sizes and dtype codes, checked by gpt2_fast.ops";
#define GPT2_BIND(name, params) bind(m, #name, &gpt2::Kernels::name);
  GPT2_KERNEL_LIST(GPT2_BIND)
#undef GPT2_BIND
  m.def("isa", &gpt2::isa_name, "the instruction set in use");
  m.def("set_isa", [](const std::string& name) {
    if (!gpt2::set_isa(name.c_str()))
      throw std::invalid_argument("this processor or build has no instruction set '" + name +
                                  "'; choose baseline, avx2, avx512 or avx512bf16");
  });
  m.attr("SOURCE_HASH") = GPT2_SOURCE_HASH;
#ifdef __VERSION__
  m.attr("COMPILER") = __VERSION__;
#endif
  gpt2::bind_cuda_driver(m);
}
