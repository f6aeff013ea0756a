// Dropout's random bits, 16 Philox blocks at a time.
#pragma once
#include "kernels/simd/simd.h"
#include "kernels/simd/vector_avx512.h"

namespace pyra::kernels::simd {
namespace {

/// High and low halves of the 32x32-bit products of 16 lanes.
PYRA_INLINE void multiply_wide(__m512i x, uint32_t factor, __m512i& high, __m512i& low) {
  const __m512i f = _mm512_set1_epi32(int(factor));
  const __m512i even = _mm512_mul_epu32(x, f);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), f);
  high = _mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
  low = _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
}

/// Philox 4x32-10 (base/philox.cpp) of 16 counters from `first` on: word i of each in x[i].
PYRA_INLINE void philox16(const PhiloxState& random, uint64_t first, __m512i (&x)[4]) {
  const __m512i step = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  x[0] = _mm512_add_epi32(_mm512_set1_epi32(int(uint32_t(first))), step);
  const __mmask16 carried = _mm512_cmplt_epu32_mask(x[0], step);
  x[1] = _mm512_set1_epi32(int(uint32_t(first >> 32)));
  x[1] = _mm512_mask_add_epi32(x[1], carried, x[1], _mm512_set1_epi32(1));
  x[2] = _mm512_set1_epi32(int(random.high[0]));
  x[3] = _mm512_set1_epi32(int(random.high[1]));
  uint32_t k0 = random.key[0], k1 = random.key[1];
  for (int round = 0; round < 10; ++round) {
    __m512i high0, low0, high1, low1;
    multiply_wide(x[0], 0xD2511F53, high0, low0);
    multiply_wide(x[2], 0xCD9E8D57, high1, low1);
    const __m512i y0 = _mm512_ternarylogic_epi32(high1, x[1], _mm512_set1_epi32(int(k0)), 0x96);
    const __m512i y2 = _mm512_ternarylogic_epi32(high0, x[3], _mm512_set1_epi32(int(k1)), 0x96);
    x[0] = y0, x[1] = low1, x[2] = y2, x[3] = low0;
    k0 += 0x9E3779B9, k1 += 0xBB67AE85;
  }
}

void dropout_bits(const PhiloxState& random, uint64_t first, int64_t blocks, uint32_t threshold, uint8_t* bits) {
  const __m512i limit = _mm512_set1_epi16(short(threshold));
  for (int64_t block = 0; block < blocks; block += 16) {
    __m512i x[4];
    philox16(random, first + uint64_t(block), x);
    // Word w of block b decides elements 8 b + 2 w and + 1: its two bits go to bits 2 w and 2 w + 1 of byte b.
    uint64_t bytes[2] = {0, 0};
#pragma GCC unroll 4
    for (int w = 0; w < 4; ++w) {
      const uint32_t kept = _mm512_cmpge_epu16_mask(x[w], limit);
      bytes[0] |= _pdep_u64(kept & 0xFFFF, 0x0303030303030303u << (2 * w));
      bytes[1] |= _pdep_u64(kept >> 16, 0x0303030303030303u << (2 * w));
    }
    const int64_t left = blocks - block < 16 ? blocks - block : 16;
    __builtin_memcpy(bits + block, bytes, size_t(left));
  }
}

}  // namespace
}  // namespace pyra::kernels::simd
