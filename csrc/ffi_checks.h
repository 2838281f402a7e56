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

// "" or what is wrong with a floating-point operand. `where` begins the sentence.
inline std::string operand_error(const std::string& where, const char* name, const ffi::AnyBuffer& buffer,
                                 std::initializer_list<int64_t> want) {
  if (!float_type(buffer)) {
    return where + ": " + name + " must be float32, float16 or bfloat16, got XLA element type " +
           std::to_string(static_cast<int>(buffer.element_type()));
  }
  if (!has_shape(buffer, want)) {
    return where + ": " + name + " must have shape " + of_shape(want) + ", got " +
           shape_of(buffer.dimensions());
  }
  return "";
}

// Checks the buffers of a weight against its sizes, which are in args.problem, and fills in their pointers and
// types. "" or what is wrong. `zeros` [0, N] stands for none.
template <typename Args>
std::string read_weight(const std::string& where, Args& args, const ffi::AnyBuffer& words,
                        const ffi::AnyBuffer& scales, const ffi::AnyBuffer& zeros) {
  const Problem& p = args.problem;
  if (words.element_type() != ffi::DataType::U32 ||
      !has_shape(words, {p.k_blocks<2>(), p.n_blocks<2>(), Layout<2>::kWordsPerBlock})) {
    return where + ": words must be uint32 " +
           of_shape({p.k_blocks<2>(), p.n_blocks<2>(), Layout<2>::kWordsPerBlock}) + ", got " +
           shape_of(words.dimensions());
  }
  const bool has_zeros = !has_shape(zeros, {0, p.n}) || p.groups == 0;
  for (const std::string& e : {operand_error(where, "scales", scales, {p.groups, p.n}),
                               operand_error(where, "zeros", zeros, {has_zeros ? p.groups : 0, p.n})}) {
    if (!e.empty()) return e;
  }
  args.words = static_cast<const uint32_t*>(words.untyped_data());
  args.scales = scales.untyped_data();
  args.scale_type = *float_type(scales);
  args.zeros = has_zeros ? zeros.untyped_data() : nullptr;
  return "";
}

// Checks a matmul's buffers against each other and fills in the sizes, pointers and types that both back
// ends' MatmulArgs have. "" or what is wrong.
template <typename Args>
std::string read_matmul(Args& args, ffi::AnyBuffer x, ffi::AnyBuffer words, ffi::AnyBuffer scales,
                        ffi::AnyBuffer zeros, ffi::AnyBuffer y) {
  if (x.dimensions().size() != 2 || scales.dimensions().size() != 2) {
    return "matmul: x must be [M, K] and scales [groups, N], got " + shape_of(x.dimensions()) + " and " +
           shape_of(scales.dimensions());
  }
  args.problem.m = x.dimensions()[0];
  args.problem.k = x.dimensions()[1];
  args.problem.groups = scales.dimensions()[0];
  args.problem.n = scales.dimensions()[1];
  const Problem& p = args.problem;
  if (std::string e = p.error(); !e.empty()) return e;
  if (std::string e = read_weight("matmul", args, words, scales, zeros); !e.empty()) return e;
  for (const std::string& e :
       {operand_error("matmul", "x", x, {p.m, p.k}), operand_error("matmul", "y", y, {p.m, p.n})}) {
    if (!e.empty()) return e;
  }
  args.x = x.untyped_data();
  args.x_type = *float_type(x);
  args.y = y.untyped_data();
  args.y_type = *float_type(y);
  if (args.y_type != args.x_type && args.y_type != DType::kF32) {
    return std::string("matmul: y must be float32 or x's type, which is ") + name_of(args.x_type) +
           ", got " + name_of(args.y_type);
  }
  return "";
}

}  // namespace jax_trirun
