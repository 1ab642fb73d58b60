// TensorArg: a tensor argument of a native function, taken from any DLPack speaker for the length of the
// call. The way to a type's tensors is found once: torch's C exchange table, else `__dlpack__`.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <sstream>
#include <string>
#include <vector>

#include "dlpack_abi.h"
#include "types.h"

namespace conelens {

namespace py = pybind11;
using Pair = std::array<int64_t, 2>;  // (y, x)

class TensorArg {
 public:
  TensorArg() = default;

  bool load(PyObject* object) {
    PyTypeObject* type = Py_TYPE(object);
    if (const dlpack::ExchangeApi* api = exchange_api(type)) {
      if (api->borrow_from_object(object, &tensor_) != 0) throw py::error_already_set();
      return true;
    }
    if (!PyObject_HasAttrString(object, "__dlpack__")) return false;
    load_capsule(py::reinterpret_borrow<py::object>(object));
    return true;
  }

  const dlpack::Tensor& dl() const { return tensor_; }
  int ndim() const { return tensor_.ndim; }
  int64_t size(int axis) const { return tensor_.shape[axis]; }
  int64_t stride(int axis) const {
    if (tensor_.strides) return tensor_.strides[axis];
    int64_t stride = 1;
    for (int i = tensor_.ndim - 1; i > axis; --i) stride *= tensor_.shape[i];
    return stride;
  }
  void* data() const { return static_cast<char*>(tensor_.data) + tensor_.byte_offset; }
  int device_id() const { return tensor_.device.id; }

  template <class T, std::size_t n>
  void copy_strides(T (&strides)[n]) const {
    for (std::size_t i = 0; i < n; ++i) strides[i] = stride(static_cast<int>(i));
  }

  // --- checks; each names the argument, what came and what is wanted
  // -------------------------------------------

  void expect_device(const char* name, int32_t type) const {
    if (tensor_.device.type != type)
      fail(name, "is on DLPack device type " + std::to_string(tensor_.device.type) + ", wanted " +
                     std::to_string(type));
  }
  void expect_same_device(const char* name, const TensorArg& other) const {
    if (tensor_.device.type != other.tensor_.device.type || tensor_.device.id != other.tensor_.device.id)
      fail(name, "is on another device than the first argument");
  }
  void expect_shape(const char* name, const std::vector<int64_t>& wanted) const {
    bool same = ndim() == static_cast<int>(wanted.size());
    for (int i = 0; same && i < ndim(); ++i) same = size(i) == wanted[i];
    if (!same) fail(name, "has shape " + text(shape()) + ", wanted " + text(wanted));
  }
  void expect_ndim(const char* name, int wanted) const {
    if (ndim() != wanted)
      fail(name, "has shape " + text(shape()) + ", wanted " + std::to_string(wanted) + " axes");
  }
  // strides of axes that no step is taken along do not count
  void expect_contiguous(const char* name) const {
    for (int i = 0; i < ndim(); ++i)
      if (size(i) == 0) return;
    int64_t apart = 1;
    for (int i = ndim(); i-- > 0; apart *= size(i))
      if (size(i) > 1 && stride(i) != apart) fail(name, "must be contiguous");
  }
  // data of a packed tensor of this shape, on the device of `other`
  void* packed(const char* name, const std::vector<int64_t>& wanted, const TensorArg& other) const {
    expect_shape(name, wanted);
    expect_same_device(name, other);
    expect_contiguous(name);
    return data();
  }
  void expect_writable(const char* name) const {
    if (read_only_) fail(name, "is read-only");
  }

  // CONELENS_FLOAT32 ...; refuses anything else
  int32_t float_dtype(const char* name) const {
    const dlpack::DataType t = tensor_.dtype;
    if (t.lanes == 1 && t.code == dlpack::kFloat && t.bits == 32) return CONELENS_FLOAT32;
    if (t.lanes == 1 && t.code == dlpack::kFloat && t.bits == 16) return CONELENS_FLOAT16;
    if (t.lanes == 1 && t.code == dlpack::kBfloat && t.bits == 16) return CONELENS_BFLOAT16;
    if (t.lanes == 1 && t.code == dlpack::kFloat && t.bits == 64) return CONELENS_FLOAT64;
    fail(name, "has DLPack dtype " + dtype_text() + ", wanted float32, float16, bfloat16 or float64");
  }
  void expect_float_dtype(const char* name, int32_t wanted) const {
    if (float_dtype(name) != wanted)
      fail(name, "has DLPack dtype " + dtype_text() + ", wanted that of the first argument");
  }
  // bytes per element of an integer tensor that has one of two forms
  int32_t integer_bytes(const char* name, dlpack::DataType first, dlpack::DataType second) const {
    for (dlpack::DataType t : {first, second})
      if (tensor_.dtype.code == t.code && tensor_.dtype.bits == t.bits && tensor_.dtype.lanes == t.lanes)
        return t.bits / 8;
    fail(name, "has DLPack dtype " + dtype_text() + " (code:bits), wanted " + dtype_text(first) + " or " +
                   dtype_text(second));
  }
  int32_t switch_bytes(const char* name) const {
    return integer_bytes(name, {dlpack::kUInt, 8, 1}, {dlpack::kInt, 32, 1});
  }

  [[noreturn]] static void fail(const char* name, const std::string& what) {
    throw py::value_error(std::string(name) + " " + what);
  }

 private:
  std::vector<int64_t> shape() const { return {tensor_.shape, tensor_.shape + tensor_.ndim}; }
  static std::string text(const std::vector<int64_t>& values) {
    std::ostringstream out;
    out << '[';
    for (std::size_t i = 0; i < values.size(); ++i) out << (i ? ", " : "") << values[i];
    out << ']';
    return out.str();
  }
  std::string dtype_text() const { return dtype_text(tensor_.dtype); }
  static std::string dtype_text(dlpack::DataType t) {
    return std::to_string(t.code) + ":" + std::to_string(t.bits) +
           (t.lanes == 1 ? "" : "x" + std::to_string(t.lanes));
  }

  // Types seen so far and their tables (null: none). A few entries; types live as long as the process.
  static const dlpack::ExchangeApi* exchange_api(PyTypeObject* type) {
    struct Entry {
      PyTypeObject* type;
      const dlpack::ExchangeApi* api;
    };
    static thread_local std::array<Entry, 4> seen{};
    static thread_local unsigned next = 0;
    for (const Entry& entry : seen)
      if (entry.type == type) return entry.api;
    const dlpack::ExchangeApi* api = nullptr;
    if (PyObject* capsule =
            PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__")) {
      api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
      Py_DECREF(capsule);
      if (!api || api->version.major != 1) api = nullptr;
    }
    PyErr_Clear();
    Py_INCREF(type);
    seen[next++ % seen.size()] = {type, api};
    return api;
  }

  void load_capsule(const py::object& object) {
    py::object method = object.attr("__dlpack__");
    try {
      capsule_ = method(py::arg("max_version") = py::make_tuple(1, 0));
    } catch (py::error_already_set& error) {
      if (!error.matches(PyExc_TypeError)) throw;
      capsule_ = method();
    }
    if (PyCapsule_IsValid(capsule_.ptr(), "dltensor_versioned")) {
      auto* managed = static_cast<dlpack::ManagedTensorVersioned*>(
          PyCapsule_GetPointer(capsule_.ptr(), "dltensor_versioned"));
      tensor_ = managed->tensor;
      read_only_ = managed->flags & dlpack::kReadOnly;
    } else {
      auto* managed = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule_.ptr(), "dltensor"));
      if (!managed) throw py::error_already_set();
      tensor_ = managed->tensor;
    }
  }

  dlpack::Tensor tensor_{};
  bool read_only_ = false;
  py::object capsule_;  // keeps a capsule's tensor alive for the call; its own destructor frees it, as it
                        // stays unused
};

}  // namespace conelens

namespace pybind11::detail {

template <>
struct type_caster<conelens::TensorArg> {
  PYBIND11_TYPE_CASTER(conelens::TensorArg, const_name("DLPack array"));

  bool load(handle source, bool) { return value.load(source.ptr()); }
};

}  // namespace pybind11::detail
