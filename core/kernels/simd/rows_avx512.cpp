// Row-wise work around the matrix products: LayerNorm, masks, conversions, sums over rows.
#include "kernels/simd/tile_avx512.h"

namespace pyra::kernels::simd {
namespace {

/// Mean and 1/deviation of a row, in two passes over a row that the first brought into the cache.
PYRA_INLINE void moments(const float* x, int64_t c, float eps, float& mean, float& rstd) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t j = 0; j < c; j += 16) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(lanes(j, c), x + j));
  mean = _mm512_reduce_add_ps(sum) / float(c);
  __m512 square = _mm512_setzero_ps();
  for (int64_t j = 0; j < c; j += 16) {
    const __mmask16 mask = lanes(j, c);
    const __m512 centred = _mm512_maskz_sub_ps(mask, _mm512_maskz_loadu_ps(mask, x + j), broadcast(mean));
    square = _mm512_fmadd_ps(centred, centred, square);
  }
  rstd = 1.0f / __builtin_sqrtf(_mm512_reduce_add_ps(square) / float(c) + eps);
}

PYRA_INLINE __m512 normalised(const float* x, __mmask16 mask, float mean, float rstd) {
  return _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, x), broadcast(mean)), broadcast(rstd));
}

/// sums [M, n] += tᵀ z for M of t's columns.
template <int M>
void add_outer_rows(const float* t, int64_t t_stride, const float* z, int64_t rows, int64_t n, float* sums) {
  int64_t j = 0;
  for (; j + kPanel <= n; j += kPanel) {
    __m512 sum[M][2];
    load_tile(sums + j, n, sum);
    multiply_add_transposed(t, t_stride, z + j, n, rows, sum);
    store_tile(sums + j, n, sum);
  }
  for (; j < n; j += 16) {
    const __mmask16 mask = lanes(j, n);
    for (int m = 0; m < M; ++m) {
      __m512 sum = _mm512_maskz_loadu_ps(mask, sums + m * n + j);
      for (int64_t i = 0; i < rows; ++i) {
        sum = _mm512_fmadd_ps(broadcast(t[i * t_stride + m]), _mm512_maskz_loadu_ps(mask, z + i * n + j), sum);
      }
      _mm512_mask_storeu_ps(sums + m * n + j, mask, sum);
    }
  }
}

struct OuterTile {
  const float *t, *z;
  int64_t rows, m, n;
  float* sums;
  template <int M>
  void run(int64_t first) const {
    add_outer_rows<M>(t + first, m, z, rows, n, sums + first * n);
  }
};

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

}  // namespace

void layer_norm_avx512(const LayerNormCall& call, int64_t rows) {
  const int64_t c = call.c;
  for (int64_t i = 0; i < rows; ++i) {
    const float* x = call.x + i * c;
    float mean, rstd;
    moments(x, c, call.eps, mean, rstd);
    for (int64_t j = 0; j < c; j += 16) {
      const __mmask16 mask = lanes(j, c);
      const __m512 y =
          _mm512_fmadd_ps(normalised(x + j, mask, mean, rstd), _mm512_maskz_loadu_ps(mask, call.weight + j),
                          _mm512_maskz_loadu_ps(mask, call.bias + j));
      store_any(call.y, call.y_bf16, i * c + j, mask, y);
    }
    if (call.mean) call.mean[i] = mean, call.rstd[i] = rstd;
  }
}

void layer_norm_backward_avx512(const LayerNormBackwardCall& call, int64_t rows) {
  const int64_t c = call.c;
  for (int64_t i = 0; i < rows; ++i) {
    const float* x = call.x + i * c;
    const float mean = call.mean[i], rstd = call.rstd[i];
    __m512 sum = _mm512_setzero_ps(), dot = _mm512_setzero_ps();
    for (int64_t j = 0; j < c; j += 16) {
      const __mmask16 mask = lanes(j, c);
      const __m512 dy = load_any(call.dy, call.dy_bf16, i * c + j, mask);
      const __m512 unit = normalised(x + j, mask, mean, rstd);
      const __m512 g = _mm512_mul_ps(dy, _mm512_maskz_loadu_ps(mask, call.weight + j));
      sum = _mm512_add_ps(sum, g);
      dot = _mm512_fmadd_ps(g, unit, dot);
      if (call.dweight) {
        const __m512 total = _mm512_maskz_loadu_ps(mask, call.dweight + j);
        _mm512_mask_storeu_ps(call.dweight + j, mask, _mm512_fmadd_ps(dy, unit, total));
      }
      if (call.dbias) {
        _mm512_mask_storeu_ps(call.dbias + j, mask, _mm512_add_ps(dy, _mm512_maskz_loadu_ps(mask, call.dbias + j)));
      }
    }
    if (!call.dx) continue;
    const __m512 mean_g = broadcast(_mm512_reduce_add_ps(sum) / float(c));
    const __m512 mean_dot = broadcast(_mm512_reduce_add_ps(dot) / float(c));
    for (int64_t j = 0; j < c; j += 16) {
      const __mmask16 mask = lanes(j, c);
      const __m512 unit = normalised(x + j, mask, mean, rstd);
      __m512 g =
          _mm512_mul_ps(load_any(call.dy, call.dy_bf16, i * c + j, mask), _mm512_maskz_loadu_ps(mask, call.weight + j));
      g = _mm512_fnmadd_ps(unit, mean_dot, _mm512_sub_ps(g, mean_g));
      _mm512_mask_storeu_ps(call.dx + i * c + j, mask, _mm512_mul_ps(g, broadcast(rstd)));
    }
  }
}

void widen_avx512(const uint16_t* x, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = lanes(i, count);
    _mm512_mask_storeu_ps(out + i, mask, load_any(x, true, i, mask));
  }
}

void narrow_avx512(const float* x, int64_t count, uint16_t* out) {
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = lanes(i, count);
    store_any(out, true, i, mask, _mm512_maskz_loadu_ps(mask, x + i));
  }
}

void scale_rows_avx512(const void* dy, bool dy_bf16, const float* slope, const float* row_scale, int64_t rows,
                       int64_t n, float* out) {
  for (int64_t i = 0; i < rows; ++i) {
    const __m512 scale = broadcast(row_scale ? row_scale[i] : 1.0f);
    for (int64_t j = 0; j < n; j += 16) {
      const __mmask16 mask = lanes(j, n);
      __m512 z = _mm512_mul_ps(load_any(dy, dy_bf16, i * n + j, mask), scale);
      if (slope) z = _mm512_mul_ps(z, _mm512_maskz_loadu_ps(mask, slope + i * n + j));
      _mm512_mask_storeu_ps(out + i * n + j, mask, z);
    }
  }
}

void add_outer_avx512(const float* t, const float* z, int64_t rows, int64_t m, int64_t n, float* sums) {
  for_row_tiles(m, OuterTile{t, z, rows, m, n, sums});
}

void add_columns_avx512(const float* z, int64_t rows, int64_t n, float* sums) {
  for (int64_t j = 0; j < n; j += 16) {
    const __mmask16 mask = lanes(j, n);
    __m512 sum = _mm512_maskz_loadu_ps(mask, sums + j);
    for (int64_t i = 0; i < rows; ++i) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, z + i * n + j));
    _mm512_mask_storeu_ps(sums + j, mask, sum);
  }
}

void dropout_bits_avx512(const PhiloxState& random, uint64_t first, int64_t blocks, uint32_t threshold, uint8_t* bits) {
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

void mask_avx512(const void* x, bool x_bf16, const uint8_t* bits, float scale, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = lanes(i, count);
    uint16_t keep = bits[i / 8];
    if (i + 8 < count) keep = uint16_t(keep | bits[i / 8 + 1] << 8);
    const __m512 value = load_any(x, x_bf16, i, mask);
    _mm512_mask_storeu_ps(out + i, mask, _mm512_maskz_mul_ps(__mmask16(keep), value, broadcast(scale)));
  }
}

}  // namespace pyra::kernels::simd
