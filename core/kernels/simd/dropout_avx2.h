// Dropout's random bits, 8 Philox blocks at a time.
#pragma once
#include "kernels/simd/simd.h"
#include "kernels/simd/vector_avx2.h"

namespace pyra::kernels::simd {
namespace {

/// High and low halves of the 32x32-bit products of 8 lanes.
PYRA_INLINE void multiply_wide(__m256i x, uint32_t factor, __m256i& high, __m256i& low) {
  const __m256i f = _mm256_set1_epi32(int(factor));
  const __m256i even = _mm256_mul_epu32(x, f);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), f);
  high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
  low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
}

/// Philox 4x32-10 (base/philox.cpp) of 8 counters from `first` on: word i of each in x[i].
PYRA_INLINE void philox8(const PhiloxState& random, uint64_t first, __m256i (&x)[4]) {
  uint32_t low[8], high[8];
  for (int i = 0; i < 8; ++i) low[i] = uint32_t(first + uint64_t(i)), high[i] = uint32_t((first + uint64_t(i)) >> 32);
  x[0] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(low));
  x[1] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(high));
  x[2] = _mm256_set1_epi32(int(random.high[0]));
  x[3] = _mm256_set1_epi32(int(random.high[1]));
  uint32_t k0 = random.key[0], k1 = random.key[1];
  for (int round = 0; round < 10; ++round) {
    __m256i high0, low0, high1, low1;
    multiply_wide(x[0], 0xD2511F53, high0, low0);
    multiply_wide(x[2], 0xCD9E8D57, high1, low1);
    const __m256i y0 = _mm256_xor_si256(_mm256_xor_si256(high1, x[1]), _mm256_set1_epi32(int(k0)));
    const __m256i y2 = _mm256_xor_si256(_mm256_xor_si256(high0, x[3]), _mm256_set1_epi32(int(k1)));
    x[0] = y0, x[1] = low1, x[2] = y2, x[3] = low0;
    k0 += 0x9E3779B9, k1 += 0xBB67AE85;
  }
}

void dropout_bits(const PhiloxState& random, uint64_t first, int64_t blocks, uint32_t threshold, uint8_t* bits) {
  const __m256i limit = _mm256_set1_epi16(short(threshold));
  for (int64_t block = 0; block < blocks; block += 8) {
    __m256i x[4];
    philox8(random, first + uint64_t(block), x);
    // Word w of block b decides elements 8 b + 2 w and + 1: its halves leave bits 2 w and 2 w + 1 in lane b.
    __m256i byte = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int w = 0; w < 4; ++w) {
      const __m256i kept = _mm256_cmpeq_epi16(_mm256_max_epu16(x[w], limit), x[w]);
      byte = _mm256_or_si256(byte, _mm256_and_si256(kept, _mm256_set1_epi32((1 << (2 * w)) | (2 << (2 * w + 16)))));
    }
    byte = _mm256_or_si256(_mm256_and_si256(byte, _mm256_set1_epi32(0xFF)), _mm256_srli_epi32(byte, 16));
    const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(byte), _mm256_extracti128_si256(byte, 1));
    const uint64_t bytes = uint64_t(_mm_cvtsi128_si64(_mm_packus_epi16(halves, halves)));
    const int64_t left = blocks - block < 8 ? blocks - block : 8;
    __builtin_memcpy(bits + block, &bytes, size_t(left));
  }
}

}  // namespace
}  // namespace pyra::kernels::simd
