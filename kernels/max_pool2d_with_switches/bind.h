// Python binding of max_pool2d_with_switches for either module.
#pragma once

#include "binding.h"
#include "max_pool2d_with_switches.h"

namespace conelens {

template <class Backend>
void register_max_pool2d_with_switches(py::module_& m, int (*launch)(const conelens_max_pool2d_params*,
                                                                     typename Backend::Context)) {
  m.def(
      "max_pool2d_with_switches",
      [launch](const TensorArg& x, const TensorArg& pooled, const TensorArg& switches, Pair kernel,
               Pair stride, Pair padding, Pair dilation, bool relu, std::intptr_t context) {
        conelens_max_pool2d_params p{};
        x.expect_ndim("x", 4);
        x.expect_device("x", Backend::device_type);
        p.dtype = x.float_dtype("x");
        pooled.expect_ndim("pooled", 4);
        pooled.expect_same_device("pooled", x);
        pooled.expect_float_dtype("pooled", p.dtype);
        pooled.expect_writable("pooled");
        p.batch = x.size(0), p.channels = x.size(1), p.height = x.size(2), p.width = x.size(3);
        p.out_height = pooled.size(2), p.out_width = pooled.size(3);
        pooled.expect_shape("pooled", {p.batch, p.channels, p.out_height, p.out_width});
        switches.expect_shape("switches", {p.batch, p.channels, p.out_height, p.out_width});
        switches.expect_same_device("switches", x);
        switches.expect_writable("switches");
        p.switch_bytes = switches.switch_bytes("switches");
        if (p.switch_bytes == 1 && kernel[0] * kernel[1] > 256)
          TensorArg::fail("switches", "is uint8 but the window has more than 256 taps; wanted int32");
        for (int i = 0; i < 2; ++i) {
          if (kernel[i] < 1 || stride[i] < 1 || dilation[i] < 1 || padding[i] < 0)
            TensorArg::fail("window", "wants kernel, stride, dilation >= 1 and padding >= 0");
          const int64_t outs = i == 0 ? p.out_height : p.out_width, size = i == 0 ? p.height : p.width;
          for (int64_t o : {int64_t{0}, outs - 1}) {
            const int64_t start = o * stride[i] - padding[i];
            if (pool::first_tap(start, dilation[i]) >= pool::end_tap(start, dilation[i], kernel[i], size))
              TensorArg::fail("pooled", "has windows without a cell of the map");
          }
        }
        copy_pair(p.kernel, kernel), copy_pair(p.stride, stride);
        copy_pair(p.padding, padding), copy_pair(p.dilation, dilation);
        x.copy_strides(p.x_stride), pooled.copy_strides(p.pooled_stride),
            switches.copy_strides(p.switches_stride);
        p.x = x.data(), p.pooled = pooled.data(), p.switches = switches.data();
        p.relu = relu;
        if (p.batch * p.channels > 0) run<Backend>(launch, p, x.device_id(), context);
      },
      py::arg("x"), py::arg("pooled"), py::arg("switches"), py::arg("kernel_size"), py::arg("stride"),
      py::arg("padding"), py::arg("dilation"), py::arg("relu"), py::arg("context"));
}

}  // namespace conelens
