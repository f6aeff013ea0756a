#include "tasks/token_groups.h"

#include <numeric>

#include "tasks/plan_recorder.h"

namespace pyra::tasks {
namespace {

/// Where each token that enters a block goes, for one image of the plan.
std::vector<int64_t> places_after(const sdk::MergePlan& plan, int64_t image, int64_t tokens) {
  std::vector<int64_t> places(size_t(tokens), kDropped);
  const auto row = [&](const at::Tensor& indices) { return indices.select(0, image).contiguous(); };
  const at::Tensor keep = row(plan.keep), src = row(plan.src), dst = row(plan.dst);
  // The forward pass has checked every index.
  const int64_t* kept = keep.const_data_ptr<int64_t>();
  for (int64_t k = 0; k < keep.size(0); ++k) places[size_t(kept[k])] = k;
  const int64_t *from = src.const_data_ptr<int64_t>(), *to = dst.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < src.size(0); ++i) places[size_t(from[i])] = to[i];
  return places;
}

std::vector<TokenGroups> follow(const Plans& plans, int64_t image, const nn::VitConfig& config) {
  std::vector<int64_t> token_of(size_t(config.patches()));
  std::iota(token_of.begin(), token_of.end(), config.protected_tokens());
  int64_t tokens = config.tokens();
  std::vector<TokenGroups> blocks;
  for (const auto& [block, plan] : plans) {
    const std::vector<int64_t> places = places_after(plan, image, tokens);
    for (int64_t& token : token_of) token = token == kDropped ? kDropped : places[size_t(token)];
    tokens = plan.keep.size(1);
    blocks.push_back({.block = block, .tokens = tokens, .token_of = token_of});
  }
  return blocks;
}

}  // namespace

TokenTrace trace_tokens(const nn::Vit& model, const at::Tensor& images) {
  Plans plans;
  TokenTrace trace{.logits = observed(model, plans).forward(images), .images = {}};
  for (int64_t image = 0; image < images.size(0); ++image) trace.images.push_back(follow(plans, image, model.config()));
  return trace;
}

}  // namespace pyra::tasks
