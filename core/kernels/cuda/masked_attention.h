// Attention under a soft mask over keys, through which DiffRate's search trains (arXiv 2305.17997), and its gradient,
// on the device. The formulas are kernels/masked_attention.h's, whose contract this is.
#pragma once
#include "kernels/cuda/cuda_call.h"

namespace pyra::kernels::cuda {

struct MaskedAttentionCall {
  const void* qkv = nullptr;     ///< [B,N,3C] of `dtype`: q, k, v side by side, each H heads of D; 16-byte aligned
  const float* sizes = nullptr;  ///< [B,N], positive, or null: log(size) of a key is added to its logits
  const float* mask = nullptr;   ///< [B,N] of keys; a token sees itself whatever its mask
  void* out = nullptr;           ///< [B,N,C] of `dtype`, heads side by side; 16-byte aligned
  float* class_rows = nullptr;   ///< [B,H,N] the class row's (query 0's) probabilities, head by head
  // What the way back needs: of each query [B,H,N], of the values [B,C].
  float* top = nullptr;         ///< its largest logit, to powers of two
  float* inverse = nullptr;     ///< 1 / (sum of e + eps)
  int32_t* peak = nullptr;      ///< the key that has the largest logit, the first of equals
  float* value_mean = nullptr;  ///< mean over all tokens of v
  int batch = 0, tokens = 0, heads = 0, head_dim = 0;
  DType dtype = DType::bf16;  ///< of what is read and written; every product and sum is in fp32
};

/// head_dim: a multiple of 16 from 16 to 128; tokens up to 1024. An image's result is bit-equal from run to run and
/// whoever its companions are. No allocation, no synchronisation. Throws Error(device) where the launch fails,
/// Error(usage) for shapes outside these.
void masked_attention(const MaskedAttentionCall& call, cudaStream_t stream);

struct MaskedAttentionBackwardCall {
  // What masked_attention() was given and gave, see there.
  const void* qkv = nullptr;
  const float *sizes = nullptr, *mask = nullptr;
  const void* out = nullptr;
  const float *top = nullptr, *inverse = nullptr;
  const int32_t* peak = nullptr;
  const float* value_mean = nullptr;

  const void* d_out = nullptr;   ///< [B,N,C] of `dtype`, the gradient of out; 16-byte aligned
  float* delta = nullptr;        ///< [B,H,N] work space: rowsum(dO ∘ out)
  float* correction = nullptr;   ///< [B,H,N] work space: what the largest logit gives back
  void* d_qkv = nullptr;         ///< [B,N,3C] of `dtype`, written entirely; 16-byte aligned, overlaps nothing above
  float* d_mask_rows = nullptr;  ///< [B,H,N] the gradient of mask, head by head: whoever reads it adds the heads up
  int batch = 0, tokens = 0, heads = 0, head_dim = 0;
  DType dtype = DType::bf16;
};

/// With e before the mask ē, Z = sum of e + eps, dP = dO vᵀ and shared = ē ∘ (dP - rowsum(dO ∘ out)) / Z:
/// d_mask_j = sum over i ≠ j of shared_ij; dS = shared ∘ mask (1 where i = j), less in the row's largest logit its sum,
/// which is eps (rowsum(dO ∘ out) - dO mean(v)) / Z; dQ = dS K / sqrt(D), dK = dSᵀ Q / sqrt(D), dV = Pᵀ dO.
/// Shapes, order of sums and errors as above.
void masked_attention_backward(const MaskedAttentionBackwardCall& call, cudaStream_t stream);

}  // namespace pyra::kernels::cuda
