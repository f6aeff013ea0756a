// DiffRate's reduction where no token leaves (arXiv 2305.17997, section 3.2), on the device: tokens change places,
// those that merge are averaged into their destination and stay behind, masked out. The way back carries the gradient
// of the mask to the survival probabilities. What train/rate_masks.h does on the CPU.
#pragma once
#include "kernels/cuda/cuda_call.h"
#include "kernels/soft_counts.h"

namespace pyra::kernels::cuda {

/// What to rank tokens by: out [B,N] = mean over heads of class_rows [B,H,N], and -1 where mask [B,N] is less than a
/// half, so that a token that is gone ranks behind all others.
void ranking_attention(const float* class_rows, const float* mask, int batch, int heads, int tokens, float* out,
                       cudaStream_t stream);

struct SoftReduceCall {
  const float* x = nullptr;                       ///< [B,N,C] the stream
  const float *sizes = nullptr, *mask = nullptr;  ///< [B,N]
  const int32_t *keep = nullptr, *src = nullptr;  ///< [B,K], [B,N-K]: together a ranking of all tokens
  const int32_t* dst = nullptr;                   ///< [B,N-K] positions in keep; the first tail() are merged so
  const float* cosine = nullptr;                  ///< [B,N-K]
  SoftCounts counts{};                            ///< K = counts.kept
  int batch = 0, tokens = 0, channels = 0;
  float* x_out = nullptr;                           ///< [B,N,C], by rank; not x
  float *sizes_out = nullptr, *mask_out = nullptr;  ///< [B,N], by rank; not sizes or mask
};
/// A kept token becomes the plain mean of itself and those sent to it. Where tokens merge, sizes of present ones are
/// at least 1, sources' after their cosine. In fp32 in the order of ranks: bit-equal from run to run. channels: a
/// multiple of 8 up to 4096; N up to 1024. Indices must have been made by rank_tokens. Throws Error(usage) for others.
void soft_reduce(const SoftReduceCall& call, cudaStream_t stream);

struct SoftReduceBackwardCall {
  const int32_t *keep = nullptr, *src = nullptr, *dst = nullptr;  ///< as above
  SoftCounts counts{};
  int batch = 0, tokens = 0, channels = 0;
  const float* d_out = nullptr;  ///< [B,N,C] gradient of x_out
  float* d_x = nullptr;          ///< [B,N,C], written entirely; not d_out
  void* d_branch = nullptr;      ///< [B,N,C] of `compute` = d_x, rounded
  DType compute = DType::bf16;
};
void soft_reduce_backward(const SoftReduceBackwardCall& call, cudaStream_t stream);

struct SoftMaskBackwardCall {
  const float* mask = nullptr;                    ///< [B,N] before the reduction
  const int32_t *keep = nullptr, *src = nullptr;  ///< as above
  SoftCounts counts{};
  int batch = 0, tokens = 0, heads = 0;
  const float* d_mask_rows = nullptr;  ///< [B,H,N] what attention of the next block says of mask_out, or null: nothing
  const float* d_mask_out = nullptr;   ///< [B,N] what else says something of it
  float* d_ranks = nullptr;            ///< [B,N] work space: the sum of both
  float* d_mask = nullptr;             ///< [B,N], written entirely; not d_mask_out
  float *d_prune = nullptr, *d_merge = nullptr;  ///< [N] over ranks, summed over images: gradients of the survival
                                                 ///< probabilities; 0 where they mask nothing
};
/// Over images in their order: bit-equal from run to run.
void soft_mask_backward(const SoftMaskBackwardCall& call, cudaStream_t stream);

/// out [B,C] = sum of x mask / sum of mask over the tokens from `first` on: pooling of what is left. x [B,N,C].
void masked_mean(const float* x, const float* mask, int batch, int tokens, int first, int channels, float* out,
                 cudaStream_t stream);

struct MaskedMeanBackwardCall {
  const float *x = nullptr, *mask = nullptr, *mean = nullptr;  ///< as above; mean: what masked_mean() gave
  const float* d_mean = nullptr;                               ///< [B,C]
  int batch = 0, tokens = 0, first = 0, channels = 0;
  float* d_x = nullptr;     ///< [B,N,C], written entirely
  float* d_mask = nullptr;  ///< [B,N], written entirely
};
void masked_mean_backward(const MaskedMeanBackwardCall& call, cudaStream_t stream);

}  // namespace pyra::kernels::cuda
