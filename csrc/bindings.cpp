// The Python face of the extension: each kernel of kernels.h under its own name, the interpreter lock released.
//
// A kernel is called with dicts, and takes from them what its parameters in kernels.h name: the first dict that has a
// name counts. So no argument can stand in another's place, and what a parameter says of its tensor is held here, at the
// one door to memory: on the CPU, contiguous, of the dtype.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

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

enum Kind { INTEGER, REAL_NUMBER, TENSOR, STRIDED };

struct Parameter {
  Kind kind;
  std::string type, name;
  PyObject *key, *of;  // the name, and of X_dtype the name X, as Python strings; `of` is null elsewhere
  int64_t code;        // the dtype that a tensor must have; -1: any
};

struct Kernel {
  const char *name, *text;
  size_t count;
  void (*call)(const Value*);
  std::vector<Parameter> parameters;
};

template <class... Args>
constexpr size_t arity(void (*gpt2::Kernels::*)(Args...)) {
  static_assert(sizeof...(Args) <= MAX_ARGUMENTS);
  return sizeof...(Args);
}

template <class... Args>
void call(void (*kernel)(Args...), const Value* values) {
  apply(kernel, values, std::index_sequence_for<Args...>());
}

// The table is read at each call, so set_isa takes effect at once.
Kernel KERNELS[] = {
#define GPT2_BIND(name, params) \
  {#name, #params, arity(&gpt2::Kernels::name), [](const Value* values) { call(gpt2::kernels().name, values); }, {}},
    GPT2_KERNEL_LIST(GPT2_BIND)
#undef GPT2_BIND
};

// torch's dtypes and their codes, which Python registers: csrc/isa.h has the first three.
PyObject* dtype_codes = PyDict_New();
constexpr const char* TYPES[] = {"f32", "bf16", "f16", "f64", "i64", "i32", "i8", "u8"};

int64_t code_of_type(const std::string& type) {
  for (size_t i = 0; i < std::size(TYPES); ++i)
    if (type == TYPES[i]) return (int64_t)i;
  return -1;
}

// Reads "(addr x, int64_t N)", which the preprocessor made of the list.
std::vector<Parameter> parse(std::string_view text) {
  std::vector<Parameter> found;
  text = text.substr(1, text.size() - 2);
  while (!text.empty()) {
    size_t comma = text.find(','), length = comma == text.npos ? text.size() : comma;
    std::string one(text.substr(0, length));
    text.remove_prefix(comma == text.npos ? length : length + 1);
    size_t end = one.find_last_not_of(' '), space = one.rfind(' ', end), begin = one.find_first_not_of(' ');
    Parameter p{INTEGER, one.substr(begin, space - begin), one.substr(space + 1, end - space), nullptr, nullptr, -1};
    p.key = PyUnicode_InternFromString(p.name.c_str());
    if (p.type == "double") p.kind = REAL_NUMBER;
    else if (p.type == "strided") p.kind = STRIDED;
    else if (p.type == "addr" || (p.code = code_of_type(p.type)) >= 0) p.kind = TENSOR;
    if (p.kind == INTEGER && p.name.size() > 6 && p.name.substr(p.name.size() - 6) == "_dtype")
      p.of = PyUnicode_InternFromString(p.name.substr(0, p.name.size() - 6).c_str());
    found.push_back(std::move(p));
  }
  return found;
}

[[noreturn]] void refuse(const Kernel& kernel, const Parameter& p, const std::string& why) {
  if (PyErr_Occurred()) PyErr_Clear();
  throw py::type_error(std::string(kernel.name) + ": " + p.name + " " + why);
}

py::object attribute(PyObject* object, const char* name) {
  return py::reinterpret_steal<py::object>(PyObject_GetAttrString(object, name));
}

std::string type_name(PyObject* object) { return Py_TYPE(object)->tp_name; }

int64_t code_of(const Kernel& kernel, const Parameter& p, PyObject* dtype) {
  PyObject* code = PyDict_GetItemWithError(dtype_codes, dtype);
  if (!code) refuse(kernel, p, "is of a dtype that no kernel takes");
  return PyLong_AsLongLong(code);
}

PyObject* find(PyObject* key, const py::args& sources) {
  for (Py_ssize_t i = 0, n = PyTuple_GET_SIZE(sources.ptr()); i < n; ++i)
    if (PyObject* value = PyDict_GetItemWithError(PyTuple_GET_ITEM(sources.ptr(), i), key)) return value;
  return nullptr;
}

int64_t address(const Kernel& kernel, const Parameter& p, PyObject* tensor, bool on_cpu) {
  static PyObject *data_ptr = PyUnicode_InternFromString("data_ptr"), *is_cpu = PyUnicode_InternFromString("is_cpu"),
                  *is_contiguous = PyUnicode_InternFromString("is_contiguous"),
                  *dtype = PyUnicode_InternFromString("dtype"), *numel = PyUnicode_InternFromString("numel");
  auto own = [](PyObject* object) { return py::reinterpret_steal<py::object>(object); };
  if (p.kind == TENSOR && own(PyObject_CallMethodNoArgs(tensor, is_contiguous)).ptr() != Py_True)
    refuse(kernel, p, "must be a contiguous tensor");
  if (on_cpu && own(PyObject_GetAttr(tensor, is_cpu)).ptr() != Py_True) refuse(kernel, p, "must be on the CPU");
  if (p.code >= 0 && code_of(kernel, p, own(PyObject_GetAttr(tensor, dtype)).ptr()) != p.code)
    refuse(kernel, p, "must be of dtype " + p.type);
  auto value = own(PyObject_CallMethodNoArgs(tensor, data_ptr));
  if (!value) refuse(kernel, p, "has no address");
  const int64_t found = (int64_t)PyLong_AsUnsignedLongLong(value.ptr());
  // What torch keeps without memory, zeros that nobody wrote, would be read as an input that is not there.
  if (!found && PyLong_AsLongLong(own(PyObject_CallMethodNoArgs(tensor, numel)).ptr()) != 0)
    refuse(kernel, p, "has no memory");
  return found;
}

int64_t integer(const Kernel& kernel, const Parameter& p, PyObject* value) {
  if (PyLong_Check(value)) return PyLong_AsLongLong(value);
  if (p.of) return code_of(kernel, p, value);
  refuse(kernel, p, "is a " + type_name(value) + "; it must be an int");
}

double real(const Kernel& kernel, const Parameter& p, PyObject* value) {
  const double found = PyFloat_AsDouble(value);
  if (PyErr_Occurred()) refuse(kernel, p, "is a " + type_name(value) + "; it must be a float");
  return found;
}

void read(const Kernel& kernel, const py::args& sources, Value* values, bool on_cpu) {
  for (size_t i = 0; i < kernel.count; ++i) {
    const Parameter& p = kernel.parameters[i];
    PyObject* found = find(p.key, sources);
    if (!found && p.of) {
      PyObject* tensor = find(p.of, sources);
      if (!tensor || tensor == Py_None) refuse(kernel, p, "is not given");
      values[i].integer = code_of(kernel, p, attribute(tensor, "dtype").ptr());
      continue;
    }
    if (!found) refuse(kernel, p, "is not given");
    if (p.kind == TENSOR || p.kind == STRIDED)
      values[i].integer = found == Py_None ? 0 : address(kernel, p, found, on_cpu);
    else if (p.kind == REAL_NUMBER)
      values[i].real = real(kernel, p, found);
    else
      values[i].integer = integer(kernel, p, found);
    if (PyErr_Occurred()) throw py::error_already_set();
  }
}

void run(const Kernel& kernel, const py::args& sources) {
  Value values[MAX_ARGUMENTS];
  read(kernel, sources, values, true);
  py::gil_scoped_release unlocked;
  kernel.call(values);
}

// The arguments as a struct of 8 bytes each, in their order: what a CUDA kernel of the same name takes.
py::bytes pack(const std::string& name, const py::args& sources) {
  for (const Kernel& kernel : KERNELS) {
    if (name != kernel.name) continue;
    Value values[MAX_ARGUMENTS];
    read(kernel, sources, values, false);
    return py::bytes((const char*)values, kernel.count * sizeof(Value));
  }
  throw std::invalid_argument("no kernel " + name);
}

void set_isa(const std::string& name) {
  if (!gpt2::set_isa(name.c_str()))
    throw std::invalid_argument("this processor or build has no instruction set '" + name +
                                "'; choose baseline, avx2, avx512 or avx512bf16");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "gpt2_fast's C++ kernels; each takes dicts that have its parameters by name, see gpt2_fast.ops.runtime.cpp";
  for (Kernel& kernel : KERNELS) {
    kernel.parameters = parse(kernel.text);
    m.def(kernel.name, [&kernel](const py::args& sources) { run(kernel, sources); }, kernel.text);
  }
  m.def("pack", &pack, "the arguments of the kernel of that name as bytes, 8 each");
  m.def("set_dtype_codes", [](const py::dict& codes) { PyDict_Update(dtype_codes, codes.ptr()); },
        "registers torch's dtypes: float32 0, bfloat16 1, float16 2, float64 3, int64 4, int32 5, int8 6, uint8 7");
  m.def("isa", &gpt2::isa_name, "the instruction set in use");
  m.def("set_isa", &set_isa, "chooses the instruction set by name");
  m.def("cuda_load", &gpt2::cuda_load, "loads a fatbin, cubin or PTX into the device's primary context");
  m.def("cuda_function", &gpt2::cuda_function, "a kernel of a loaded module");
  m.def("cuda_launch", &gpt2::cuda_launch, "launches (device, function, grid, block, stream, one struct as bytes)");
  py::dict structs;
#define GPT2_NAMED(type, name) members.append(py::make_tuple(#name, #type));
#define GPT2_STRUCT(name, MEMBERS) \
  {                                \
    py::list members;              \
    MEMBERS(GPT2_NAMED)            \
    structs[name] = members;       \
  }
  GPT2_STRUCT("DecodeMatrix", GPT2_DECODE_MATRIX)
  GPT2_STRUCT("DecodeLayer", GPT2_DECODE_LAYER)
  GPT2_STRUCT("DecodeModel", GPT2_DECODE_MODEL)
  GPT2_STRUCT("DecodeCache", GPT2_DECODE_CACHE)
  m.attr("STRUCTS") = structs;
  m.attr("ATTENTION_KEY_GROUP") = gpt2::ATTENTION_KEY_GROUP;
  m.attr("SOURCE_HASH") = GPT2_SOURCE_HASH;
#ifdef __VERSION__
  m.attr("COMPILER") = __VERSION__;
#endif
}
