// Named tensors in tests: copies that later steps leave alone, and comparison bit for bit.
#pragma once
#include "catch.h"
#include "sdk/tensor_decl.h"

namespace pyra::test {

[[nodiscard]] inline sdk::TensorMap copies(const sdk::TensorMap& tensors) {
  sdk::TensorMap out;
  for (const auto& [name, tensor] : tensors) out.emplace(name, tensor.clone());
  return out;
}

inline void check_equal(const sdk::TensorMap& a, const sdk::TensorMap& b) {
  REQUIRE(a.size() == b.size());
  for (const auto& [name, tensor] : a) {
    CAPTURE(name);
    CHECK(at::equal(tensor, b.at(name)));
  }
}

}  // namespace pyra::test
