// Loads and launches the CUDA kernels through the driver library, found at run time.
#pragma once

#include <pybind11/pybind11.h>

namespace gpt2 {
void bind_cuda_driver(pybind11::module_& m);
}
