// Python binding of deconv2d for either module.
#pragma once

#include <optional>

#include "binding.h"
#include "deconv2d.h"

namespace conelens {

using Pool = std::array<int64_t, 8>;  // kernel, stride, padding, dilation, each (y, x)

inline void fill_deconv2d_pool(conelens_deconv2d_params& p, const TensorArg& y,
                               const std::optional<Pool>& pool, const std::optional<TensorArg>& switches) {
  if (pool.has_value() != switches.has_value()) TensorArg::fail("pool", "and switches belong together");
  for (int i = 0; i < 2; ++i) {
    p.pool_kernel[i] = pool ? (*pool)[i] : 1, p.pool_stride[i] = pool ? (*pool)[2 + i] : 1;
    p.pool_padding[i] = pool ? (*pool)[4 + i] : 0, p.pool_dilation[i] = pool ? (*pool)[6 + i] : 1;
    if (p.pool_kernel[i] < 1 || p.pool_stride[i] < 1 || p.pool_padding[i] < 0 || p.pool_dilation[i] < 1)
      TensorArg::fail("pool", "wants kernel, stride, dilation >= 1 and padding >= 0");
  }
  if (!switches) return;
  switches->expect_shape("switches", {p.batch, p.in_channels, p.y_size[0], p.y_size[1]});
  switches->expect_same_device("switches", y);
  p.switch_bytes = switches->switch_bytes("switches");
  switches->copy_strides(p.switches_stride);
  p.switches = switches->data();
}

inline void fill_deconv2d_origin(conelens_deconv2d_params& p, const TensorArg& y,
                                 const std::optional<TensorArg>& origin) {
  if (!origin) return;
  origin->expect_shape("origin", {p.batch, 2});
  origin->expect_same_device("origin", y);
  p.origin_bytes = origin->integer_bytes("origin", {dlpack::kInt, 32, 1}, {dlpack::kInt, 64, 1});
  if (p.batch > 0 && (origin->stride(1) != 1 || (p.batch > 1 && origin->stride(0) != 2)))
    TensorArg::fail("origin", "must be contiguous");
  p.origin = origin->data();
}

template <class Backend>
using Deconv2dLauncher = int (*)(const conelens_deconv2d_params*, typename Backend::Context);

template <class Backend>
void register_deconv2d(py::module_& m, Deconv2dLauncher<Backend> launch) {
  // false: a switch was invalid; the caller names it
  m.def(
      "deconv2d",
      [launch](const TensorArg& y, const TensorArg& weight, const TensorArg& out, Pair stride, Pair padding,
               int64_t groups, Pair dilation, Pair output_size, Pair map_size,
               const std::optional<Pool>& pool, const std::optional<TensorArg>& switches, bool relu,
               const std::optional<TensorArg>& origin, std::intptr_t context) {
        conelens_deconv2d_params p{};
        y.expect_ndim("y", 4), weight.expect_ndim("weight", 4), out.expect_ndim("out", 4);
        y.expect_device("y", Backend::device_type);
        weight.expect_same_device("weight", y), out.expect_same_device("out", y);
        p.dtype = y.float_dtype("y");
        weight.expect_float_dtype("weight", p.dtype), out.expect_float_dtype("out", p.dtype);
        p.batch = y.size(0), p.in_channels = y.size(1), p.groups = groups;
        if (groups < 1 || p.in_channels % groups != 0) TensorArg::fail("groups", "must divide y's channels");
        p.out_channels = weight.size(1) * groups;
        weight.expect_shape("weight", {p.in_channels, weight.size(1), weight.size(2), weight.size(3)});
        copy_pair(p.stride, stride), copy_pair(p.padding, padding), copy_pair(p.dilation, dilation);
        copy_pair(p.map_size, map_size), copy_pair(p.output_size, output_size);
        for (int i = 0; i < 2; ++i) {
          p.kernel[i] = weight.size(2 + i), p.y_size[i] = y.size(2 + i);
          if (p.kernel[i] < 1 || stride[i] < 1 || dilation[i] < 1 || padding[i] < 0)
            TensorArg::fail("weight", "wants kernel, stride, dilation >= 1 and padding >= 0");
        }
        fill_deconv2d_pool(p, y, pool, switches);
        fill_deconv2d_origin(p, y, origin);
        for (int i = 0; i < 2; ++i) {
          const int64_t signal = deconv::axis(p, i).signal;
          p.out_size[i] =
              origin ? (signal - 1) * stride[i] + dilation[i] * (p.kernel[i] - 1) + 1 : output_size[i];
          if (!origin && map_size[i] != signal)
            TensorArg::fail("map_size", "must be that of y without pool and origin");
        }
        out.expect_shape("out", {p.batch, p.out_channels, p.out_size[0], p.out_size[1]});
        out.expect_writable("out");
        y.copy_strides(p.y_stride), weight.copy_strides(p.weight_stride), out.copy_strides(p.out_stride);
        p.y = y.data(), p.weight = weight.data(), p.out = out.data(), p.relu = relu;
        if (p.batch * p.in_channels * p.out_channels == 0) return true;
        return run<Backend>(launch, p, y.device_id(), context) == CONELENS_OK;
      },
      py::arg("y"), py::arg("weight"), py::arg("out"), py::arg("stride"), py::arg("padding"),
      py::arg("groups"), py::arg("dilation"), py::arg("output_size"), py::arg("map_size"),
      py::arg("pool").none(true), py::arg("switches").none(true), py::arg("relu"),
      py::arg("origin").none(true), py::arg("context"));
}

}  // namespace conelens
