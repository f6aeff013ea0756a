// Transposition of 32-bit elements into panels: keys [tokens, depth] -> [tokens/32][depth][32].
#pragma once
#include "kernels/simd/math_avx512.h"
#include "kernels/simd/simd.h"

namespace pyra::kernels::simd {
namespace {

/// Transposes the 16 x 16 elements of `r`.
PYRA_INLINE void transpose16(__m512i (&r)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  // r[4 i + j] holds, for its four rows, column j of each 128-bit lane; the lanes change places now.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    t[j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);
    t[4 + j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xDD);
    t[8 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
    t[12 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xDD);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    r[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
    r[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xDD);
    r[4 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0x88);
    r[12 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0xDD);
  }
}

/// source [rows, depth], rows `stride` bytes apart -> panels [ceil(rows/32)][depth][32], zeros beyond the rows.
inline void transpose_to_panels(const void* source, int64_t stride, int64_t rows, int64_t depth, uint32_t* panels) {
  const auto* bytes = static_cast<const unsigned char*>(source);
  for (int64_t row = 0; row < padded_tokens(rows); row += 16) {
    uint32_t* panel = panels + row / kPanel * depth * kPanel + row % kPanel;
    for (int64_t column = 0; column < depth; column += 16) {
      __m512i r[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const __mmask16 mask = row + i < rows ? lanes(column, depth) : __mmask16(0);
        r[i] = _mm512_maskz_loadu_epi32(mask, bytes + (row + i < rows ? (row + i) * stride + column * 4 : 0));
      }
      transpose16(r);
      const int64_t columns = depth - column < 16 ? depth - column : 16;
      for (int64_t j = 0; j < columns; ++j) _mm512_storeu_si512(panel + (column + j) * kPanel, r[j]);
    }
  }
}

}  // namespace
}  // namespace pyra::kernels::simd
