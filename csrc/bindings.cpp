// The Python face of the extension: each kernel of kernels.h under its own name, the interpreter lock released.
//
// A kernel is called with dicts, and takes from them what its parameters in kernels.h name, and the members of structs
// among them: the first dict that has a name counts. So no argument can stand in another's place, and what a parameter
// says of its tensor is held here, at the one door to memory: on the CPU, contiguous, of the dtype.
//
// It is written on Python's stable ABI, so one build serves every Python from 3.10 on; a binding library would compile
// for longer, and cost a call more.
#include "python_api.h"

#include <string.h>

#include <type_traits>
#include <utility>
#include <vector>

#include "cuda_driver.h"
#include "kernels.h"

namespace {

using namespace gpt2::python;

// The argument tuple of a call: the dicts that are looked through for each name.
struct Sources {
  PyObject* const* dicts;
  Py_ssize_t count;
};

// One argument, or one member of a struct that is. Python's numbers are read by one function for all kernels: code of
// its own for each signature would take longer to compile than the kernels.
union Value {
  int64_t integer;
  double real;
};

template <class T>
constexpr bool REAL = std::is_same_v<T, double>;

// How many values a parameter takes.
template <class T>
constexpr size_t VALUES = std::is_class_v<T> ? sizeof(T) / sizeof(Value) : 1;

template <class T>
T get(const Value* values) {
  if constexpr (std::is_class_v<T>) {
    static_assert(std::is_trivially_copyable_v<T>);
    T found;
    memcpy(&found, values, sizeof found);
    return found;
  } else if constexpr (REAL<T>) {
    return values->real;
  } else {
    return (T)values->integer;
  }
}

// Where the values of parameter `index` begin.
template <class... Args>
constexpr size_t begin_of(size_t index) {
  constexpr size_t counts[] = {VALUES<Args>...};
  size_t begin = 0;
  for (size_t i = 0; i < index; ++i) begin += counts[i];
  return begin;
}

template <class... Args, size_t... I>
void apply(void (*kernel)(Args...), const Value* values, std::index_sequence<I...>) {
  kernel(get<Args>(values + begin_of<Args...>(I))...);
}

constexpr size_t MAX_ARGUMENTS = 64;

enum Kind { INTEGER, REAL_NUMBER, TENSOR, STRIDED };

struct Parameter {
  Kind kind;
  std::string type, name;
  PyObject *key, *of;  // the name, and of X_dtype the name X, as Python strings; `of` is null elsewhere
  int64_t code;        // the dtype that a tensor must have; -1: any
};

struct Kernel {
  const char *name, *text;
  size_t count;  // of values
  void (*call)(const Value*);
  Parameter parameters[MAX_ARGUMENTS];
};

template <class... Args>
constexpr size_t arity(void (*gpt2::Kernels::*)(Args...)) {
  constexpr size_t count = (VALUES<Args> + ...);
  static_assert(count <= MAX_ARGUMENTS);
  return count;
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
PyObject* dtype_codes;
constexpr const char* TYPES[] = {"f32", "bf16", "f16", "f64", "i64", "i32", "i8", "u8"};

int64_t code_of_type(const std::string& type) {
  for (size_t i = 0; i < sizeof TYPES / sizeof *TYPES; ++i)
    if (type == TYPES[i]) return (int64_t)i;
  return -1;
}

struct Member {
  const char *type, *name;
};

struct Struct {
  const char* name;
  std::vector<Member> members;
};

#define GPT2_NAMED(type, name) {#type, #name},
#define GPT2_NAMES(name, MEMBERS) {#name, {MEMBERS(GPT2_NAMED)}},
const Struct GROUPS[] = {GPT2_GROUP_LIST(GPT2_NAMES)}, TABLES[] = {GPT2_DECODE_TABLES(GPT2_NAMES)};
#undef GPT2_NAMES
#undef GPT2_NAMED

// Adds a parameter, or each member of one that is a struct, to the `count` before it.
void add_parameter(Kernel& kernel, size_t& count, const std::string& type, const std::string& name) {
  for (const Struct& group : GROUPS) {
    if (type != group.name) continue;
    for (const Member& m : group.members)
      add_parameter(kernel, count, m.type, name.empty() ? m.name : name + "_" + m.name);
    return;
  }
  if (count >= kernel.count) throw std::logic_error(std::string(kernel.name) + ": no value is left for " + name);
  Parameter& p = kernel.parameters[count++];
  p = {INTEGER, type, name, checked(PyUnicode_InternFromString(name.c_str())), nullptr, -1};
  if (type == "double") p.kind = REAL_NUMBER;
  else if (type == "strided") p.kind = STRIDED;
  else if (type == "addr" || (p.code = code_of_type(type)) >= 0) p.kind = TENSOR;
  else if (type != "int64_t" && type != "bool")
    throw std::logic_error(std::string(kernel.name) + ": " + type + " is no type of kernels.h, nor in GPT2_GROUP_LIST");
  if (p.kind == INTEGER && name.size() > 6 && name.substr(name.size() - 6) == "_dtype")
    p.of = checked(PyUnicode_InternFromString(name.substr(0, name.size() - 6).c_str()));
}

// Reads "(addr x, int64_t N, Drop dropout)", which the preprocessor made of the list.
void parse(Kernel& kernel) {
  const std::string text(kernel.text);
  size_t count = 0;
  for (size_t begin = 1, end; begin < text.size(); begin = end + 1) {
    begin = text.find_first_not_of(' ', begin), end = text.find_first_of(",)", begin);
    const std::string one = text.substr(begin, end - begin);
    const size_t space = one.find(' ');
    add_parameter(kernel, count, one.substr(0, space), space == std::string::npos ? "" : one.substr(space + 1));
  }
  if (count != kernel.count) throw std::logic_error(std::string(kernel.name) + ": a struct is not its list");
}

[[noreturn]] void refuse(const Kernel& kernel, const Parameter& p, const std::string& why) {
  if (PyErr_Occurred()) PyErr_Clear();
  PyErr_SetString(PyExc_TypeError, (std::string(kernel.name) + ": " + p.name + " " + why).c_str());
  throw Raised();
}

int64_t code_of(const Kernel& kernel, const Parameter& p, PyObject* dtype) {
  PyObject* code = PyDict_GetItemWithError(dtype_codes, dtype);
  if (!code) refuse(kernel, p, "is of a dtype that no kernel takes");
  return PyLong_AsLongLong(code);
}

PyObject* find(PyObject* key, const Sources& sources) {
  for (Py_ssize_t i = 0; i < sources.count; ++i)
    if (PyObject* value = PyDict_GetItemWithError(sources.dicts[i], key)) return value;
  return nullptr;
}

int64_t address(const Kernel& kernel, const Parameter& p, PyObject* tensor, bool on_cpu) {
  static PyObject *data_ptr = PyUnicode_InternFromString("data_ptr"), *is_cpu = PyUnicode_InternFromString("is_cpu"),
                  *is_contiguous = PyUnicode_InternFromString("is_contiguous"),
                  *dtype = PyUnicode_InternFromString("dtype"), *numel = PyUnicode_InternFromString("numel");
  auto call = [tensor](PyObject* method) { return PyObject_CallMethodObjArgs(tensor, method, nullptr); };
  if (p.kind == TENSOR && Own(call(is_contiguous)).get() != Py_True)
    refuse(kernel, p, "must be a contiguous tensor");
  if (on_cpu && Own(PyObject_GetAttr(tensor, is_cpu)).get() != Py_True) refuse(kernel, p, "must be on the CPU");
  if (p.code >= 0 && code_of(kernel, p, Own(PyObject_GetAttr(tensor, dtype)).get()) != p.code)
    refuse(kernel, p, "must be of dtype " + p.type);
  Own value(call(data_ptr));
  if (!value.get()) refuse(kernel, p, "has no address");
  const int64_t found = (int64_t)PyLong_AsUnsignedLongLong(value.get());
  // What torch keeps without memory, zeros that nobody wrote, would be read as an input that is not there.
  if (!found && PyLong_AsLongLong(Own(call(numel)).get()) != 0)
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

void read(const Kernel& kernel, const Sources& sources, Value* values, bool on_cpu) {
  for (size_t i = 0; i < kernel.count; ++i) {
    const Parameter& p = kernel.parameters[i];
    PyObject* found = find(p.key, sources);
    if (!found && p.of) {
      PyObject* tensor = find(p.of, sources);
      if (!tensor || tensor == Py_None) refuse(kernel, p, "is not given");
      values[i].integer = code_of(kernel, p, Own(PyObject_GetAttrString(tensor, "dtype")).get());
      continue;
    }
    if (!found) refuse(kernel, p, "is not given");
    if (p.kind == TENSOR || p.kind == STRIDED)
      values[i].integer = found == Py_None ? 0 : address(kernel, p, found, on_cpu);
    else if (p.kind == REAL_NUMBER)
      values[i].real = real(kernel, p, found);
    else
      values[i].integer = integer(kernel, p, found);
    if (PyErr_Occurred()) throw Raised();
  }
}

PyObject* run(const Kernel& kernel, const Sources& sources) {
  return guarded([&] {
    Value values[MAX_ARGUMENTS];
    read(kernel, sources, values, true);
    {
      Unlocked unlocked;
      kernel.call(values);
    }
    return none();
  });
}

gpt2::Extent extent_of(PyObject* object) {
  auto at = [object](Py_ssize_t i) {
    Own item(checked(PySequence_GetItem(object, i)));
    return (unsigned)number_of(item.get(), UINT32_MAX);
  };
  return {at(0), at(1), at(2)};
}

// The arguments as a struct of 8 bytes each, in their order: what a CUDA kernel of the same name takes.
PyObject* pack(PyObject*, PyObject* const* a, Py_ssize_t n) {
  return guarded([&] {
    if (n < 1) expect("pack", 1, n);
    const std::string name = text_of(a[0]);
    for (const Kernel& kernel : KERNELS) {
      if (name != kernel.name) continue;
      Value values[MAX_ARGUMENTS];
      read(kernel, {a + 1, n - 1}, values, false);
      return PyBytes_FromStringAndSize((const char*)values, kernel.count * sizeof(Value));
    }
    throw std::invalid_argument("no kernel " + name);
  });
}

PyObject* set_dtype_codes(PyObject*, PyObject* codes) {
  return PyDict_Update(dtype_codes, codes) == 0 ? none() : nullptr;
}

PyObject* isa(PyObject*, PyObject*) { return PyUnicode_FromString(gpt2::isa_name()); }

PyObject* set_isa(PyObject*, PyObject* name) {
  return guarded([&] {
    if (!gpt2::set_isa(text_of(name).c_str()))
      throw std::invalid_argument("this processor or build has no instruction set '" + text_of(name) +
                                  "'; choose baseline, avx2, avxvnni, avx512, avx512vnni, avx512bf16 or amx");
    return none();
  });
}

PyObject* cuda_load(PyObject*, PyObject* const* a, Py_ssize_t n) {
  return guarded([&] {
    expect("cuda_load", 2, n);
    return PyLong_FromUnsignedLongLong(gpt2::cuda_load((int)number_of(a[0], INT32_MAX), bytes_of(a[1])));
  });
}

PyObject* cuda_function(PyObject*, PyObject* const* a, Py_ssize_t n) {
  return guarded([&] {
    expect("cuda_function", 3, n);
    const int device = (int)number_of(a[0], INT32_MAX);
    return PyLong_FromUnsignedLongLong(gpt2::cuda_function(device, number_of(a[1]), text_of(a[2])));
  });
}

PyObject* cuda_launch(PyObject*, PyObject* const* a, Py_ssize_t n) {
  return guarded([&] {
    expect("cuda_launch", 6, n);
    gpt2::cuda_launch((int)number_of(a[0], INT32_MAX), number_of(a[1]), extent_of(a[2]), extent_of(a[3]),
                      number_of(a[4]), bytes_of(a[5]));
    return none();
  });
}

enum Index {
#define GPT2_INDEX(name, params) INDEX_##name,
  GPT2_KERNEL_LIST(GPT2_INDEX)
#undef GPT2_INDEX
};

template <size_t I>
PyObject* kernel_at(PyObject*, PyObject* const* dicts, Py_ssize_t count) {
  return run(KERNELS[I], {dicts, count});
}

PyCFunction method(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return (PyCFunction)(void (*)())function;  // METH_FASTCALL says what it is
}

PyMethodDef METHODS[] = {
#define GPT2_METHOD(name, params) {#name, method(kernel_at<INDEX_##name>), METH_FASTCALL, #params},
    GPT2_KERNEL_LIST(GPT2_METHOD)
#undef GPT2_METHOD
    {"pack", method(pack), METH_FASTCALL, "the arguments of the kernel of that name as bytes, 8 each"},
    {"set_dtype_codes", set_dtype_codes, METH_O,
     "registers torch's dtypes: float32 0, bfloat16 1, float16 2, float64 3, int64 4, int32 5, int8 6, uint8 7"},
    {"isa", isa, METH_NOARGS, "the instruction set in use"},
    {"set_isa", set_isa, METH_O, "chooses the instruction set by name"},
    {"cuda_load", method(cuda_load), METH_FASTCALL, "loads a fatbin, cubin or PTX into the device's primary context"},
    {"cuda_function", method(cuda_function), METH_FASTCALL, "a kernel of a loaded module"},
    {"cuda_launch", method(cuda_launch), METH_FASTCALL,
     "launches (device, function, grid, block, stream, one struct as bytes)"},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef MODULE = {
    PyModuleDef_HEAD_INIT, "_C",
    "gpt2_fast's C++ kernels; each takes dicts that have its parameters by name, see gpt2_fast.ops.runtime.cpp",
    -1, METHODS, nullptr, nullptr, nullptr, nullptr};

void add(PyObject* module, const char* name, PyObject* value) {
  Own owned(checked(value));
  if (PyModule_AddObjectRef(module, name, value) != 0) throw Raised();
}

// Of each struct that Python writes as a tensor: name -> [(member, type), ...], in their order.
PyObject* structs() {
  PyObject* found = checked(PyDict_New());
  for (const Struct& table : TABLES) {
    Own members(checked(PyList_New(0)));
    for (const Member& m : table.members) {
      Own entry(checked(Py_BuildValue("(ss)", m.name, m.type)));
      if (PyList_Append(members.get(), entry.get()) != 0) throw Raised();
    }
    if (PyDict_SetItemString(found, table.name, members.get()) != 0) throw Raised();
  }
  return found;
}

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  return guarded([] {
    dtype_codes = checked(PyDict_New());
    for (Kernel& kernel : KERNELS) parse(kernel);
    PyObject* module = checked(PyModule_Create(&MODULE));
    add(module, "STRUCTS", structs());
    add(module, "ATTENTION_KEY_GROUP", PyLong_FromLongLong(gpt2::ATTENTION_KEY_GROUP));
    add(module, "SOURCE_HASH", PyUnicode_FromString(GPT2_SOURCE_HASH));
#ifdef __VERSION__
    add(module, "COMPILER", PyUnicode_FromString(__VERSION__));
#endif
    return module;
  });
}
