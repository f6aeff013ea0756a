#include "nn/vit.h"

#include "base/error.h"
#include "engine/cpu_engine.h"
#include "io/io_support.h"
#include "support.h"

using namespace pyra;
using namespace pyra::nn;

namespace {

VitConfig small_config() {
  return {.arch = "test",
          .image_size = 24,
          .patch_size = 4,
          .embed_dim = 32,
          .depth = 3,
          .num_heads = 2,
          .mlp_dim = 64,
          .num_classes = 7};
}

at::Tensor images(const VitConfig& config, int64_t count) {
  return make_tensor(
      {.name = "images", .shape = {count, 3, config.image_size, config.image_size}, .init = sdk::Init::gaussian}, 3);
}

/// Merges each of the last r tokens into the one r before it; `spoil` may break the plan.
class MergeLast final : public sdk::TokenMerger {
 public:
  std::function<void(sdk::MergePlan&)> spoil = [](sdk::MergePlan&) {};
  [[nodiscard]] sdk::MergePlan plan(const sdk::MergeInputs& in, const sdk::Schedule& schedule) const override {
    const int64_t batch = in.tokens.size(0), tokens = in.tokens.size(1), r = schedule.remove[size_t(in.block)];
    const auto range = [&](int64_t from, int64_t to) {
      return at::arange(from, to, at::kLong).expand({batch, to - from}).contiguous();
    };
    sdk::MergePlan plan{
        .keep = range(0, tokens - r), .src = range(tokens - r, tokens), .dst = range(tokens - 2 * r, tokens - r)};
    spoil(plan);
    return plan;
  }
};

std::unique_ptr<MergeSetup> merge_last(const VitConfig& config, std::vector<int64_t> remove,
                                       const std::shared_ptr<MergeLast>& merger = std::make_shared<MergeLast>()) {
  auto setup = std::make_unique<MergeSetup>();
  setup->name = "last";
  setup->merger = merger;
  sdk::Schedule schedule;
  schedule.remove = std::move(remove);
  setup->schedule = merger->resolve(schedule, config.shape());
  return setup;
}

}  // namespace

TEST_CASE("a model names the first weight that is missing, unknown or misshapen", "[nn]") {
  const VitConfig config = small_config();
  const auto message = [&](const std::function<void(TensorMap&)>& change) {
    TensorMap weights = random_weights(config, 1);
    change(weights);
    return test::message_of([&] { Vit vit(config, weights); }, ExitCode::input);
  };
  CHECK(message([](TensorMap& w) { w.erase("blocks.1.norm2.bias"); }).find("blocks.1.norm2.bias is missing") !=
        std::string::npos);
  CHECK(message([](TensorMap& w) { w["blocks.0.ls1.gamma"] = at::ones({32}); }).find("blocks.0.ls1.gamma") !=
        std::string::npos);
  CHECK(message([](TensorMap& w) {
          w["head.weight"] = at::ones({7, 31});
        }).find("head.weight is [7, 31], expected [7, 32]") != std::string::npos);
}

TEST_CASE("an image's logits do not depend on its batch mates, bit for bit", "[nn]") {
  const VitConfig config = small_config();
  Vit vit(config, random_weights(config, 1));
  if (GENERATE(false, true)) vit.set_merge(merge_last(config, {5, 4, 3}));
  engine::CpuEngine engine(vit, at::kFloat);
  const at::Tensor batch = images(config, 9);
  const at::Tensor together = engine.run(batch);
  for (int64_t i = 0; i < 9; ++i) {
    CAPTURE(i);
    CHECK(at::equal(engine.run(batch.narrow(0, i, 1)), together.narrow(0, i, 1)));
  }
  CHECK(at::equal(engine.run(batch.flip(0)), together.flip(0)));
}

TEST_CASE("merging leaves the tokens that the schedule says, and their sizes sum to N", "[nn]") {
  const VitConfig config = small_config();
  Vit vit(config, random_weights(config, 1));
  vit.set_merge(merge_last(config, {5, 0, 100}));
  CHECK(vit.tokens_after() == std::vector<int64_t>{32, 32, 17});
  size_t blocks = 0;
  const at::NoGradGuard no_grad;
  (void)vit.forward(images(config, 2), {.trace = [&](int64_t i, const at::Tensor& tokens, const at::Tensor& sizes) {
                      CHECK(tokens.size(1) == vit.tokens_after()[size_t(i)]);
                      CHECK(sizes.sum(1).allclose(at::full({2}, double(config.tokens()))));
                      ++blocks;
                    }});
  CHECK(blocks == 3);
}

TEST_CASE("a merger that breaks its contract is named with block and index", "[nn]") {
  const VitConfig config = small_config();
  Vit vit(config, random_weights(config, 1));
  const auto merger = std::make_shared<MergeLast>();
  vit.set_merge(merge_last(config, {0, 5, 0}, merger));
  const auto message = [&](std::function<void(sdk::MergePlan&)> spoil) {
    merger->spoil = std::move(spoil);
    const at::NoGradGuard no_grad;
    const std::string text = test::message_of([&] { (void)vit.forward(images(config, 2)); }, ExitCode::plugin);
    CHECK(text.find("merger 'last', block 1") != std::string::npos);
    return text;
  };
  CHECK(message([](sdk::MergePlan& plan) { plan.src[1][2].fill_(37); }).find("37") != std::string::npos);
  CHECK(message([](sdk::MergePlan& plan) { plan.src[1][2].fill_(-1); }).find("-1") != std::string::npos);
  CHECK_FALSE(message([](sdk::MergePlan& plan) { plan.src[0][1].copy_(plan.src[0][0]); }).empty());
  CHECK_FALSE(message([](sdk::MergePlan& plan) { plan.keep = plan.keep.narrow(1, 0, 30); }).empty());
  CHECK_FALSE(message([](sdk::MergePlan& plan) { plan.dst[0][0].fill_(32); }).empty());
  CHECK_FALSE(message([](sdk::MergePlan& plan) { plan.keep = plan.keep.flip(1); }).empty());
  CHECK(message([](sdk::MergePlan&) { throw std::runtime_error("out of ideas"); }).find("out of ideas") !=
        std::string::npos);
}

TEST_CASE("only the head trains where no one asks for more, and drop-path is a function of seed and step", "[nn]") {
  const VitConfig config = small_config();
  Vit vit(config, random_weights(config, 1));
  const TensorMap trained = vit.train_mode();
  REQUIRE(trained.size() == 2);
  CHECK(trained.contains("head.weight"));
  const at::Tensor input = images(config, 6);
  const auto run = [&](uint64_t seed, uint64_t step, double drop) {
    return vit.forward(input, {.training = true, .drop_path = drop, .random = {.seed = seed, .step = step}}).detach();
  };
  CHECK(at::equal(run(1, 5, 0.5), run(1, 5, 0.5)));
  CHECK_FALSE(at::equal(run(1, 5, 0.5), run(1, 6, 0.5)));
  CHECK_FALSE(at::equal(run(1, 5, 0.5), run(2, 5, 0.5)));
  CHECK(at::equal(run(1, 5, 0.0), run(2, 6, 0.0)));
}

TEST_CASE("weights are a function of seed and name", "[nn]") {
  const VitConfig config = small_config();
  const TensorMap one = random_weights(config, 1), same = random_weights(config, 1), other = random_weights(config, 2);
  CHECK(at::equal(one.at("blocks.0.attn.qkv.weight"), same.at("blocks.0.attn.qkv.weight")));
  CHECK_FALSE(at::equal(one.at("blocks.0.attn.qkv.weight"), other.at("blocks.0.attn.qkv.weight")));
  CHECK_FALSE(at::equal(one.at("blocks.0.attn.qkv.weight"), one.at("blocks.1.attn.qkv.weight")));
  const at::Tensor uniform =
      make_tensor({.name = "a", .shape = {64, 100}, .init = sdk::Init::kaiming_uniform, .fan_in = 100}, 1);
  CHECK(uniform.abs().max().item<float>() <= 0.1f);
  CHECK(uniform.std().item<float>() == Approx(0.1 / std::sqrt(3.0)).margin(0.002));
}
