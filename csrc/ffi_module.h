// How both back ends' modules hand FFI handlers to Python.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>

#include <utility>

#include "xla/ffi/api/ffi.h"

namespace jax_trirun {

// What jax.ffi.register_ffi_target takes.
template <typename Handler>
nanobind::capsule capsule(Handler* handler) {
  return nanobind::capsule(reinterpret_cast<void*>(handler), "xla._CUSTOM_CALL_TARGET");
}

inline void def_ffi_api_version(nanobind::module_& m) {
  m.def(
      "ffi_api_version", [] { return std::make_pair(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); },
      "(major, minor) of the XLA FFI headers that this module was built with.");
}

}  // namespace jax_trirun
