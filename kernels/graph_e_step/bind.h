// Python binding of graph_e_step for either module.
#pragma once

#include <optional>

#include "binding.h"
#include "graph_e_step.h"

namespace conelens {

template <class Backend>
void register_graph_e_step(py::module_& m,
                           int (*launch)(const conelens_graph_e_step_params*, typename Backend::Context)) {
  using Numbers = std::array<double, 2>;
  m.def(
      "graph_e_step",
      [launch](const TensorArg& features, const TensorArg& mean, const std::optional<TensorArg>& shift,
               const TensorArg& sigma, const TensorArg& weight, const TensorArg& tau, const Numbers& start,
               const Numbers& step, const TensorArg& mass, const TensorArg& first, const TensorArg& second,
               const TensorArg& log_likelihood, const std::optional<TensorArg>& position,
               const std::optional<TensorArg>& score, std::intptr_t context) {
        conelens_graph_e_step_params p{};
        features.expect_ndim("features", 4), sigma.expect_ndim("sigma", 2);
        features.expect_device("features", Backend::device_type);
        p.images = features.size(0), p.channels = features.size(1), p.nodes = sigma.size(1);
        p.height = features.size(2), p.width = features.size(3);
        p.dtype = features.float_dtype("features");
        const int32_t real = p.dtype == CONELENS_FLOAT64 ? CONELENS_FLOAT64 : CONELENS_FLOAT32;
        if (p.height * p.width < 1 || p.height * p.width > INT32_MAX)
          TensorArg::fail("features", "wants at least one cell per channel and at most 2^31 - 1");
        if (p.width > 1 && features.stride(3) != 1)
          TensorArg::fail("features", "must have its columns side by side");

        const auto expect_real = [&](const char* name, const TensorArg& x) {
          if (x.float_dtype(name) != real) TensorArg::fail(name, "has another dtype than the results");
        };
        const auto input = [&](const char* name, const TensorArg& x, const std::vector<int64_t>& shape) {
          expect_real(name, x);
          return x.packed(name, shape, features);
        };
        const auto output = [&](const char* name, const TensorArg& x, const std::vector<int64_t>& shape) {
          x.expect_writable(name);
          return input(name, x, shape);
        };
        const std::vector<int64_t> nodes{p.images, p.channels, p.nodes},
            pairs{p.images, p.channels, p.nodes, 2};
        p.mean = input("mean", mean, {p.channels, p.nodes, 2});
        p.shift = shift ? input("shift", *shift, pairs) : nullptr;
        p.sigma = input("sigma", sigma, {p.channels, p.nodes});
        p.tau = input("tau", tau, {p.images});
        expect_real("weight", weight);
        weight.expect_shape("weight", nodes), weight.expect_same_device("weight", features);
        p.mass = output("mass", mass, nodes), p.first = output("first", first, pairs);
        p.second = output("second", second, nodes);
        p.log_likelihood = output("log_likelihood", log_likelihood, {p.images, p.channels});
        if (position.has_value() != score.has_value()) TensorArg::fail("position", "and score come together");
        if (position) {
          position->integer_bytes("position", {dlpack::kInt, 32, 1}, {dlpack::kInt, 32, 1});
          position->expect_writable("position");
          p.position = static_cast<int32_t*>(position->packed("position", nodes, features));
          p.score = output("score", *score, nodes);
        }
        features.copy_strides(p.features_stride), weight.copy_strides(p.weight_stride);
        p.features = features.data(), p.weight = weight.data();
        for (int axis = 0; axis < 2; ++axis) p.start[axis] = start[axis], p.step[axis] = step[axis];
        if (p.images * p.channels > 0) run<Backend>(launch, p, features.device_id(), context);
      },
      py::arg("features"), py::arg("mean"), py::arg("shift").none(true), py::arg("sigma"), py::arg("weight"),
      py::arg("tau"), py::arg("start"), py::arg("step"), py::arg("mass"), py::arg("first"), py::arg("second"),
      py::arg("log_likelihood"), py::arg("position").none(true), py::arg("score").none(true),
      py::arg("context"));
}

}  // namespace conelens
