// What both back ends' FFI handlers ask of a buffer: its shape in words, its type.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>

#include "problem.h"
#include "xla/ffi/api/ffi.h"

namespace jax_trirun {

namespace ffi = xla::ffi;

inline std::string shape_of(ffi::AnyBuffer::Dimensions dims) {
  std::string text = "[";
  for (size_t i = 0; i < dims.size(); ++i) text += (i ? ", " : "") + std::to_string(dims[i]);
  return text + "]";
}

inline bool has_shape(const ffi::AnyBuffer& buffer, std::initializer_list<int64_t> want) {
  const auto dims = buffer.dimensions();
  return dims.size() == want.size() && std::equal(want.begin(), want.end(), dims.begin());
}

inline std::string of_shape(std::initializer_list<int64_t> want) {
  return shape_of(ffi::AnyBuffer::Dimensions(want.begin(), want.size()));
}

inline std::optional<DType> float_type(const ffi::AnyBuffer& buffer) {
  switch (buffer.element_type()) {
    case ffi::DataType::F32: return DType::kF32;
    case ffi::DataType::F16: return DType::kF16;
    case ffi::DataType::BF16: return DType::kBF16;
    default: return std::nullopt;
  }
}

// "" or what is wrong with a floating-point operand.
inline std::string operand_error(const char* name, const ffi::AnyBuffer& buffer,
                                 std::initializer_list<int64_t> want) {
  if (!float_type(buffer)) {
    return std::string("matmul: ") + name + " must be float32, float16 or bfloat16, got XLA element type " +
           std::to_string(static_cast<int>(buffer.element_type()));
  }
  if (!has_shape(buffer, want)) {
    return std::string("matmul: ") + name + " must have shape " + of_shape(want) + ", got " +
           shape_of(buffer.dimensions());
  }
  return "";
}

}  // namespace jax_trirun
