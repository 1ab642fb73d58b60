// conelens._cuda: the CUDA kernels for Python. One register_<op> line per operation.
#include <cuda_runtime_api.h>

#include <cstdint>

#include "channel_peaks/bind.h"
#include "conelens.h"
#include "deconv2d/bind.h"
#include "gather_windows/bind.h"
#include "max_pool2d_with_switches/bind.h"
#include "max_unpool2d/bind.h"
#include "relu_change/bind.h"

namespace conelens {

struct Cuda {
  using Context = void*;  // cudaStream_t
  static constexpr int32_t device_type = dlpack::kCuda;
  static Context context(std::intptr_t value) { return reinterpret_cast<Context>(value); }

  // Makes the arguments' device current for the launch, and the caller's again afterwards.
  class Guard {
   public:
    explicit Guard(int device) {
      if (cudaGetDevice(&before_) != cudaSuccess || before_ == device) return;
      moved_ = cudaSetDevice(device) == cudaSuccess;
    }
    ~Guard() {
      if (moved_) cudaSetDevice(before_);
    }
    Guard(const Guard&) = delete;
    Guard& operator=(const Guard&) = delete;

   private:
    int before_ = 0;
    bool moved_ = false;
  };
};

namespace {

// Why nothing can run here, or None. Any error counts: without a driver, or with one older than the toolkit,
// it is cudaErrorInsufficientDriver.
py::object unusable_reason() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess)
    return py::str(std::string("CUDA cannot be used: ") + cudaGetErrorString(error) + " (cudaError " +
                   std::to_string(static_cast<int>(error)) +
                   "; the compiled kernels need a driver for CUDA " + std::to_string(CUDART_VERSION / 1000) +
                   "." + std::to_string(CUDART_VERSION % 1000 / 10) + " or newer)");
  if (count == 0) return py::str("there is no CUDA device");
  return py::none();
}

int device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

}  // namespace
}  // namespace conelens

PYBIND11_MODULE(_cuda, m, pybind11::mod_gil_not_used()) {
  using namespace conelens;
  m.doc() = "CUDA kernels of conelens. Tensors are DLPack arrays; `context` is the stream, as an integer.";
  m.def("unusable_reason", &unusable_reason, "Why the kernels cannot run here, or None.");
  m.def("device_count", &device_count, "CUDA devices, 0 when CUDA cannot be used.");
  m.def(
      "error_string", [](int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); },
      py::arg("code"), "Text of a cudaError_t.");

  register_channel_peaks<Cuda>(m, conelens_channel_peaks_cuda);
  register_deconv2d<Cuda>(m, conelens_deconv2d_cuda);
  register_gather_windows<Cuda>(m, conelens_gather_windows_cuda);
  register_max_pool2d_with_switches<Cuda>(m, conelens_max_pool2d_with_switches_cuda);
  register_max_unpool2d<Cuda>(m, conelens_max_unpool2d_cuda, conelens_max_unpool2d_backward_cuda);
  register_relu_change<Cuda>(m, conelens_relu_change_cuda);
}
