#include "kernels/rank.h"

#include <numeric>

#include "base/error.h"
#include "kernels/cosine.h"
#include "kernels/parallel.h"
#include "kernels/sort_key.h"

namespace pyra::kernels {
namespace {

void check(const at::Tensor& tokens, const at::Tensor& class_attention, int64_t prune, int64_t merge,
           int64_t protected_tokens) {
  if (!tokens.defined() || tokens.dim() != 3 || !class_attention.defined() ||
      class_attention.sizes() != tokens.sizes().slice(0, 2) || !tokens.is_cpu() || !class_attention.is_cpu()) {
    fail(ExitCode::internal, "rank: expected tokens [B,N,C] and class attention [B,N] on the CPU");
  }
  const bool ordered = 0 <= protected_tokens && protected_tokens <= merge && merge <= prune && prune <= tokens.size(1);
  if (!ordered || (merge == protected_tokens && prune > merge)) {
    fail(ExitCode::internal, "rank: prune ", prune, " and merge ", merge, " do not fit ", tokens.size(1), " tokens, ",
         protected_tokens, " of them protected");
  }
}

/// One thread's work space.
struct Scratch {
  CosineSearch search;
  std::vector<uint64_t> order;
  std::vector<int32_t> ranked;
  std::vector<Partner> partner;
};

void rank_image(const float* attention, int64_t tokens, int64_t protected_tokens, Scratch& scratch) {
  scratch.order.clear();
  for (int64_t i = protected_tokens; i < tokens; ++i) {
    scratch.order.push_back(sort_key(attention[i], uint32_t(i)));
  }
  std::sort(scratch.order.begin(), scratch.order.end());
  scratch.ranked.resize(size_t(tokens));
  std::iota(scratch.ranked.begin(), scratch.ranked.begin() + protected_tokens, 0);
  for (size_t i = 0; i < scratch.order.size(); ++i) {
    scratch.ranked[size_t(protected_tokens) + i] = int32_t(key_position(scratch.order[i]));
  }
}

}  // namespace

Ranking rank_tokens(const at::Tensor& tokens, const at::Tensor& class_attention, int64_t prune, int64_t merge,
                    int64_t protected_tokens) {
  check(tokens, class_attention, prune, merge, protected_tokens);
  const int64_t batch = tokens.size(0), count = tokens.size(1), width = tokens.size(2), tail = prune - merge;
  const at::Tensor x = tokens.to(at::kFloat).contiguous(), attention = class_attention.to(at::kFloat).contiguous();
  Ranking out{at::empty({batch, merge}, at::kLong), at::empty({batch, tail}, at::kLong),
              at::empty({batch, tail}, at::kLong), at::empty({batch, tail}, at::kFloat)};
  const float* from = x.const_data_ptr<float>();
  const float* scores = attention.const_data_ptr<float>();
  int64_t* keep = out.keep.data_ptr<int64_t>();
  int64_t* src = out.src.data_ptr<int64_t>();
  int64_t* dst = out.dst.data_ptr<int64_t>();
  float* cosine = out.cosine.data_ptr<float>();
  parallel_tasks(batch, [&](const auto& next) {
    Scratch scratch;
    scratch.partner.resize(size_t(tail));
    for (int64_t image = next(); image < batch; image = next()) {
      rank_image(scores + image * count, count, protected_tokens, scratch);
      const std::span<const int32_t> ranked(scratch.ranked);
      std::copy_n(ranked.begin(), merge, keep + image * merge);
      std::copy_n(ranked.begin() + merge, tail, src + image * tail);
      scratch.search.run(from + image * count * width, width, ranked.subspan(size_t(merge), size_t(tail)),
                         ranked.subspan(size_t(protected_tokens), size_t(merge - protected_tokens)), scratch.partner);
      for (int64_t i = 0; i < tail; ++i) {
        dst[image * tail + i] = protected_tokens + scratch.partner[size_t(i)].column;
        cosine[image * tail + i] = scratch.partner[size_t(i)].cosine;
      }
    }
  });
  return out;
}

Ranking rank_tokens_reference(const at::Tensor& tokens, const at::Tensor& class_attention, int64_t prune, int64_t merge,
                              int64_t protected_tokens) {
  check(tokens, class_attention, prune, merge, protected_tokens);
  const int64_t batch = tokens.size(0), count = tokens.size(1), width = tokens.size(2), tail = prune - merge;
  const at::Tensor others = class_attention.narrow(1, protected_tokens, count - protected_tokens);
  const at::Tensor first = at::arange(protected_tokens, at::kLong).expand({batch, -1});
  const at::Tensor ranked = at::cat({first, std::get<1>(others.sort(true, 1, true)) + protected_tokens}, 1);
  const at::Tensor keep = ranked.narrow(1, 0, merge), src = ranked.narrow(1, merge, tail);
  if (tail == 0) return {keep, src, at::empty({batch, 0}, at::kLong), at::empty({batch, 0}, at::kFloat)};
  const at::Tensor norm = tokens.norm(2, {-1}, true);
  const at::Tensor unit = at::where(norm > 0, tokens / norm, at::zeros_like(tokens));
  const auto pick = [&](const at::Tensor& index) {
    return unit.gather(1, index.unsqueeze(-1).expand({batch, index.size(1), width}));
  };
  const at::Tensor candidates = keep.narrow(1, protected_tokens, merge - protected_tokens);
  const auto [cosine, column] = at::matmul(pick(src), pick(candidates).transpose(1, 2)).sort(true, -1, true);
  return {keep, src, column.select(2, 0) + protected_tokens, cosine.select(2, 0)};
}

}  // namespace pyra::kernels
