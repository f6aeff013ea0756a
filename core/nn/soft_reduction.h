// What takes the place of attention and merger in a forward pass while DiffRate's rates are searched: no token leaves
// the tensor, a mask says which of them still count. Who searches (train/rate_search.h) implements it.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>

namespace pyra::nn {

class SoftReduction {
 public:
  virtual ~SoftReduction();

  /// qkv [B,N,3C] of a block in the compute dtype, contiguous -> what attention gives, [B,N,C], in the same dtype.
  [[nodiscard]] virtual at::Tensor attend(int64_t block, const at::Tensor& qkv) = 0;
  /// x [B,N,C] fp32 after the block's attention -> the tokens that its MLP sees, as many.
  [[nodiscard]] virtual at::Tensor reduce(int64_t block, const at::Tensor& x) = 0;
  /// [B,N] fp32: 1 for a token that is still there, else 0; for pooling. Gradients flow through it.
  [[nodiscard]] virtual const at::Tensor& mask() const = 0;

 protected:
  SoftReduction() = default;
  SoftReduction(const SoftReduction&) = delete;
  SoftReduction& operator=(const SoftReduction&) = delete;
};

}  // namespace pyra::nn
