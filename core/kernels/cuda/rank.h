// DiffRate's ranking on the device. The contract is kernels/rank.h's.
#pragma once
#include "kernels/cuda/cuda_call.h"

namespace pyra::kernels::cuda {

struct RankCall {
  const void* tokens = nullptr;       ///< [B,N,C] of `dtype`, the residual stream
  const float* class_rows = nullptr;  ///< [B,H,N]: what attention() wrote; the ranking takes the mean over heads
  int batch = 0, token_count = 0, heads = 0, channels = 0;
  DType dtype = DType::fp32;
  int prune = 0, merge = 0, protected_tokens = 1;  ///< K = merge, R = prune - merge
  int32_t* keep = nullptr;                         ///< [B,K] protected tokens, then by descending attention
  int32_t* src = nullptr;                          ///< [B,R] the next ones
  int32_t* dst = nullptr;                          ///< [B,R] position in keep, never a protected one
  float* cosine = nullptr;                         ///< [B,R]
};

/// Ties: lowest index; attention that is not a number ranks last; a cosine with a token of zeros is 0; one that is not
/// a number never wins. Cosines in fp32. N up to 1024. An image's result depends on that image alone, bit for bit. No
/// allocation, no synchronisation.
void rank_tokens(const RankCall& call, cudaStream_t stream);

/// out [B,N] = mean over heads of class_rows, for mergers of others.
void class_attention_mean(const float* class_rows, int batch, int heads, int tokens, float* out, cudaStream_t stream);

}  // namespace pyra::kernels::cuda
