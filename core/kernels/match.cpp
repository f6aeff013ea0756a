#include "kernels/match.h"

#include "base/error.h"
#include "kernels/cosine.h"
#include "kernels/parallel.h"
#include "kernels/sort_key.h"

namespace pyra::kernels {
namespace {

/// The two sides of a call, the same for all its images. Protected tokens are listed apart.
struct Sides {
  std::vector<int32_t> kept_first;  // protected tokens
  std::vector<int32_t> a, b;        // the others, ascending
};

Sides split_sides(int64_t tokens, int64_t protected_tokens, std::span<const int64_t> side_a) {
  std::vector<bool> in_a(static_cast<size_t>(tokens));
  if (side_a.empty()) {
    for (int64_t i = 0; i < tokens; i += 2) in_a[size_t(i)] = true;
  }
  for (const int64_t token : side_a) {
    if (token < 0 || token >= tokens) fail(ExitCode::internal, "match: side A names token ", token, " of ", tokens);
    in_a[size_t(token)] = true;
  }
  Sides sides;
  for (int32_t i = 0; i < tokens; ++i) {
    (i < protected_tokens ? sides.kept_first : in_a[size_t(i)] ? sides.a : sides.b).push_back(i);
  }
  return sides;
}

void check(const at::Tensor& metric, int64_t r, const Sides& sides) {
  const int64_t most = sides.b.empty() ? 0 : int64_t(sides.a.size());
  if (r < 0 || r > most) {
    fail(ExitCode::internal, "match: r is ", r, "; expected 0 to ", most, " for ", metric.size(1), " tokens");
  }
}

void check_metric(const at::Tensor& metric) {
  if (!metric.defined() || metric.dim() != 3 || !metric.is_floating_point() || !metric.is_cpu()) {
    fail(ExitCode::internal, "match: the metric must be a floating-point tensor [B,N,D] on the CPU");
  }
}

/// One thread's work space.
struct Scratch {
  explicit Scratch(const Sides& sides) : partner(sides.a.size()), order(sides.a.size()), leaves(sides.a.size()) {}
  CosineSearch search;
  std::vector<Partner> partner;
  std::vector<uint64_t> order;
  std::vector<uint8_t> leaves;
};

void match_image(const float* metric, int64_t width, const Sides& sides, int64_t r, Scratch& scratch, int64_t* keep,
                 int64_t* src, int64_t* dst) {
  scratch.search.run(metric, width, sides.a, sides.b, scratch.partner);
  for (size_t i = 0; i < sides.a.size(); ++i) {
    scratch.order[i] = sort_key(scratch.partner[i].cosine, uint32_t(i));
    scratch.leaves[i] = 0;
  }
  std::partial_sort(scratch.order.begin(), scratch.order.begin() + r, scratch.order.end());
  const int64_t first_b = int64_t(sides.kept_first.size() + sides.a.size()) - r;
  for (int64_t i = 0; i < r; ++i) {
    const uint32_t position = key_position(scratch.order[size_t(i)]);
    scratch.leaves[position] = 1;
    src[i] = sides.a[position];
    dst[i] = first_b + scratch.partner[position].column;
  }
  keep = std::copy(sides.kept_first.begin(), sides.kept_first.end(), keep);
  for (size_t i = 0; i < sides.a.size(); ++i) {
    if (!scratch.leaves[i]) *keep++ = sides.a[i];
  }
  std::copy(sides.b.begin(), sides.b.end(), keep);
}

at::Tensor index_tensor(std::span<const int32_t> values) {
  auto tensor = at::empty({int64_t(values.size())}, at::kLong);
  std::copy(values.begin(), values.end(), tensor.data_ptr<int64_t>());
  return tensor;
}

}  // namespace

Matching match_bipartite(const at::Tensor& metric, int64_t r, int64_t protected_tokens,
                         std::span<const int64_t> side_a) {
  check_metric(metric);
  const int64_t batch = metric.size(0), tokens = metric.size(1), width = metric.size(2);
  const Sides sides = split_sides(tokens, protected_tokens, side_a);
  check(metric, r, sides);
  const at::Tensor input = metric.to(at::kFloat).contiguous();
  Matching out{at::empty({batch, tokens - r}, at::kLong), at::empty({batch, r}, at::kLong),
               at::empty({batch, r}, at::kLong)};
  const float* from = input.const_data_ptr<float>();
  int64_t* keep = out.keep.data_ptr<int64_t>();
  int64_t* src = out.src.data_ptr<int64_t>();
  int64_t* dst = out.dst.data_ptr<int64_t>();
  parallel_tasks(batch, [&](const auto& next) {
    Scratch scratch(sides);
    for (int64_t i = next(); i < batch; i = next()) {
      match_image(from + i * tokens * width, width, sides, r, scratch, keep + i * (tokens - r), src + i * r,
                  dst + i * r);
    }
  });
  return out;
}

Matching match_bipartite_reference(const at::Tensor& metric, int64_t r, int64_t protected_tokens,
                                   std::span<const int64_t> side_a) {
  check_metric(metric);
  const Sides sides = split_sides(metric.size(1), protected_tokens, side_a);
  check(metric, r, sides);
  const int64_t batch = metric.size(0);
  const at::Tensor a = index_tensor(sides.a), b = index_tensor(sides.b);
  const at::Tensor first = index_tensor(sides.kept_first).expand({batch, -1});
  const at::Tensor all_b = b.expand({batch, -1});
  if (r == 0) {
    const at::Tensor none = at::empty({batch, 0}, at::kLong);
    return {at::cat({first, a.expand({batch, -1}), all_b}, 1), none, none};
  }
  const at::Tensor norm = metric.norm(2, {-1}, true);
  const at::Tensor unit = at::where(norm > 0, metric / norm, at::zeros_like(metric));
  const at::Tensor scores = at::matmul(unit.index_select(1, a), unit.index_select(1, b).transpose(1, 2));
  const auto [sorted, column] = scores.sort(true, -1, true);
  const at::Tensor best = sorted.select(2, 0), partner = column.select(2, 0);
  const at::Tensor order = std::get<1>(best.sort(true, -1, true));
  const at::Tensor leaving = order.narrow(1, 0, r);
  const at::Tensor staying = std::get<0>(order.narrow(1, r, a.size(0) - r).sort(true, -1, false));
  return {at::cat({first, a.take(staying), all_b}, 1), a.take(leaving),
          partner.gather(1, leaving) + (protected_tokens + a.size(0) - r)};
}

}  // namespace pyra::kernels
