#include "base/error.h"
#include "sdk/bipartite.h"
#include "sdk/peft_method.h"
#include "sdk/token_merger.h"
#include "support.h"

using namespace pyra;
using sdk::ModelShape;
using sdk::Schedule;

namespace {

ModelShape shape_of(int64_t depth, int64_t tokens, int64_t protected_tokens = 1) {
  return {.depth = depth,
          .embed_dim = 8,
          .num_heads = 1,
          .mlp_dim = 32,
          .tokens = tokens,
          .protected_tokens = protected_tokens,
          .num_classes = 2};
}

Schedule removing(std::vector<int64_t> remove) {
  return {.text = "test", .remove = std::move(remove), .prune = {}, .merge = {}};
}

/// A merger that leaves everything to the defaults.
class Plain final : public sdk::TokenMerger {
 public:
  [[nodiscard]] sdk::MergePlan plan(const sdk::MergeInputs&, const Schedule&) const override { return {}; }
};

class NoPeft final : public sdk::PeftMethod {
 public:
  [[nodiscard]] bool mergeable() const override { return false; }
};

}  // namespace

TEST_CASE("r is cut to half of what may leave", "[schedule]") {
  CHECK(sdk::cut_to_half(removing({40, 34, 30}), shape_of(3, 197)).remove == std::vector<int64_t>{40, 34, 30});
  // 9 tokens, one protected: 4 leave; then 5: 2; then 3: 1; then 2: none.
  CHECK(sdk::cut_to_half(removing({9, 9, 9, 9}), shape_of(4, 9)).remove == std::vector<int64_t>{4, 2, 1, 0});
  CHECK(sdk::cut_to_half(removing({9, 9, 0, 9}), shape_of(4, 9, 2)).remove == std::vector<int64_t>{3, 2, 0, 1});
  CHECK(sdk::cut_to_half(removing({5}), shape_of(1, 1)).remove == std::vector<int64_t>{0});
}

TEST_CASE("a schedule that does not fit the model is an error of usage", "[schedule]") {
  const auto message = [](const Schedule& schedule) {
    try {
      (void)sdk::cut_to_half(schedule, shape_of(3, 197));
    } catch (const Error& error) {
      CHECK(error.code() == ExitCode::usage);
      return std::string(error.what());
    }
    return std::string("accepted");
  };
  CHECK_THAT(message(removing({1, 2})), Catch::Contains("has 2 entries; the model has 3 blocks"));
  CHECK_THAT(message(removing({1, -2, 3})), Catch::Contains("block 1 removes -2"));
  CHECK_THAT(message({.text = "f.toml", .remove = {}, .prune = {9, 9, 9}, .merge = {9, 9, 9}}),
             Catch::Contains("'f.toml' gives kept counts"));
}

TEST_CASE("the defaults of a merger remove what the schedule says", "[schedule]") {
  const Plain merger;
  const auto shape = shape_of(3, 20);
  const Schedule resolved = merger.resolve(removing({4, 0, 100}), shape);
  CHECK(merger.tokens_after(resolved, shape) == std::vector<int64_t>{16, 16, 9});
  CHECK(merger.declare(shape, resolved).empty());
  CHECK_FALSE(merger.needs().key_mean);
  CHECK(merger.conserves_size());
}

TEST_CASE("linear layers have timm's names", "[peft]") {
  const auto name = [](sdk::LinearKind kind) { return sdk::LinearSite{.block = 3, .kind = kind}.name(); };
  CHECK(name(sdk::LinearKind::qkv) == "blocks.3.attn.qkv");
  CHECK(name(sdk::LinearKind::proj) == "blocks.3.attn.proj");
  CHECK(name(sdk::LinearKind::fc1) == "blocks.3.mlp.fc1");
  CHECK(name(sdk::LinearKind::fc2) == "blocks.3.mlp.fc2");
}

TEST_CASE("the defaults of a PEFT method add nothing", "[peft]") {
  const NoPeft method;
  const sdk::LinearSite site{.block = 0, .kind = sdk::LinearKind::qkv, .in = 4, .out = 12};
  CHECK(method.declare(shape_of(1, 5)).empty());
  CHECK_FALSE(method.trains("head.bias"));
  CHECK_FALSE(method.low_rank(site, {}).has_value());
  CHECK_FALSE(method.delta(site, {}).weight.defined());
  CHECK_FALSE(method.delta(site, {}).bias.defined());
  CHECK(method.adapter_config(shape_of(1, 5)) == "{}");
  CHECK_THROWS_AS(method.adapt(site, {}, {}, {}), Error);
}

TEST_CASE("a random partition is one of its seed and keeps protected tokens", "[bipartite]") {
  auto generator = at::detail::createCPUGenerator(1);
  const auto metric = at::randn({2, 24, 8}, generator, at::TensorOptions());
  const auto plan = [&](uint64_t seed) { return sdk::bipartite_plan(metric, 11, 2, {.random = true, .seed = seed}); };
  const auto first = plan(5), again = plan(5), other = plan(6);
  CHECK(at::equal(first.src, again.src));
  CHECK_FALSE(at::equal(first.keep, other.keep));
  CHECK(at::equal(first.keep.narrow(1, 0, 2), at::arange(2, at::kLong).expand({2, 2})));
  CHECK(first.keep.size(1) == 13);
  // r of 11 takes all of side A, so the sides themselves show: they are not those of the alternating split.
  CHECK(first.src.remainder(2).sum().item<int64_t>() > 0);
}
