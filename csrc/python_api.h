// The little of Python's C API that bindings.cpp needs, in C++: references that are given back, exceptions both ways,
// and what a call's arguments are. All of it is in the stable ABI of Python 3.10 (setup.py: LIMITED_API).
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>

#include <stdexcept>
#include <string>

namespace gpt2::python {

// A reference that is given back.
class Own {
 public:
  explicit Own(PyObject* object) : object_(object) {}
  ~Own() { Py_XDECREF(object_); }
  Own(const Own&) = delete;
  PyObject* get() const { return object_; }

 private:
  PyObject* object_;
};

// Python's error is set; whoever catches this returns to Python.
struct Raised {};

// What a function of the module does, with C++'s exceptions as Python's.
template <class F>
PyObject* guarded(F body) {
  try {
    return body();
  } catch (const Raised&) {
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

inline PyObject* checked(PyObject* object) {
  if (!object) throw Raised();
  return object;
}

inline PyObject* none() {
  Py_INCREF(Py_None);
  return Py_None;
}

// The interpreter lock, released for a scope.
struct Unlocked {
  PyThreadState* state = PyEval_SaveThread();
  ~Unlocked() { PyEval_RestoreThread(state); }
};

// As Python writes it in its own errors: "float", "torch.dtype".
inline std::string type_name(PyObject* object) {
  std::string name;
  for (const char* part : {"__module__", "__qualname__"}) {
    Own found(checked(PyObject_GetAttrString((PyObject*)Py_TYPE(object), part)));
    const char* text = PyUnicode_AsUTF8AndSize(found.get(), nullptr);
    if (!text) throw Raised();
    if (std::string("builtins") != text) name += name.empty() ? text : std::string(".") + text;
  }
  return name;
}

inline std::string text_of(PyObject* object) {
  Py_ssize_t size;
  const char* text = PyUnicode_AsUTF8AndSize(object, &size);
  if (!text) throw Raised();
  return std::string(text, size);
}

inline std::string bytes_of(PyObject* object) {
  char* bytes;
  Py_ssize_t size;
  if (PyBytes_AsStringAndSize(object, &bytes, &size) != 0) throw Raised();
  return std::string(bytes, size);
}

inline uint64_t number_of(PyObject* object, uint64_t most = UINT64_MAX) {
  const uint64_t found = PyLong_AsUnsignedLongLong(object);
  if (PyErr_Occurred()) throw Raised();
  if (found > most) throw std::invalid_argument(std::to_string(found) + " is above " + std::to_string(most));
  return found;
}

inline void expect(const char* name, Py_ssize_t wanted, Py_ssize_t given) {
  if (wanted == given) return;
  PyErr_Format(PyExc_TypeError, "%s takes %zd arguments, not %zd", name, wanted, given);
  throw Raised();
}

}  // namespace gpt2::python
