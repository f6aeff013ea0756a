// rows x candidates x width multiply-adds in registers: a tile of 4 rows by 32 candidates is summed over the whole
// width, then compared with the best so far, so the scores themselves never reach memory. Each score is summed over
// the width in order by one lane, which is why it does not depend on where in a tile it falls.
#include "kernels/cosine.h"

#include <cmath>
#include <limits>

#include "kernels/wide.h"

namespace pyra::kernels {
namespace {

constexpr int64_t kColumns = 2 * kWide;
constexpr float kNever = -std::numeric_limits<float>::infinity();

struct Problem {
  const float* tokens;
  int64_t width;
  std::span<const int32_t> rows;
  std::span<const int32_t> candidates;
  float* packed;
  const float* bias;
  Partner* out;
};

PYRA_INLINE float inverse_norm(const float* token, int64_t width) {
  const float square = dot(token, token, width);
  return square > 0 ? 1.0f / std::sqrt(square) : 0.0f;
}

PYRA_INLINE void pack(const Problem& p) {
  const int64_t count = int64_t(p.candidates.size());
  for (int64_t column = 0; column < count; ++column) {
    const float* token = p.tokens + p.candidates[size_t(column)] * p.width;
    const float scale = inverse_norm(token, p.width);
    float* to = p.packed + (column / kColumns) * kColumns * p.width + column % kColumns;
    for (int64_t d = 0; d < p.width; ++d) to[d * kColumns] = token[d] * scale;
  }
}

PYRA_INLINE void keep_better(Wide& best, WideInt& best_column, const Wide& score, int64_t first_column) {
  WideInt column;
  for (int32_t lane = 0; lane < kWide; ++lane) column[lane] = int32_t(first_column) + lane;
  const WideInt better = score > best;
  best = better ? score : best;
  best_column = better ? column : best_column;
}

PYRA_INLINE Partner best_lane(const Wide& best, const WideInt& column, float row_scale) {
  Partner partner{kNever, 0};
  for (int lane = 0; lane < kWide; ++lane) {
    const bool first = best[lane] == partner.cosine && column[lane] < partner.column;
    if (best[lane] > partner.cosine || first) partner = {best[lane], column[lane]};
  }
  if (partner.cosine != kNever) partner.cosine *= row_scale;
  return partner;
}

template <int kRows>
PYRA_INLINE void search(const Problem& p) {
  pack(p);
  const int64_t rows = int64_t(p.rows.size());
  const int64_t padded = (int64_t(p.candidates.size()) + kColumns - 1) / kColumns * kColumns;
  for (int64_t row = 0; row < rows; row += kRows) {
    const float* token[kRows];
    // The last tile repeats the last row instead of needing a kernel of its own.
    for (int64_t i = 0; i < kRows; ++i) token[i] = p.tokens + p.rows[size_t(std::min(row + i, rows - 1))] * p.width;
    Wide best[kRows];
    WideInt best_column[kRows] = {};
    for (int64_t i = 0; i < kRows; ++i) best[i] = Wide{} + kNever;
    for (int64_t column = 0; column < padded; column += kColumns) {
      Wide low[kRows], high[kRows];
      for (int64_t i = 0; i < kRows; ++i) {
        load(low[i], p.bias + column);
        load(high[i], p.bias + column + kWide);
      }
      const float* packed = p.packed + column * p.width;
      for (int64_t d = 0; d < p.width; ++d, packed += kColumns) {
        Wide left, right;
        load(left, packed);
        load(right, packed + kWide);
#pragma GCC unroll 8
        for (int64_t i = 0; i < kRows; ++i) {
          low[i] += token[i][d] * left;
          high[i] += token[i][d] * right;
        }
      }
      for (int64_t i = 0; i < kRows; ++i) {
        keep_better(best[i], best_column[i], low[i], column);
        keep_better(best[i], best_column[i], high[i], column + kWide);
      }
    }
    for (int64_t i = 0; i < std::min<int64_t>(kRows, rows - row); ++i) {
      p.out[row + i] = best_lane(best[i], best_column[i], inverse_norm(token[i], p.width));
    }
  }
}

}  // namespace

void CosineSearch::run(const float* tokens, int64_t width, std::span<const int32_t> rows,
                       std::span<const int32_t> candidates, std::span<Partner> out, Isa isa) {
  if (rows.empty()) return;
  const size_t padded = (candidates.size() + kColumns - 1) / kColumns * kColumns;
  packed_.resize(padded * size_t(width));
  bias_.assign(padded, 0.0f);
  std::fill(bias_.begin() + int64_t(candidates.size()), bias_.end(), kNever);
  const Problem problem{tokens, width, rows, candidates, packed_.data(), bias_.data(), out.data()};
  // Two accumulators a row: 8, 8 and 8 registers of the respective width.
  with_isa(isa, [&](auto tag) PYRA_INLINE_LAMBDA {
    search<tag() == Isa::avx512 ? 4 : tag() == Isa::avx2 ? 2 : 1>(problem);
  });
}

}  // namespace pyra::kernels
