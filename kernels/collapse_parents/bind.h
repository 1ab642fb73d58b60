// Python binding of collapse_parents.
#pragma once

#include "binding.h"
#include "collapse_parents.h"

namespace conelens {

inline bool all_within(const void* edges, int32_t bytes, int64_t count, int64_t parents) {
  const auto check = [&](const auto* indices) {
    bool within = true;
    for (int64_t i = 0; i < count; ++i) within &= indices[i] >= 0 && indices[i] < parents;
    return within;
  };
  return bytes == 8 ? check(static_cast<const int64_t*>(edges)) : check(static_cast<const int32_t*>(edges));
}

template <class Backend>
void register_collapse_parents(py::module_& m, int (*launch)(const conelens_collapse_parents_params*,
                                                             typename Backend::Context)) {
  // false: there is no such parent; the caller names the edge
  m.def(
      "collapse_parents",
      [launch](const TensorArg& displacement, const TensorArg& sigma, const TensorArg& edges,
               const TensorArg& shift, const TensorArg& sigma_out, const TensorArg& log_agreement,
               std::intptr_t context) {
        conelens_collapse_parents_params p{};
        displacement.expect_ndim("displacement", 3), edges.expect_ndim("edges", 2);
        displacement.expect_device("displacement", Backend::device_type);
        p.dtype = displacement.float_dtype("displacement");
        p.images = displacement.size(0), p.parents = displacement.size(1);
        p.nodes = edges.size(0), p.edges_per_node = edges.size(1);
        const auto data = [&](const char* name, const TensorArg& tensor, const std::vector<int64_t>& shape) {
          tensor.expect_float_dtype(name, p.dtype);
          return tensor.packed(name, shape, displacement);
        };
        p.displacement = data("displacement", displacement, {p.images, p.parents, 2});
        p.sigma = data("sigma", sigma, {p.parents});
        p.edges = edges.packed("edges", {p.nodes, p.edges_per_node}, displacement);
        p.shift = data("shift", shift, {p.images, p.nodes, 2});
        p.sigma_out = data("sigma_out", sigma_out, {p.nodes});
        p.log_agreement = data("log_agreement", log_agreement, {p.images, p.nodes});
        for (const TensorArg* out : {&shift, &sigma_out, &log_agreement}) out->expect_writable("out");
        p.edges_bytes = edges.integer_bytes("edges", {dlpack::kInt, 32, 1}, {dlpack::kInt, 64, 1});
        if (p.nodes == 0) return true;
        if (!all_within(p.edges, p.edges_bytes, p.nodes * p.edges_per_node, p.parents)) return false;
        run<Backend>(launch, p, displacement.device_id(), context);
        return true;
      },
      py::arg("displacement"), py::arg("sigma"), py::arg("edges"), py::arg("shift"), py::arg("sigma_out"),
      py::arg("log_agreement"), py::arg("context"));
}

}  // namespace conelens
