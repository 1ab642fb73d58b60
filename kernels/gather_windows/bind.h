// Python binding of gather_windows for either module.
#pragma once

#include <cstring>
#include <optional>
#include <type_traits>

#include "binding.h"
#include "dtype.h"
#include "gather_windows.h"

namespace conelens {

// Element size and fill of the dtypes that base may have: floats, uint8 and int32.
inline void fill_element(conelens_gather_windows_params& p, const TensorArg& base, double fill, bool add) {
  const dlpack::DataType type = base.dl().dtype;
  const auto keep = [&](auto value) {
    p.element_bytes = sizeof value;
    std::memcpy(&p.fill, &value, sizeof value);
  };
  p.dtype = -1;
  if (type.lanes == 1 && type.code == dlpack::kUInt && type.bits == 8 && !add)
    keep(static_cast<uint8_t>(fill));
  else if (type.lanes == 1 && type.code == dlpack::kInt && type.bits == 32 && !add)
    keep(static_cast<int32_t>(fill));
  else
    dispatch_dtype(p.dtype = base.float_dtype("base"), [&](auto t) {
      using E = Element<typename decltype(t)::type>;
      keep(E::store(static_cast<typename E::Compute>(fill)));
      return CONELENS_OK;
    });
}

inline int32_t expect_integers(const char* name, const TensorArg& tensor, const TensorArg& base,
                               const std::vector<int64_t>& shape) {
  tensor.expect_shape(name, shape);
  tensor.expect_same_device(name, base);
  const int last = tensor.ndim() - 1;
  if (shape[0] > 0 && (tensor.stride(last) != 1 || (last == 1 && shape[0] > 1 && tensor.stride(0) != 2)))
    TensorArg::fail(name, "must be contiguous");
  return tensor.integer_bytes(name, {dlpack::kInt, 32, 1}, {dlpack::kInt, 64, 1});
}

template <class Backend>
void register_gather_windows(py::module_& m, int (*launch)(const conelens_gather_windows_params*,
                                                           typename Backend::Context)) {
  // false: base lacks a row (looked at on the CPU only); the caller names it
  m.def(
      "gather_windows",
      [launch](const TensorArg& base, const std::optional<TensorArg>& patch,
               const std::optional<TensorArg>& patch_origin, const TensorArg& window_origin,
               const std::optional<TensorArg>& rows, const TensorArg& out, double fill, bool add,
               std::intptr_t context) {
        conelens_gather_windows_params p{};
        base.expect_ndim("base", 4);
        base.expect_device("base", Backend::device_type);
        fill_element(p, base, fill, add);
        p.samples = base.size(0), p.channels = base.size(1), p.height = base.size(2), p.width = base.size(3);
        window_origin.expect_ndim("window_origin", 2);
        p.units = window_origin.size(0);
        p.window_origin_bytes = expect_integers("window_origin", window_origin, base, {p.units, 2});
        p.window_origin = window_origin.data();
        const auto expect_map = [&](const char* name, const TensorArg& map) {
          map.expect_ndim(name, 4);
          map.expect_shape(name, {p.units, p.channels, map.size(2), map.size(3)});
          map.expect_same_device(name, base);
          const dlpack::DataType a = map.dl().dtype, b = base.dl().dtype;
          if (a.code != b.code || a.bits != b.bits || a.lanes != b.lanes)
            TensorArg::fail(name, "has another dtype than base");
        };
        expect_map("out", out);
        out.expect_writable("out");
        p.out_height = out.size(2), p.out_width = out.size(3);
        if (patch.has_value() != patch_origin.has_value())
          TensorArg::fail("patch", "and patch_origin go together");
        if (patch) {
          expect_map("patch", *patch);
          p.patch_height = patch->size(2), p.patch_width = patch->size(3);
          patch->copy_strides(p.patch_stride);
          p.patch = patch->data();
          p.patch_origin_bytes = expect_integers("patch_origin", *patch_origin, base, {p.units, 2});
          p.patch_origin = patch_origin->data();
        }
        if (rows) {
          p.rows_bytes = expect_integers("rows", *rows, base, {p.units});
          p.rows = rows->data();
        } else if (p.samples != 1 && p.samples != p.units) {
          TensorArg::fail("rows", "must say which sample of base each window reads");
        }
        base.copy_strides(p.base_stride), out.copy_strides(p.out_stride);
        p.base = base.data(), p.out = out.data();
        p.add = add;
        if constexpr (std::is_same_v<Backend, Cpu>)
          for (int64_t unit = 0; p.rows && unit < p.units; ++unit)
            if (gather::sample(p, unit) < 0) return false;
        if (p.units * p.channels * p.out_height * p.out_width > 0)
          run<Backend>(launch, p, base.device_id(), context);
        return true;
      },
      py::arg("base"), py::arg("patch").none(true), py::arg("patch_origin").none(true),
      py::arg("window_origin"), py::arg("rows").none(true), py::arg("out"), py::arg("fill"), py::arg("add"),
      py::arg("context"));
}

}  // namespace conelens
