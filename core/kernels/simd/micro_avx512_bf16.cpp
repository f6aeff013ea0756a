// The micro-kernels that multiply pairs of bf16, VDPBF16PS.
#include "kernels/simd/vector_avx512.h"
// The vector comes first: all else is written in it.
#include "kernels/simd/attention_tile.h"
#include "kernels/simd/gemm_tile.h"

namespace pyra::kernels::simd {
namespace {

/// v [tokens, head_dim] bf16 -> [ceil(tokens/2)][head_dim] pairs of neighbouring tokens, zero beyond the last.
void pair_values(const uint16_t* v, int64_t stride, int64_t tokens, int64_t head_dim, uint32_t* pairs) {
  for (int64_t token = 0; token < tokens; token += 2) {
    const uint16_t* row = v + token * stride;
    const bool last = token + 1 == tokens;
    for (int64_t d = 0; d < head_dim; d += 16) {
      const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + d)));
      const __m512i high =
          last ? _mm512_setzero_si512()
               : _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + stride + d)));
      _mm512_storeu_si512(pairs + token / 2 * head_dim + d, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
}

}  // namespace

void gemm_avx512_bf16(const GemmCall& call, int64_t rows) {
  gemm<uint16_t, uint32_t>(call, rows);
}

void attention_avx512_bf16(const AttentionCall& call) {
  const int64_t padded = padded_tokens(call.tokens);
  auto* keys = reinterpret_cast<uint32_t*>(call.scratch);
  uint32_t* values = keys + padded * call.head_dim / 2;
  auto* logits = reinterpret_cast<float*>(call.scratch) + 2 * padded * call.head_dim;
  auto* probabilities = reinterpret_cast<uint16_t*>(logits + kTileRows * padded);
  transpose_to_panels(call.k, call.stride * 2, call.tokens, call.head_dim / 2, reinterpret_cast<float*>(keys));
  pair_values(static_cast<const uint16_t*>(call.v), call.stride, call.tokens, call.head_dim, values);
  for_row_tiles(call.tokens,
                QueryTile<uint16_t, uint32_t>{call, keys, values, call.head_dim, logits, probabilities, padded});
}

}  // namespace pyra::kernels::simd
