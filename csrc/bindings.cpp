// The Python face of the extension: each kernel of kernels.h under its own name, the interpreter lock released.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#include "cuda_driver.h"
#include "kernels.h"

namespace py = pybind11;

namespace {

// One argument. Python's numbers are read by one function for all kernels: as pybind11 would bind them, with code of
// its own for each signature, they took longer to compile than the kernels.
union Value {
  int64_t integer;
  double real;
};

template <class T>
constexpr bool REAL = std::is_same_v<T, double>;

template <class T>
T get(const Value& value) {
  if constexpr (REAL<T>)
    return value.real;
  else
    return (T)value.integer;
}

template <class... Args, size_t... I>
void apply(void (*kernel)(Args...), const Value* values, std::index_sequence<I...>) {
  kernel(get<Args>(values[I])...);
}

constexpr size_t MAX_ARGUMENTS = 32;

struct Kernel {
  const char *name, *parameters;
  std::string_view real;  // a byte for each parameter: is it a double
  void (*call)(const Value*);
};

template <class... Args>
std::string_view reals(void (*gpt2::Kernels::*)(Args...)) {
  static_assert(sizeof...(Args) <= MAX_ARGUMENTS);
  static constexpr char real[] = {REAL<Args>...};
  return {real, sizeof...(Args)};
}

template <class... Args>
void call(void (*kernel)(Args...), const Value* values) {
  apply(kernel, values, std::index_sequence_for<Args...>());
}

// The table is read at each call, so set_isa takes effect at once.
const Kernel KERNELS[] = {
#define GPT2_BIND(name, params) \
  {#name, #params, reals(&gpt2::Kernels::name), [](const Value* values) { call(gpt2::kernels().name, values); }},
    GPT2_KERNEL_LIST(GPT2_BIND)
#undef GPT2_BIND
};

void run(const Kernel& kernel, const py::args& args) {
  const size_t count = kernel.real.size();
  if (args.size() != count)
    throw py::type_error(std::string(kernel.name) + kernel.parameters + " takes " + std::to_string(count) +
                         " arguments, not " + std::to_string(args.size()));
  Value values[MAX_ARGUMENTS];
  for (size_t i = 0; i < count; ++i) {
    PyObject* argument = PyTuple_GET_ITEM(args.ptr(), i);
    if (kernel.real[i])
      values[i].real = PyFloat_AsDouble(argument);
    else
      values[i].integer = PyLong_AsLongLong(argument);
    if (PyErr_Occurred()) throw py::error_already_set();
  }
  py::gil_scoped_release unlocked;
  kernel.call(values);
}

void set_isa(const std::string& name) {
  if (!gpt2::set_isa(name.c_str()))
    throw std::invalid_argument("this processor or build has no instruction set '" + name +
                                "'; choose baseline, avx2, avx512 or avx512bf16");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "gpt2_fast's C++ kernels; arguments are raw addresses, sizes and dtype codes, checked by gpt2_fast.ops";
  for (const Kernel& kernel : KERNELS)
    m.def(kernel.name, [&kernel](const py::args& args) { run(kernel, args); }, kernel.parameters);
  m.def("isa", &gpt2::isa_name, "the instruction set in use");
  m.def("set_isa", &set_isa, "chooses the instruction set by name");
  m.def("cuda_load", &gpt2::cuda_load, "loads a fatbin, cubin or PTX into the device's primary context");
  m.def("cuda_function", &gpt2::cuda_function, "a kernel of a loaded module");
  m.def("cuda_launch", &gpt2::cuda_launch, "launches (device, function, grid, block, stream, one struct as bytes)");
  m.attr("SOURCE_HASH") = GPT2_SOURCE_HASH;
#ifdef __VERSION__
  m.attr("COMPILER") = __VERSION__;
#endif
}
