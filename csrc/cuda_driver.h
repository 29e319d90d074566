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

#include <stdint.h>

#include <string>
#include <tuple>

namespace gpt2 {
using Extent = std::tuple<unsigned, unsigned, unsigned>;

uintptr_t cuda_load(int device, const std::string& image);
uintptr_t cuda_function(int device, uintptr_t module, const std::string& name);
void cuda_launch(int device, uintptr_t function, Extent grid, Extent block, uintptr_t stream,
                 const std::string& arguments);
}  // namespace gpt2
