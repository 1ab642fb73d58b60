// Python binding of edge_scores.
#pragma once

#include "binding.h"
#include "edge_scores.h"

namespace conelens {

template <class Backend>
void register_edge_scores(py::module_& m,
                          int (*launch)(const conelens_edge_scores_params*, typename Backend::Context)) {
  m.def(
      "edge_scores",
      [launch](const TensorArg& displacement, const TensorArg& weight, const TensorArg& parent,
               const TensorArg& bandwidth, const TensorArg& out, std::intptr_t context) {
        conelens_edge_scores_params p{};
        displacement.expect_ndim("displacement", 3), parent.expect_ndim("parent", 3);
        displacement.expect_device("displacement", Backend::device_type);
        p.dtype = displacement.float_dtype("displacement");
        p.images = displacement.size(0), p.nodes = displacement.size(1), p.parents = parent.size(1);
        struct Wanted {
          const char* name;
          const TensorArg& tensor;
          std::vector<int64_t> shape;
        };
        for (const auto& [name, tensor, shape] :
             {Wanted{"displacement", displacement, {p.images, p.nodes, 2}},
              Wanted{"weight", weight, {p.images, p.nodes}},
              Wanted{"parent", parent, {p.images, p.parents, 2}}, Wanted{"bandwidth", bandwidth, {p.nodes}},
              Wanted{"out", out, {p.nodes, p.parents}}}) {
          tensor.expect_float_dtype(name, p.dtype);
          tensor.expect_shape(name, shape);
          tensor.expect_same_device(name, displacement);
          tensor.expect_contiguous(name);
        }
        out.expect_writable("out");
        p.displacement = displacement.data(), p.weight = weight.data(), p.parent = parent.data();
        p.bandwidth = bandwidth.data(), p.out = out.data();
        if (p.nodes * p.parents > 0) run<Backend>(launch, p, displacement.device_id(), context);
      },
      py::arg("displacement"), py::arg("weight"), py::arg("parent"), py::arg("bandwidth"), py::arg("out"),
      py::arg("context"));
}

}  // namespace conelens
