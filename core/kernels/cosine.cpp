// rows x candidates x width multiply-adds in registers: a tile of 1 to 4 rows by 32 candidates is summed over the whole
// width, then compared with the best so far, so the scores themselves never reach memory. Each score is summed over
// the width in order by one lane, which is why it does not depend on where in a tile it falls.
#include "kernels/cosine.h"

#include <cmath>
#include <limits>

#include "kernels/wide.h"

namespace pyra::kernels {
namespace {

constexpr int64_t kColumns = 32;
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

/// A register of each instruction set. Wide serves where little is computed: what GCC 12 makes of arrays of it for AVX2
/// keeps every sum in memory, and the search then took about a fifth of a merged model's time.
struct Sse {
  static constexpr int64_t kLanes = 4;
  using Floats = float __attribute__((vector_size(16)));
  using Columns = int32_t __attribute__((vector_size(16)));
};
struct Avx2 {
  static constexpr int64_t kLanes = 8;
  using Floats = float __attribute__((vector_size(32)));
  using Columns = int32_t __attribute__((vector_size(32)));
};
struct Avx512 {
  static constexpr int64_t kLanes = 16;
  using Floats = float __attribute__((vector_size(64)));
  using Columns = int32_t __attribute__((vector_size(64)));
};

template <class R>
PYRA_INLINE void keep_better(typename R::Floats& best, typename R::Columns& best_column,
                             const typename R::Floats& score, int64_t first_column) {
  typename R::Columns column;
  for (int32_t lane = 0; lane < R::kLanes; ++lane) column[lane] = int32_t(first_column) + lane;
  const typename R::Columns better = score > best;
  best = better ? score : best;
  best_column = better ? column : best_column;
}

template <class R>
PYRA_INLINE Partner best_lane(const typename R::Floats& best, const typename R::Columns& column, float row_scale) {
  Partner partner{kNever, 0};
  for (int lane = 0; lane < R::kLanes; ++lane) {
    const bool first = best[lane] == partner.cosine && column[lane] < partner.column;
    if (best[lane] > partner.cosine || first) partner = {best[lane], column[lane]};
  }
  if (partner.cosine != kNever) partner.cosine *= row_scale;
  return partner;
}

/// kRows x kColumns scores at a time, in registers of type R.
template <int kRows, class R>
PYRA_INLINE void search(const Problem& p) {
  using Floats = typename R::Floats;
  constexpr int64_t kLanes = R::kLanes;
  constexpr int64_t kParts = kColumns / kLanes;
  pack(p);
  const int64_t rows = int64_t(p.rows.size());
  const int64_t padded = (int64_t(p.candidates.size()) + kColumns - 1) / kColumns * kColumns;
  for (int64_t row = 0; row < rows; row += kRows) {
    const float* token[kRows];
    // The last tile repeats the last row instead of needing a kernel of its own.
    for (int64_t i = 0; i < kRows; ++i) token[i] = p.tokens + p.rows[size_t(std::min(row + i, rows - 1))] * p.width;
    Floats best[kRows];
    typename R::Columns best_column[kRows] = {};
    for (int64_t i = 0; i < kRows; ++i) best[i] = Floats{} + kNever;
    for (int64_t column = 0; column < padded; column += kColumns) {
      Floats score[kRows][kParts];
#pragma GCC unroll 8
      for (int64_t part = 0; part < kParts; ++part) {
        Floats bias;
        std::memcpy(&bias, p.bias + column + part * kLanes, sizeof bias);
#pragma GCC unroll 8
        for (int64_t i = 0; i < kRows; ++i) score[i][part] = bias;
      }
      const float* packed = p.packed + column * p.width;
      for (int64_t d = 0; d < p.width; ++d, packed += kColumns) {
#pragma GCC unroll 8
        for (int64_t part = 0; part < kParts; ++part) {
          Floats value;
          std::memcpy(&value, packed + part * kLanes, sizeof value);
#pragma GCC unroll 8
          for (int64_t i = 0; i < kRows; ++i) score[i][part] += token[i][d] * value;
        }
      }
#pragma GCC unroll 8
      for (int64_t i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
        for (int64_t part = 0; part < kParts; ++part) {
          keep_better<R>(best[i], best_column[i], score[i][part], column + part * kLanes);
        }
      }
    }
    for (int64_t i = 0; i < std::min<int64_t>(kRows, rows - row); ++i) {
      p.out[row + i] = best_lane<R>(best[i], best_column[i], inverse_norm(token[i], p.width));
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
  // Eight accumulators: 4 x 2 registers of AVX-512, 2 x 4 of AVX2, 1 x 8 of SSE2.
  with_isa(isa, [&](auto tag) PYRA_INLINE_LAMBDA {
    if constexpr (tag() == Isa::avx512) {
      search<4, Avx512>(problem);
    } else if constexpr (tag() == Isa::avx2) {
      search<2, Avx2>(problem);
    } else {
      search<1, Sse>(problem);
    }
  });
}

}  // namespace pyra::kernels
