// Loads and launches the CUDA kernels through the driver library, found at run time: the extension builds and
// imports on a machine that has none. Python gets three functions, every error of the driver as a RuntimeError:
//
//   cuda_load(device, image) -> module        a fatbin, cubin or PTX (bytes), in the device's primary context
//   cuda_function(device, module, name) -> function
//   cuda_launch(device, function, grid, block, stream, arguments)
//
// grid and block are (x, y, z). arguments holds the kernel's one parameter, a struct (bytes). The launch neither
// synchronises nor allocates, so a CUDA graph can capture it.
#pragma once

#include <pybind11/pybind11.h>

namespace gpt2 {
void bind_cuda_driver(pybind11::module_& m);
}
