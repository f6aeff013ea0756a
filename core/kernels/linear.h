// Linear layers of a ViT block: y = act(x Wᵀ + b + scale (drop(x) Aᵀ) Bᵀ), or residual + branch_scale * y.
//
// x [rows,in] fp32 or bf16 (the compute dtype), W [out,in] and b [out] fp32 masters. Bytes moved: x, y and W
// once; with `residual` the sum is written instead of y, so the branch never reaches memory on its own.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <optional>

namespace pyra::kernels {

enum class Activation {
  none,
  gelu,  ///< exact, erf
};

/// Dropout as a function of (seed, domain, element index): see base/philox.h. p = 0 means none.
struct Dropout {
  double p = 0.0;
  uint64_t seed = 0;
  uint64_t domain = 0;  ///< distinct for each step and site
};

/// The low-rank term of LoRA, fp32: a [rank,in], b [out,rank].
struct LowRankTerm {
  at::Tensor a, b;
  double scale = 1.0;
  Dropout dropout{};
};

struct LinearOptions {
  Activation activation = Activation::none;
  std::optional<LowRankTerm> low_rank{};
  at::Tensor residual{};  ///< [rows,out] fp32, or undefined. With it the result is fp32: residual + branch_scale * y
  at::Tensor branch_scale{};  ///< [images] fp32 or undefined: drop-path; rows are images * rows/images, image by image
};

/// A linear layer's weights with whatever layout this CPU's micro-kernel wants, made once per compute dtype
/// on first use (thread-safe) and thrown away by invalidate() after an optimiser step changed the masters.
/// Copies share masters and packed layouts, as copies of a tensor do.
class LinearWeights {
 public:
  /// `weight` [out,in] fp32; `bias` [out] fp32 or undefined. Either may require gradients; the packed layout of
  /// a weight that does (full fine-tuning) is made anew for each call and not kept.
  LinearWeights(at::Tensor weight, at::Tensor bias);

  [[nodiscard]] const at::Tensor& weight() const;
  [[nodiscard]] const at::Tensor& bias() const;
  void invalidate();

  struct Packed;  // kernels' own
  /// Packed for y = x Wᵀ (`transposed` false) or dx = dy W (true), in fp32 or bf16.
  [[nodiscard]] std::shared_ptr<const Packed> packed(at::ScalarType compute, bool transposed) const;

 private:
  struct State;
  std::shared_ptr<State> state_;
};

/// The layer on x [rows,in] (contiguous; fp32 or bf16) -> [rows,out] in x's dtype, or fp32 with a residual.
/// Differentiable in x, residual, bias, weight, low_rank.a and low_rank.b, whichever require gradients.
/// A row's result depends on that row alone, bit for bit, whatever the number of rows and threads.
/// Parallel over rows inside; serial when called from a parallel region.
[[nodiscard]] at::Tensor linear(const at::Tensor& x, const LinearWeights& layer, const LinearOptions& options = {});

/// The same by plain ATen operations, differentiable by ATen's autograd: the truth that tests compare with. In
/// fp32, or in fp64 when all tensors are; bf16 x: weights rounded to bf16, sums in fp32.
[[nodiscard]] at::Tensor linear_reference(const at::Tensor& x, const LinearWeights& layer,
                                          const LinearOptions& options = {});

/// Multiplies by a Bernoulli(1-p)/(1-p) mask; differentiable. p is taken to the nearest 1/65536, see
/// dropout_multipliers.
[[nodiscard]] at::Tensor dropout(const at::Tensor& x, const Dropout& options);

/// The mask that `options` gives `count` elements: 0 or 1/(1-p), fp32. One Philox block decides for eight elements,
/// 16 bits each: element e is kept if half-word e%8 (low half first) of block e/8 is >= p * 65536.
[[nodiscard]] at::Tensor dropout_multipliers(const Dropout& options, int64_t count);

/// Which micro-kernel this process uses: "avx512-bf16", "avx512", "avx2", "aten". For `doctor` and benchmark context.
[[nodiscard]] const char* cpu_micro_kernel();

}  // namespace pyra::kernels
