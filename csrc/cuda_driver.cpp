#include "cuda_driver.h"

#include <dlfcn.h>
#include <stdint.h>

#include <stdexcept>

namespace gpt2 {
namespace {

// The few declarations of cuda.h that are needed; their ABI is fixed since CUDA 4.
using Result = int;
using Device = int;
using Context = struct OpaqueContext*;
using Module = struct OpaqueModule*;
using Function = struct OpaqueFunction*;
using Stream = struct OpaqueStream*;

struct Driver {
  Result (*init)(unsigned);
  Result (*error_name)(Result, const char**);
  Result (*error_string)(Result, const char**);
  Result (*retain)(Context*, Device);
  Result (*push)(Context);
  Result (*pop)(Context*);
  Result (*load)(Module*, const void*);
  Result (*function)(Function*, Module, const char*);
  Result (*launch)(Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Stream, void**,
                   void**);

  void check(Result result, const char* call) const {
    if (result == 0) return;
    const char *name = nullptr, *text = nullptr;
    error_name(result, &name);
    error_string(result, &text);
    throw std::runtime_error(std::string(call) + ": " + (name ? name : std::to_string(result)) +
                             (text ? std::string(" (") + text + ")" : ""));
  }
};

template <class F>
void find(void* library, const char* name, F& slot) {
  slot = (F)dlsym(library, name);
  if (!slot) throw std::runtime_error(std::string("libcuda.so.1 has no ") + name);
}

Driver open_driver() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    const char* why = dlerror();
    throw std::runtime_error(std::string("the NVIDIA driver's libcuda.so.1 does not load: ") +
                             (why ? why : "unknown reason"));
  }
  Driver d;
  find(library, "cuInit", d.init);
  find(library, "cuGetErrorName", d.error_name);
  find(library, "cuGetErrorString", d.error_string);
  find(library, "cuDevicePrimaryCtxRetain", d.retain);
  find(library, "cuCtxPushCurrent_v2", d.push);
  find(library, "cuCtxPopCurrent_v2", d.pop);
  find(library, "cuModuleLoadData", d.load);
  find(library, "cuModuleGetFunction", d.function);
  find(library, "cuLaunchKernel", d.launch);
  d.check(d.init(0), "cuInit");
  return d;
}

// Opened at first use; when that throws, the next use tries again.
const Driver& driver() {
  static const Driver d = open_driver();
  return d;
}

constexpr int MAX_DEVICES = 64;

// Makes the primary context of `device`, the one torch uses, current for a scope.
struct Current {
  explicit Current(int device) {
    static Context contexts[MAX_DEVICES];  // retained for the life of the process; the interpreter lock is held
    if (device < 0 || device >= MAX_DEVICES) throw std::invalid_argument("no CUDA device " + std::to_string(device));
    if (!contexts[device]) driver().check(driver().retain(&contexts[device], device), "cuDevicePrimaryCtxRetain");
    driver().check(driver().push(contexts[device]), "cuCtxPushCurrent");
  }
  ~Current() {
    Context popped;
    driver().pop(&popped);
  }
  Current(const Current&) = delete;
};

}  // namespace

uintptr_t cuda_load(int device, const std::string& image) {
  Current current(device);
  Module module;
  driver().check(driver().load(&module, image.c_str()), "cuModuleLoadData");  // ends in a zero byte, as PTX must
  return (uintptr_t)module;
}

uintptr_t cuda_function(int device, uintptr_t module, const std::string& name) {
  Current current(device);
  Function function;
  driver().check(driver().function(&function, (Module)module, name.c_str()), ("cuModuleGetFunction " + name).c_str());
  return (uintptr_t)function;
}

void cuda_launch(int device, uintptr_t function, Extent grid, Extent block, uintptr_t stream,
                 const std::string& arguments) {
  Current current(device);
  void* parameters[] = {(void*)arguments.data()};  // copied by the driver before it returns
  auto [gx, gy, gz] = grid;
  auto [bx, by, bz] = block;
  driver().check(
      driver().launch((Function)function, gx, gy, gz, bx, by, bz, 0, (Stream)stream, parameters, nullptr),
      "cuLaunchKernel");
}

}  // namespace gpt2
