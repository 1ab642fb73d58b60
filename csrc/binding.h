// Shared by the two modules: how a bound function runs its launcher and turns an error code into an
// exception. kernels/<op>/bind.h holds `template <class Backend> void register_<op>(py::module_&, launcher)`.
#pragma once

#include <string>

#include "tensor_arg.h"

extern "C" CONELENS_API const char* conelens_error_string(int code);

namespace conelens {

struct Cpu {
  using Context = int;  // threads
  static constexpr int32_t device_type = dlpack::kCpu;
  static Context context(std::intptr_t value) { return value < 1 ? 1 : static_cast<int>(value); }
  struct Guard {
    explicit Guard(int) {}
  };
};

// Runs `launch` without the GIL on the device of the arguments; raises, except for an invalid switch, which
// it returns.
template <class Backend, class Params>
int run(int (*launch)(const Params*, typename Backend::Context), const Params& params, int device_id,
        std::intptr_t context) {
  int code;
  {
    py::gil_scoped_release released;
    typename Backend::Guard guard(device_id);
    code = launch(&params, Backend::context(context));
  }
  if (code != CONELENS_OK && code != CONELENS_INVALID_SWITCH)
    throw std::runtime_error(std::string("conelens kernel failed: ") + conelens_error_string(code));
  return code;
}

inline void copy_pair(int64_t (&to)[2], const Pair& from) {
  to[0] = from[0];
  to[1] = from[1];
}

}  // namespace conelens
