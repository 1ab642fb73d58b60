// Python binding of channel_peaks for either module.
#pragma once

#include "binding.h"
#include "channel_peaks.h"

namespace conelens {

template <class Backend>
void register_channel_peaks(py::module_& m,
                            int (*launch)(const conelens_channel_peaks_params*, typename Backend::Context)) {
  m.def(
      "channel_peaks",
      [launch](const TensorArg& x, const TensorArg& values, const TensorArg& positions, int reduce,
               std::intptr_t context) {
        conelens_channel_peaks_params p{};
        x.expect_ndim("x", 4);
        x.expect_device("x", Backend::device_type);
        p.dtype = x.float_dtype("x");
        p.batch = x.size(0), p.channels = x.size(1), p.height = x.size(2), p.width = x.size(3);
        if (p.height * p.width < 1 || p.height * p.width > INT32_MAX)
          TensorArg::fail("x", "wants at least one cell per channel and at most 2^31 - 1");
        if (reduce < CONELENS_REDUCE_MAX || reduce > CONELENS_REDUCE_MEAN)
          TensorArg::fail("reduce", "is unknown");
        values.expect_float_dtype("values", p.dtype);
        positions.integer_bytes("positions", {dlpack::kInt, 32, 1}, {dlpack::kInt, 32, 1});
        for (const auto& [name, out] : {std::pair{"values", &values}, std::pair{"positions", &positions}}) {
          out->expect_shape(name, {p.batch, p.channels});
          out->expect_same_device(name, x);
          out->expect_writable(name);
          if (p.batch * p.channels > 0 &&
              ((p.channels > 1 && out->stride(1) != 1) || (p.batch > 1 && out->stride(0) != p.channels)))
            TensorArg::fail(name, "must be contiguous");
        }
        x.copy_strides(p.x_stride);
        p.x = x.data(), p.values = values.data(), p.positions = static_cast<int32_t*>(positions.data());
        p.reduce = reduce;
        if (p.batch * p.channels > 0) run<Backend>(launch, p, x.device_id(), context);
      },
      py::arg("x"), py::arg("values"), py::arg("positions"), py::arg("reduce"), py::arg("context"));
}

}  // namespace conelens
