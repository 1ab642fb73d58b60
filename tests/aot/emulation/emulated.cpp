// The module conelens._cuda, running on the host: same bindings, same kernels, tensors of the CPU.
#include "channel_peaks/bind.h"
#include "conelens.h"
#include "deconv2d/bind.h"
#include "gather_windows/bind.h"
#include "max_pool2d_with_switches/bind.h"
#include "max_unpool2d/bind.h"
#include "relu_change/bind.h"

extern "C" const char* conelens_error_string(int code) {
  return code == CONELENS_OK ? "no error" : "error";
}

namespace conelens {

struct Emulated {
  using Context = void*;
  static constexpr int32_t device_type = dlpack::kCpu;
  static Context context(std::intptr_t value) { return reinterpret_cast<Context>(value); }
  struct Guard {
    explicit Guard(int) {}
  };
};

}  // namespace conelens

PYBIND11_MODULE(emulated, m) {
  using namespace conelens;
  register_channel_peaks<Emulated>(m, conelens_channel_peaks_cuda);
  register_deconv2d<Emulated>(m, conelens_deconv2d_cuda);
  register_gather_windows<Emulated>(m, conelens_gather_windows_cuda);
  register_max_pool2d_with_switches<Emulated>(m, conelens_max_pool2d_with_switches_cuda);
  register_max_unpool2d<Emulated>(m, conelens_max_unpool2d_cuda, conelens_max_unpool2d_backward_cuda);
  register_relu_change<Emulated>(m, conelens_relu_change_cuda);
}
