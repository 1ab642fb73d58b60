// Python binding of edge_scores.
#pragma once

#include <optional>

#include "binding.h"
#include "edge_scores.h"

namespace conelens {

template <class Backend>
void register_edge_scores(py::module_& m,
                          int (*launch)(const conelens_edge_scores_params*, typename Backend::Context)) {
  m.def(
      "edge_scores",
      [launch](const TensorArg& displacement, const TensorArg& weight, const TensorArg& parent,
               const std::optional<TensorArg>& bandwidth, const TensorArg& out, std::intptr_t context) {
        conelens_edge_scores_params p{};
        displacement.expect_ndim("displacement", 3), parent.expect_ndim("parent", 3);
        displacement.expect_device("displacement", Backend::device_type);
        p.dtype = displacement.float_dtype("displacement");
        p.images = displacement.size(0), p.nodes = displacement.size(1), p.parents = parent.size(1);
        const auto data = [&](const char* name, const TensorArg& tensor, const std::vector<int64_t>& shape) {
          tensor.expect_float_dtype(name, p.dtype);
          return tensor.packed(name, shape, displacement);
        };
        p.displacement = data("displacement", displacement, {p.images, p.nodes, 2});
        p.weight = data("weight", weight, {p.images, p.nodes});
        p.parent = data("parent", parent, {p.images, p.parents, 2});
        p.bandwidth = bandwidth ? data("bandwidth", *bandwidth, {p.nodes}) : nullptr;
        p.out = data("out", out, {p.nodes, p.parents});
        out.expect_writable("out");
        if (p.nodes * p.parents > 0) run<Backend>(launch, p, displacement.device_id(), context);
      },
      py::arg("displacement"), py::arg("weight"), py::arg("parent"), py::arg("bandwidth").none(true),
      py::arg("out"), py::arg("context"));
}

}  // namespace conelens
