#include "train/rate_masks.h"

#include <torch/csrc/autograd/autograd.h>

#include <cmath>

#include "base/philox.h"
#include "goldens.h"
#include "support.h"
#include "tiny_vit.h"
#include "train/rate_search.h"

using namespace pyra;
using train::KeptCounts;
using train::Rate;
using train::Rates;

namespace {

constexpr int64_t kDepth = 4;

at::Tensor normal(at::IntArrayRef shape, uint64_t seed, double scale = 1) {
  at::Tensor values = at::empty(shape, at::kFloat);
  const Philox random(seed, RandomStream::init);
  for (int64_t i = 0; i < values.numel(); ++i) values.data_ptr<float>()[i] = random.normal(uint64_t(i)) * float(scale);
  return values;
}

/// Random logits for every block; block 0 has but one.
sdk::TensorMap random_logits(const nn::VitConfig& config, uint64_t seed) {
  sdk::TensorMap logits;
  for (int64_t block = 0; block < config.depth; ++block)
    for (const char* kind : {"prune", "merge"})
      logits.emplace(
          cat("blocks.", block, ".", kind, "_logits"),
          normal({block == 0 ? 1 : config.patches()}, seed + uint64_t(logits.size()), 2).set_requires_grad(true));
  return logits;
}

double gradient_of(const at::Tensor& value, const at::Tensor& logits, int64_t i) {
  return torch::autograd::grad({value}, {logits}, {}, /*retain_graph=*/true)[0][i].item<double>();
}

}  // namespace

TEST_CASE("a rate keeps the mean candidate, rounded up, and the protected tokens", "[rates]") {
  // Candidates 4, 3, 2, 1.
  CHECK(train::rate_of(at::zeros({4}), 4, 1).count == 3 + 1);  // 2.5
  CHECK(train::rate_of(at::tensor({50.f, 0.f, 0.f, 0.f}), 4, 1).count == 4 + 1);
  CHECK(train::rate_of(at::tensor({0.f, 0.f, 0.f, 50.f}), 4, 2).count == 1 + 2);
  const at::Tensor survival = train::rate_of(at::zeros({4}), 4, 2).survival;
  CHECK(test::max_difference(survival, at::tensor({1.f, 1.f, 1.f, 0.75f, 0.5f, 0.25f})) < 1e-6);
  // A single candidate: all stay, whatever its logit.
  const at::Tensor one = at::tensor({-3.f}).set_requires_grad(true);
  const Rate all = train::rate_of(one, 16, 1);
  CHECK(all.count == 17);
  CHECK(test::max_difference(all.survival.detach(), at::ones({17})) == 0);
  CHECK(gradient_of(all.kept + all.survival.sum(), one, 0) == 0);
  CHECK_THROWS_AS(train::rate_of(at::zeros({5}), 4, 1), Error);
}

TEST_CASE("a rate's gradients are finite differences", "[rates]") {
  const int64_t patches = 9;
  const at::Tensor logits = normal({patches}, 3).to(at::kDouble).set_requires_grad(true);
  const at::Tensor cotangent = normal({patches + 1}, 4).to(at::kDouble);
  const Rate rate = train::rate_of(logits, patches, 1);
  const at::Tensor survived = (rate.survival * cotangent).sum();
  const auto mean = [&](const at::Tensor& at) {
    return (at::softmax(at, 0) * at::arange(patches, 0, -1, at::kDouble)).sum().item<double>();
  };
  const auto survival = [&](const at::Tensor& at) {
    return (train::rate_of(at, patches, 1).survival * cotangent).sum().item<double>();
  };
  for (int64_t i = 0; i < patches; ++i) {
    at::Tensor above = logits.detach().clone(), below = above.clone();
    const double step = 1e-5;
    above[i] += step, below[i] -= step;
    CAPTURE(i);
    CHECK(std::abs(gradient_of(rate.kept, logits, i) - (mean(above) - mean(below)) / (2 * step)) < 1e-8);
    CHECK(std::abs(gradient_of(survived, logits, i) - (survival(above) - survival(below)) / (2 * step)) < 1e-8);
  }
}

TEST_CASE("a survival mask is zero or one forward and the probability backward", "[rates]") {
  const at::Tensor logits = normal({16}, 5, 3).set_requires_grad(true);
  const Rate rate = train::rate_of(logits, 16, 1);
  const int64_t present = 14;
  REQUIRE(rate.count < present);
  const at::Tensor mask = train::survival_mask(rate, present);
  for (int64_t i = 0; i < 17; ++i) CHECK(mask[i].item<float>() == (i < rate.count || i >= present ? 1.f : 0.f));
  const at::Tensor cotangent = normal({17}, 6);
  const auto found = torch::autograd::grad({mask}, {logits}, {cotangent}, true)[0];
  const auto expected =
      torch::autograd::grad({rate.survival.narrow(0, 0, present)}, {logits}, {cotangent.narrow(0, 0, present)})[0];
  CHECK(test::max_difference(found, expected) < 1e-6);
}

TEST_CASE("kept counts never rise, merge no more than prune, and begin with all", "[rates]") {
  const nn::VitConfig config = test::tiny_config(kDepth, GENERATE(false, true));
  for (uint64_t seed = 0; seed < 50; ++seed) {
    const sdk::TensorMap logits = random_logits(config, 100 * seed);
    const KeptCounts counts = train::kept_counts(train::rates_of(config, logits), config.tokens());
    CAPTURE(seed, counts.prune, counts.merge);
    CHECK(counts.prune[0] == config.tokens());
    CHECK(counts.merge[0] == config.tokens());
    for (size_t block = 0; block < counts.prune.size(); ++block) {
      CHECK(counts.merge[block] <= counts.prune[block]);
      CHECK(counts.merge[block] > config.protected_tokens());
      if (block > 0) CHECK(counts.prune[block] <= counts.merge[block - 1]);
    }
    // What DiffRate makes of the counts is what they are.
    const auto merger = test::built_plugins().merger("diffrate", {}, "test");
    const auto resolved =
        merger->resolve({.text = "t", .remove = {}, .prune = counts.prune, .merge = counts.merge}, config.shape());
    CHECK(KeptCounts{resolved.prune, resolved.merge} == counts);
  }
}

TEST_CASE("counts block by block have the masks that the rates have", "[rates]") {
  const nn::VitConfig config = test::tiny_config(kDepth, GENERATE(false, true));
  for (uint64_t seed = 0; seed < 20; ++seed) {
    const Rates rates = train::rates_of(config, random_logits(config, 100 * seed));
    const auto blocks = train::soft_counts(train::kept_counts(rates, config.tokens()), config.tokens());
    REQUIRE(int64_t(blocks.size()) == config.depth);
    int present = int(config.tokens());
    for (size_t block = 0; block < blocks.size(); ++block) {
      const kernels::SoftCounts& counts = blocks[block];
      CAPTURE(seed, block, counts.present, counts.pruned, counts.kept);
      CHECK(counts.present == present);
      const at::Tensor pruned = train::survival_mask(rates.prune[block], counts.present),
                       merged = train::survival_mask(rates.merge[block], counts.pruned);
      for (int rank = 0; rank < int(config.tokens()); ++rank) {
        CHECK(counts.survives_pruning(rank) == (pruned[rank].item<float>() == 1));
        CHECK(counts.survives_merging(rank) == (merged[rank].item<float>() == 1));
      }
      present = counts.kept;
    }
  }
}

TEST_CASE("what a pass says of survival reaches the logits as it would through masks", "[rates]") {
  const nn::VitConfig config = test::tiny_config(kDepth);
  sdk::TensorMap through_masks = random_logits(config, 11), through_pass = random_logits(config, 11);
  const Rates rates = train::rates_of(config, through_masks), others = train::rates_of(config, through_pass);
  const int64_t tokens = config.tokens();
  const auto blocks = train::soft_counts(train::kept_counts(rates, tokens), tokens);
  engine::SoftPassResult result{.cross_entropy = 1.25,
                                .correct = 0,
                                .d_prune = normal({kDepth, tokens}, 5),
                                .d_merge = normal({kDepth, tokens}, 6)};
  for (int64_t block = 0; block < kDepth; ++block) {  // a pass gives nothing for ranks that are gone
    result.d_prune[block].slice(0, blocks[size_t(block)].present).zero_();
    result.d_merge[block].slice(0, blocks[size_t(block)].pruned).zero_();
  }
  at::Tensor sum = at::zeros({});
  for (int64_t block = 0; block < kDepth; ++block) {
    const kernels::SoftCounts& counts = blocks[size_t(block)];
    if (counts.prunes())
      sum = sum + (train::survival_mask(rates.prune[size_t(block)], counts.present) * result.d_prune[block]).sum();
    if (counts.merges())
      sum = sum + (train::survival_mask(rates.merge[size_t(block)], counts.pruned) * result.d_merge[block]).sum();
  }
  sum.backward();
  const at::Tensor found = train::pass_cross_entropy(result, others, blocks);
  CHECK(found.item<double>() == 1.25);
  found.backward();
  size_t felt = 0;
  for (const auto& [name, logits] : through_masks) {
    CAPTURE(name);
    const at::Tensor wanted = logits.grad(), got = through_pass.at(name).grad();
    REQUIRE(wanted.defined() == got.defined());
    if (!wanted.defined()) continue;
    ++felt;
    CHECK(test::max_difference(got, wanted) < 1e-6);
  }
  CHECK(felt > 0);
}

TEST_CASE("soft MACs are those of the counts, and every rate feels them", "[rates]") {
  const nn::VitConfig config = test::tiny_config(kDepth);
  const sdk::TensorMap logits = random_logits(config, 7);
  const Rates rates = train::rates_of(config, logits);
  const KeptCounts counts = train::kept_counts(rates, config.tokens());
  const at::Tensor macs = train::soft_macs(config, rates);
  CHECK(macs.item<double>() == double(nn::count_macs(config, counts.merge)));
  for (size_t block = 1; block < counts.merge.size(); ++block) {
    // The price of a token is the slope of count_macs, taken over two tokens around the count.
    std::vector<int64_t> more = counts.merge, fewer = counts.merge;
    ++more[block], --fewer[block];
    const double price = double(nn::count_macs(config, more) - nn::count_macs(config, fewer)) / 2;
    for (const Rate& rate : {rates.prune[block], rates.merge[block]}) {
      const auto slope = torch::autograd::grad({macs}, {rate.kept}, {}, true)[0];
      CHECK(slope.item<double>() == price);
    }
  }
}

TEST_CASE("masks leave as many tokens as the counts say, protected ones in place", "[rates]") {
  const nn::VitConfig config = test::tiny_config(kDepth, GENERATE(false, true));
  const Rates rates = train::rates_of(config, random_logits(config, GENERATE(1, 2, 3)));
  const KeptCounts counts = train::kept_counts(rates, config.tokens());
  const int64_t batch = 3, dim = config.embed_dim;
  train::RateMasks masks(config, rates, batch);
  at::Tensor x = normal({batch, config.tokens(), dim}, 9);
  const at::Tensor prefix = x.narrow(1, 0, config.protected_tokens()).clone();
  for (int64_t block = 0; block < config.depth; ++block) {
    (void)masks.attend(block, normal({batch, config.tokens(), 3 * dim}, uint64_t(20 + block)));
    const at::Tensor before = x;
    x = masks.reduce(block, x);
    CAPTURE(block, counts.merge);
    CHECK(masks.present() == counts.merge[size_t(block)]);
    const at::Tensor expected = (at::arange(config.tokens()) < masks.present()).to(at::kFloat).expand({batch, -1});
    CHECK(at::equal(masks.mask().detach(), expected));
    CHECK(masks.sizes().min().item<float>() >= 1);
    CHECK(at::equal(x.narrow(1, 0, config.protected_tokens()).detach(), prefix));
    // Who is masked out stays as it is: every row behind `present` was a row before.
    for (int64_t i = masks.present(); i < config.tokens(); ++i) CHECK((before[0] == x[0][i]).all(1).any().item<bool>());
  }
}

TEST_CASE("rates that keep all change nothing", "[rates]") {
  nn::VitConfig config = test::tiny_config(kDepth, GENERATE(false, true));
  if (!config.distilled) config.pool = GENERATE(nn::Pool::token, nn::Pool::avg);
  const nn::Vit vit(config, nn::random_weights(config, 3));
  Rates rates;
  for (int64_t block = 0; block < config.depth; ++block)
    for (auto* list : {&rates.prune, &rates.merge})
      list->push_back(train::rate_of(at::zeros({1}), config.patches(), config.protected_tokens()));
  const at::Tensor images = normal({2, 3, 16, 16}, 8);
  train::RateMasks masks(config, rates, 2);
  const at::NoGradGuard no_gradients;
  CHECK(test::max_difference(vit.forward(images, {.soft = &masks}), vit.forward(images)) < 1e-5);
}

TEST_CASE("without proportional attention a merged token weighs one, and pruning alone is the same", "[rates]") {
  const nn::VitConfig config = test::tiny_config(kDepth);
  const nn::Vit vit(config, nn::random_weights(config, 3));
  const Rates rates = train::rates_of(config, random_logits(config, 1));
  REQUIRE(train::kept_counts(rates, config.tokens()).merge.back() < config.tokens());
  const at::Tensor images = normal({2, 3, 16, 16}, 8);
  const at::NoGradGuard no_gradients;
  const auto difference = [&](const Rates& chosen) {
    train::RateMasks weighed(config, chosen, 2), plain(config, chosen, 2, false);
    return test::max_difference(vit.forward(images, {.soft = &weighed}), vit.forward(images, {.soft = &plain}));
  };
  CHECK(difference(rates) > 1e-4);
  CHECK(difference({.prune = rates.prune, .merge = rates.prune}) == 0);
}

TEST_CASE("an average-pooled model pools what is left", "[rates]") {
  nn::VitConfig config = test::tiny_config(kDepth);
  config.pool = nn::Pool::avg;
  const nn::Vit vit(config, nn::random_weights(config, 3));
  const Rates rates = train::rates_of(config, random_logits(config, 1));
  const KeptCounts counts = train::kept_counts(rates, config.tokens());
  REQUIRE(counts.merge.back() < config.tokens());
  train::RateMasks masks(config, rates, 2);
  at::Tensor features;
  const at::NoGradGuard no_gradients;
  const at::Tensor logits =
      vit.forward(normal({2, 3, 16, 16}, 8),
                  {.trace = [&](int64_t, const at::Tensor& x, const at::Tensor&) { features = x; }, .soft = &masks});
  const at::Tensor mean = features.slice(1, 1, masks.present()).mean(1);
  const auto weight = [&](const char* name) { return vit.weights().find(name)->second; };
  const at::Tensor normed =
      at::layer_norm(mean, {config.embed_dim}, weight("fc_norm.weight"), weight("fc_norm.bias"), config.norm_eps);
  CHECK(test::max_difference(logits, at::linear(normed, weight("head.weight"), weight("head.bias"))) < 1e-5);
}

TEST_CASE("a soft reduction and a merger exclude each other", "[rates]") {
  nn::Vit vit(test::tiny_config(kDepth), nn::random_weights(test::tiny_config(kDepth), 3));
  const Rates rates = train::rates_of(test::tiny_config(kDepth), random_logits(test::tiny_config(kDepth), 1));
  train::RateMasks masks(test::tiny_config(kDepth), rates, 1);
  auto setup = std::make_unique<nn::MergeSetup>();
  setup->name = "tome";
  setup->merger = test::built_plugins().merger("tome", {}, "test");
  setup->schedule = setup->merger->resolve({.text = "1", .remove = {1, 1, 1, 1}, .prune = {}, .merge = {}},
                                           test::tiny_config(kDepth).shape());
  vit.set_merge(std::move(setup));
  CHECK_THROWS_AS(vit.forward(at::zeros({1, 3, 16, 16}), {.soft = &masks}), Error);
}
