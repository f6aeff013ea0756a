// Transposition of 32-bit elements into panels: keys [tokens, depth] -> [tokens/kPanel][depth][kPanel].
#pragma once
#include "kernels/simd/simd.h"

namespace pyra::kernels::simd {
namespace {

/// source [rows, depth], rows `stride` bytes apart -> panels [ceil(rows/kPanel)][depth][kPanel], zeros beyond the rows.
inline void transpose_to_panels(const void* source, int64_t stride, int64_t rows, int64_t depth, float* panels) {
  const auto* bytes = static_cast<const unsigned char*>(source);
  const int64_t padded = (rows + kPanel - 1) / kPanel * kPanel;
  for (int64_t row = 0; row < padded; row += kLanes) {
    float* panel = panels + row / kPanel * depth * kPanel + row % kPanel;
    for (int64_t column = 0; column < depth; column += kLanes) {
      Vector r[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const bool exists = row + i < rows;
        const auto* from = reinterpret_cast<const float*>(bytes + (exists ? (row + i) * stride + column * 4 : 0));
        r[i] = load(from, exists ? lanes(column, depth) : Lanes(0));
      }
      transpose(r);
      const int64_t columns = depth - column < kLanes ? depth - column : kLanes;
      for (int64_t j = 0; j < columns; ++j) store(panel + (column + j) * kPanel, r[j]);
    }
  }
}

}  // namespace
}  // namespace pyra::kernels::simd
