// What a token merger returns: data, never control. The core checks it and applies it, forward and backward.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>

namespace pyra::sdk {

/// PYRA's rank-1 modulation of the merged-away tokens (arXiv 2403.09192). With S [R,C] the size-weighted src
/// tokens in the plan's order and D their size-weighted destinations:
///   P = LayerNorm(S + D; weight, bias, eps),  w1 = 2 sigmoid(aᵀP) [1,C],  w2 = 2 sigmoid(P bᵀ) - 1 [R,1],
///   S += (S * w1) * w2.
/// All four tensors are fp32 and may require gradients.
struct Gate {
  at::Tensor a;       ///< [R,1]
  at::Tensor b;       ///< [1,C]
  at::Tensor weight;  ///< [C]
  at::Tensor bias;    ///< [C]
  double eps = 1e-5;
};

enum class Reduce {
  weighted_mean,  ///< (sum of size * x) / (sum of size) over a kept token and the src tokens sent to it: ToMe
  mean,           ///< plain mean over a kept token and the src tokens sent to it: DiffRate
};

/// Where each token of a block goes. B images, N tokens in, K tokens out, R merged away; N - K - R are dropped.
///   out[k]  = reduce(x[keep[k]], x[src[i]] for every i with dst[i] == k)
///   size[k] = size[keep[k]] + sum of size[src[i]] * max(0, src_size_scale[i])
/// Sizes never shrink: proportional attention takes their logarithm, and DiffRate's factor is a cosine, which may be
/// negative.
/// Indices are int64; within an image `keep` and `src` together name no token twice. No gradient flows
/// through the choice. K and R depend on the schedule alone, never on the values.
struct MergePlan {
  at::Tensor keep;  ///< [B,K] token that stands at output position k; protected tokens first, in place
  at::Tensor src;   ///< [B,R] tokens merged away, in the merger's order (PYRA: by descending score)
  at::Tensor dst;   ///< [B,R] output position, in [0,K), that src[i] is added to
  Reduce reduce = Reduce::weighted_mean;
  std::optional<Gate> gate{};   ///< PYRA
  at::Tensor src_weight{};      ///< [B,R] fp32 or undefined: factor on a src token's weight in `reduce`; may
                                ///< require gradients, so a merger can learn how much a token counts
  at::Tensor src_size_scale{};  ///< [B,R] fp32 or undefined: factor on the size that is added; no gradient
};

}  // namespace pyra::sdk
