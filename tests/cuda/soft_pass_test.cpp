// DiffRate's search on a GPU against the fixture and against the search on the CPU.
#include "engine/soft_pass.h"

#include <limits>

#include "cuda/device.h"
#include "cuda/small_vit.h"
#include "io/io_support.h"
#include "kernels/tensors.h"
#include "support.h"
#include "tensor_maps.h"
#include "tiny_vit.h"
#include "train/rate_search.h"

using namespace pyra;
using namespace pyra::test;
using engine::Precision;
using train::RateSearch;
using train::RateSearchSettings;

namespace {

constexpr int64_t kBlocks = 5;

data::StoredSet images_for(const nn::VitConfig& config, int64_t count) {
  return data::stored({.images = bytes(config, count),
                       .labels = at::arange(count, at::kLong).remainder(config.num_classes),
                       .paths = {},
                       .skipped = {}});
}

RateSearchSettings settings_on(const std::string& device, const nn::VitConfig& config) {
  const auto dense = double(nn::count_macs(config));
  return {.target = 0.5 * dense,
          .unit = 0.1 * dense,
          .lr = 0.05,
          .epochs = 3,
          .batch = 8,
          .seed = 3,
          .device = device,
          .start = {.prune = {37, 30, 24, 17, 12}, .merge = {37, 26, 20, 17, 9}}};
}

/// The largest difference of two searches' first moments, which are (1 - beta1) times the gradients after one step,
/// beside the largest of all.
double gradient_difference(const RateSearch& a, const RateSearch& b) {
  const sdk::TensorMap left = a.state(), right = b.state();
  double difference = 0, largest = 1e-30;
  for (const auto& [name, tensor] : right) {
    if (!name.starts_with("first.")) continue;
    largest = std::max(largest, tensor.abs().max().item<double>());
    difference = std::max(difference, max_difference(left.at(name), tensor));
  }
  return difference / largest;
}

}  // namespace

TEST_CASE("a pass on the GPU gives the fixture's loss and gradients of a search's step", "[gpu][parity]") {
  PYRA_NEEDS_GPU();
  const Golden golden = read_golden("diffrate_search_step");
  const std::string from = golden.describe.at("starts_from");
  const nn::Vit vit = golden_model(read_golden(from.substr(0, from.find(':'))));
  const nn::VitConfig& config = vit.config();
  sdk::TensorMap here, there;
  for (const auto& [name, tensor] : golden.tensors) {
    if (!name.starts_with("blocks.")) continue;
    here.emplace(name, tensor.clone().set_requires_grad(true));
    there.emplace(name, tensor.clone().set_requires_grad(true));
  }
  const at::Tensor &input = golden.at("input"), labels = golden.at("labels").to(at::kLong);
  // Without the MACs' term, which would hide what the pass adds.
  const train::Rates rates_here = train::rates_of(config, here), rates_there = train::rates_of(config, there);
  train::RateMasks masks(config, rates_here, input.size(0));
  at::cross_entropy_loss(vit.forward(input, {.soft = &masks}), labels).backward();

  const auto counts = train::soft_counts(train::kept_counts(rates_there, config.tokens()), config.tokens());
  const auto pass =
      engine::make_cuda_soft_pass(vit, {.size = config.image_size}, {.device = "cuda:0", .batch = input.size(0)});
  const engine::SoftPassResult result = pass->run({.images = input, .labels = labels}, counts);
  CHECK(result.cross_entropy == Approx(golden.at("ce").item<double>()).epsilon(1e-5));
  train::pass_cross_entropy(result, rates_there, counts).backward();
  double largest = 0;
  for (const auto& [name, logits] : here)
    if (logits.grad().defined()) largest = std::max(largest, logits.grad().abs().max().item<double>());
  REQUIRE(largest > 0);
  // The same fp32 sums in another order, through all blocks: a hundredth of this was seen on the CPU's arithmetic.
  for (const auto& [name, logits] : there) {
    CAPTURE(name);
    const at::Tensor wanted = here.at(name).grad(), found = logits.grad();
    const at::Tensor none = at::zeros_like(logits.detach());
    CHECK(max_difference(found.defined() ? found : none, wanted.defined() ? wanted : none) < 1e-4 * largest);
  }
}

TEST_CASE("a search's step on the GPU is the CPU's, gradients of all logits included", "[gpu][soft_pass]") {
  PYRA_NEEDS_GPU();
  nn::VitConfig config = small_config(kBlocks);
  config.pool = GENERATE(nn::Pool::token, nn::Pool::avg);
  const nn::Vit vit(config, nn::random_weights(config, 3));
  const data::StoredSet images = images_for(config, 27);
  RateSearchSettings cpu = settings_on("cpu", config), gpu = settings_on("cuda:0", config);
  cpu.weight = gpu.weight = GENERATE(0.0, 5.0);  // 0: what the images say alone
  cpu.proportional_attention = gpu.proportional_attention = GENERATE(true, false);
  CAPTURE(int(config.pool), cpu.weight, cpu.proportional_attention);
  RateSearch here(vit, images, {.size = config.image_size}, cpu), there(vit, images, {.size = config.image_size}, gpu);
  here.step(), there.step();
  CHECK(there.last_cross_entropy() == Approx(here.last_cross_entropy()).epsilon(1e-5));
  CHECK(there.last_macs() == here.last_macs());
  CHECK(there.position().correct == here.position().correct);
  CHECK(gradient_difference(there, here) < 1e-4);
}

TEST_CASE("a search on the GPU reaches its target in every precision it has", "[gpu][soft_pass]") {
  PYRA_NEEDS_GPU();
  const nn::VitConfig config = small_config(kBlocks);
  const nn::Vit vit(config, nn::random_weights(config, 3));
  const data::StoredSet images = images_for(config, 27);
  RateSearchSettings chosen = settings_on("cuda:0", config);
  chosen.precision = GENERATE(Precision::fp32, Precision::tf32, Precision::bf16);
  chosen.epochs = 8;
  CAPTURE(engine::precision_name(chosen.precision));
  RateSearch exact(vit, images, {.size = config.image_size}, settings_on("cpu", config));
  RateSearch search(vit, images, {.size = config.image_size}, chosen);
  exact.step(), search.step();
  CHECK(search.last_cross_entropy() == Approx(exact.last_cross_entropy()).epsilon(2e-2));
  while (!search.finished()) search.step();
  CHECK(std::abs(double(search.last_macs()) / double(nn::count_macs(config)) - 0.5) < 0.1);
}

TEST_CASE("a search on the GPU is bit-equal when repeated and when resumed", "[gpu][soft_pass]") {
  PYRA_NEEDS_GPU();
  const nn::VitConfig config = small_config(kBlocks);
  const nn::Vit vit(config, nn::random_weights(config, 3));
  const data::StoredSet images = images_for(config, 27);
  RateSearchSettings chosen = settings_on("cuda:0", config);
  chosen.precision = GENERATE(Precision::fp32, Precision::bf16);
  const nn::Preprocess preprocess{.size = config.image_size};
  RateSearch unbroken(vit, images, preprocess, chosen), again(vit, images, preprocess, chosen);
  while (!unbroken.finished()) unbroken.step(), again.step();
  check_equal(again.state(), unbroken.state());
  for (const int64_t stop : {1, 4}) {
    RateSearch first(vit, images, preprocess, chosen), second(vit, images, preprocess, chosen);
    for (int64_t i = 0; i < stop; ++i) first.step();
    second.restore(first.position(), copies(first.state()), "test");
    while (!second.finished()) second.step();
    CAPTURE(stop);
    check_equal(second.state(), unbroken.state());
  }
}

TEST_CASE("a loss that is not finite stops a search on the GPU before it changes anything", "[gpu][soft_pass]") {
  PYRA_NEEDS_GPU();
  const nn::VitConfig config = small_config(kBlocks);
  sdk::TensorMap weights = nn::random_weights(config, 3);
  weights.at("head.bias")[0] = std::numeric_limits<float>::quiet_NaN();
  const nn::Vit vit(config, std::move(weights));
  const data::StoredSet images = images_for(config, 8);
  RateSearch search(vit, images, {.size = config.image_size}, settings_on("cuda:0", config));
  const sdk::TensorMap before = copies(search.state());
  CHECK_THROWS_AS(search.step(), train::Diverged);
  check_equal(search.state(), before);
}

TEST_CASE("rates that keep all have no gradient on the GPU", "[gpu][soft_pass]") {
  PYRA_NEEDS_GPU();
  const nn::VitConfig config = small_config(3);
  const nn::Vit vit(config, nn::random_weights(config, 3));
  const auto pass = engine::make_cuda_soft_pass(vit, {.size = config.image_size}, {.device = "cuda:0", .batch = 2});
  const int tokens = int(config.tokens());
  const std::vector<kernels::SoftCounts> all(3, {.present = tokens, .pruned = tokens, .kept = tokens});
  const at::Tensor images = seeded({2, 3, config.image_size, config.image_size}, 4), labels = at::zeros({2}, at::kLong);
  const engine::SoftPassResult result = pass->run({.images = images, .labels = labels}, all);
  const at::NoGradGuard no_gradients;
  const double wanted = at::cross_entropy_loss(vit.forward(images), labels).item<double>();
  CHECK(result.cross_entropy == Approx(wanted).epsilon(1e-5));
  CHECK(result.d_prune.abs().max().item<double>() == 0);
  CHECK(result.d_merge.abs().max().item<double>() == 0);
}

TEST_CASE("a search on the GPU says what only the CPU does", "[gpu][soft_pass]") {
  PYRA_NEEDS_GPU();
  const auto refused = [](const nn::VitConfig& config, const engine::SoftPassOptions& options,
                          const std::vector<std::string>& says) {
    const nn::Vit vit(config, nn::random_weights(config, 3));
    check_error(ExitCode::usage, says,
                [&] { (void)engine::make_cuda_soft_pass(vit, {.size = config.image_size}, options); });
  };
  refused(tiny_config(2, true), {.device = "cuda:0"}, {"two heads", "--device cpu"});
  refused(small_config(), {.device = "cuda:0", .precision = Precision::fp16}, {"fp16", "bf16"});
  refused(small_config(), {.device = "cuda:0", .batch = 5000}, {"5000 images", "--search-batch"});
  nn::VitConfig narrow = small_config();
  narrow.num_heads = 8;
  refused(narrow, {.device = "cuda:0"}, {"a head has 8 channels", "--device cpu"});

  const nn::VitConfig config = small_config();
  const nn::Vit vit(config, nn::random_weights(config, 3));
  const auto pass = engine::make_cuda_soft_pass(vit, {.size = config.image_size}, {.device = "cuda:0", .batch = 2});
  const at::Tensor images = bytes(config, 2), labels = at::zeros({2}, at::kLong);
  const std::vector<kernels::SoftCounts> gap{{37, 37, 37}, {37, 30, 20}, {25, 25, 25}},
      good{{37, 37, 37}, {37, 30, 20}, {20, 20, 12}};
  check_error(ExitCode::internal, {"expected 20"}, [&] { (void)pass->run({images, labels}, gap); });
  check_error(ExitCode::internal, {"images are"}, [&] { (void)pass->run({bytes(config, 3), labels}, good); });
  check_error(ExitCode::internal, {"label 7 of 7"}, [&] { (void)pass->run({images, labels + 7}, good); });
}
