// ToMe's matching on the device, straight from the block's keys. The contract is kernels/match.h's.
#pragma once
#include "kernels/cuda/cuda_call.h"

namespace pyra::kernels::cuda {

struct MatchCall {
  const void* qkv = nullptr;  ///< [B,N,3C] of `dtype`; the metric is the mean over heads of the keys, in fp32
  int batch = 0, tokens = 0, heads = 0, head_dim = 0;
  DType dtype = DType::bf16;
  int r = 0, protected_tokens = 1;
  /// Sides: alternating where null, else [N] bytes on the device, 1 for a token of side A (the same for all images).
  const uint8_t* in_side_a = nullptr;
  int32_t* keep = nullptr;  ///< [B,N-r] protected tokens, the rest of side A that stays, the rest of side B; ascending
  int32_t* src = nullptr;   ///< [B,r] by descending score
  int32_t* dst = nullptr;   ///< [B,r] position in `keep`
  /// Parameters that the merge behind will read, to be brought to L2 meanwhile; data null: none.
  struct Ahead {
    const float* data = nullptr;
    int count = 0;
  } ahead[4] = {};
  int* done = nullptr;        ///< a Tally's count or null: one more for every image whose plan is written
  bool qkv_is_there = false;  ///< for attention with a tally is in front in the stream: it need not be waited for
};

/// Cosines in fp32 (fused multiply-add over d in order, a zero vector's cosine is 0, one that is not finite is chosen
/// last); ties go to the lowest index on both sides. N up to 1024, D up to 128. An image's result depends on that image
/// alone, bit for bit. No allocation, no synchronisation.
void match_bipartite(const MatchCall& call, cudaStream_t stream);

/// The same metric for mergers of others: out [B,N,D] fp32 = mean over heads of the keys.
void key_mean(const void* qkv, DType dtype, int batch, int tokens, int heads, int head_dim, float* out,
              cudaStream_t stream);

}  // namespace pyra::kernels::cuda
