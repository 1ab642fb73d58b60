// Python bindings of max_unpool2d and its adjoint for either module.
#pragma once

#include <optional>

#include "binding.h"
#include "max_unpool2d.h"

namespace conelens {

template <class Backend>
void fill_max_unpool2d(conelens_max_unpool2d_params& p, const TensorArg& pooled, const TensorArg& switches,
                       const TensorArg& out, Pair kernel, Pair stride, Pair padding, Pair dilation,
                       Pair output_size, const std::optional<TensorArg>& origin) {
  pooled.expect_ndim("pooled", 4);
  pooled.expect_device("pooled", Backend::device_type);
  p.dtype = pooled.float_dtype("pooled");
  p.batch = pooled.size(0), p.channels = pooled.size(1), p.height = pooled.size(2), p.width = pooled.size(3);
  switches.expect_shape("switches", {p.batch, p.channels, p.height, p.width});
  switches.expect_same_device("switches", pooled);
  p.switch_bytes = switches.switch_bytes("switches");
  Pair size = output_size;
  for (int i = 0; i < 2; ++i) {
    if (kernel[i] < 1 || stride[i] < 1 || dilation[i] < 1 || padding[i] < 0)
      TensorArg::fail("window", "wants kernel, stride, dilation >= 1 and padding >= 0");
    if (origin) size[i] = (pooled.size(2 + i) - 1) * stride[i] + dilation[i] * (kernel[i] - 1) + 1;
  }
  out.expect_shape("out", {p.batch, p.channels, size[0], size[1]});
  out.expect_same_device("out", pooled);
  out.expect_float_dtype("out", p.dtype);
  if (origin) {
    origin->expect_shape("origin", {p.batch, 2});
    origin->expect_same_device("origin", pooled);
    p.origin_bytes = origin->integer_bytes("origin", {dlpack::kInt, 32, 1}, {dlpack::kInt, 64, 1});
    if (p.batch > 0 && (origin->stride(1) != 1 || (p.batch > 1 && origin->stride(0) != 2)))
      TensorArg::fail("origin", "must be contiguous");
    p.origin = origin->data();
  }
  p.out_height = size[0], p.out_width = size[1];
  copy_pair(p.map_size, output_size);
  copy_pair(p.kernel, kernel), copy_pair(p.stride, stride);
  copy_pair(p.padding, padding), copy_pair(p.dilation, dilation);
  pooled.copy_strides(p.pooled_stride), switches.copy_strides(p.switches_stride),
      out.copy_strides(p.out_stride);
  p.pooled = pooled.data(), p.switches = switches.data(), p.out = out.data();
}

template <class Backend>
using MaxUnpool2dLauncher = int (*)(const conelens_max_unpool2d_params*, typename Backend::Context);

template <class Backend>
void register_max_unpool2d(py::module_& m, MaxUnpool2dLauncher<Backend> launch,
                           MaxUnpool2dLauncher<Backend> launch_backward) {
  // false: a switch was invalid (found on the CPU only); the caller names it
  m.def(
      "max_unpool2d",
      [launch](const TensorArg& pooled, const TensorArg& switches, const TensorArg& out, Pair kernel,
               Pair stride, Pair padding, Pair dilation, Pair output_size, bool relu,
               const std::optional<TensorArg>& origin, std::intptr_t context) {
        conelens_max_unpool2d_params p{};
        fill_max_unpool2d<Backend>(p, pooled, switches, out, kernel, stride, padding, dilation, output_size,
                                   origin);
        out.expect_writable("out");
        p.relu = relu;
        if (p.batch * p.channels == 0) return true;
        return run<Backend>(launch, p, pooled.device_id(), context) == CONELENS_OK;
      },
      py::arg("pooled"), py::arg("switches"), py::arg("out"), py::arg("kernel_size"), py::arg("stride"),
      py::arg("padding"), py::arg("dilation"), py::arg("output_size"), py::arg("relu"),
      py::arg("origin").none(true), py::arg("context"));
  m.def(
      "max_unpool2d_backward",
      [launch_backward](const TensorArg& grad, const TensorArg& switches, const TensorArg& out, Pair kernel,
                        Pair stride, Pair padding, Pair dilation, Pair output_size,
                        const std::optional<TensorArg>& origin, std::intptr_t context) {
        conelens_max_unpool2d_params p{};
        fill_max_unpool2d<Backend>(p, out, switches, grad, kernel, stride, padding, dilation, output_size,
                                   origin);
        out.expect_writable("out");
        if (p.batch * p.channels > 0) run<Backend>(launch_backward, p, out.device_id(), context);
      },
      py::arg("grad"), py::arg("switches"), py::arg("out"), py::arg("kernel_size"), py::arg("stride"),
      py::arg("padding"), py::arg("dilation"), py::arg("output_size"), py::arg("origin").none(true),
      py::arg("context"));
}

}  // namespace conelens
