// Python binding of relu_change for either module.
#pragma once

#include <optional>
#include <type_traits>

#include "binding.h"
#include "gather_windows/bind.h"
#include "relu_change.h"

namespace conelens {

template <class Backend>
void register_relu_change(py::module_& m,
                          int (*launch)(const conelens_relu_change_params*, typename Backend::Context)) {
  // false: base lacks a row (looked at on the CPU only); the caller names it
  m.def(
      "relu_change",
      [launch](const TensorArg& change, const TensorArg& base, const TensorArg& origin,
               const std::optional<TensorArg>& rows, const TensorArg& out, std::intptr_t context) {
        conelens_relu_change_params p{};
        change.expect_ndim("change", 4), base.expect_ndim("base", 4);
        change.expect_device("change", Backend::device_type);
        p.units = change.size(0), p.channels = change.size(1);
        p.out_height = change.size(2), p.out_width = change.size(3);
        p.samples = base.size(0), p.height = base.size(2), p.width = base.size(3);
        base.expect_shape("base", {p.samples, p.channels, p.height, p.width});
        out.expect_shape("out", {p.units, p.channels, p.out_height, p.out_width});
        out.expect_writable("out");
        p.dtype = change.float_dtype("change");
        base.expect_float_dtype("base", p.dtype), out.expect_float_dtype("out", p.dtype);
        base.expect_same_device("base", change), out.expect_same_device("out", change);
        p.origin_bytes = expect_integers("origin", origin, change, {p.units, 2});
        p.origin = origin.data();
        if (rows) {
          p.rows_bytes = expect_integers("rows", *rows, change, {p.units});
          p.rows = rows->data();
        } else if (p.samples != 1 && p.samples != p.units) {
          TensorArg::fail("rows", "must say which sample of base each change belongs to");
        }
        change.copy_strides(p.change_stride), base.copy_strides(p.base_stride);
        out.copy_strides(p.out_stride);
        p.change = change.data(), p.base = base.data(), p.out = out.data();
        if constexpr (std::is_same_v<Backend, Cpu>)
          for (int64_t unit = 0; p.rows && unit < p.units; ++unit)
            if (gather::sample(p, unit) < 0) return false;
        if (p.units * p.channels * p.out_height * p.out_width > 0)
          run<Backend>(launch, p, change.device_id(), context);
        return true;
      },
      py::arg("change"), py::arg("base"), py::arg("origin"), py::arg("rows").none(true), py::arg("out"),
      py::arg("context"));
}

}  // namespace conelens
