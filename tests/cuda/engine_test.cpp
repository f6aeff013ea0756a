// Whole models on the GPU: against the fixtures, against the CPU engine, and what the engine promises of itself.
#include "engine/engine.h"

#include <chrono>

#include "base/clock.h"
#include "base/error.h"
#include "base/text.h"
#include "cuda/device.h"
#include "cuda/small_vit.h"
#include "engine/cuda_library.h"
#include "goldens.h"
#include "kernels/tensors.h"
#include "support.h"

using namespace pyra;
using engine::Precision;
using test::attach;
using test::bytes;
using test::Golden;
using test::relative_difference;
using test::removing;
using test::small_config;

namespace {

constexpr double kTolerance = 1e-4;

std::unique_ptr<engine::Engine> on_gpu(const nn::Vit& vit, Precision precision = Precision::fp32) {
  return engine::make_engine(vit, {.size = vit.config().image_size}, {.device = "cuda:0", .precision = precision});
}

void check_golden(const nn::Vit& vit, const Golden& golden) {
  CAPTURE(golden.name);
  CHECK(relative_difference(on_gpu(vit)->run(golden.at("input")), golden.at("logits")) <= kTolerance);
}

/// Drops the last tokens and merges the ones before them into the class token's neighbour, by plain ATen operations and
/// without a recipe: somebody else's merger.
class Foreign final : public sdk::TokenMerger {
 public:
  [[nodiscard]] sdk::Needs needs() const override { return {.key_mean = true, .class_attention = true}; }
  [[nodiscard]] sdk::MergePlan plan(const sdk::MergeInputs& in, const sdk::Schedule& schedule) const override {
    if (fails) throw std::runtime_error("out of ideas");
    if (throws_a_number) throw 42;
    const int64_t images = in.tokens.size(0), r = schedule.remove[size_t(in.block)], kept = in.tokens.size(1) - r;
    // A choice that depends on what it is shown: the key's first channel or the class attention decides who leaves.
    const at::Tensor score = in.key_mean.select(2, 0) + in.class_attention + 0.01 * in.tokens.select(2, 0) + in.sizes;
    const at::Tensor order = score.narrow(1, 1, in.tokens.size(1) - 1).argsort(true, 1, true) + 1;
    const at::Tensor front = at::zeros({images, 1}, at::kLong);
    const at::Tensor keep = at::cat({front, std::get<0>(order.narrow(1, 0, kept - 1).sort(1))}, 1);
    return {.keep = keep,
            .src = order.narrow(1, kept - 1, r).contiguous(),
            .dst = at::ones({images, r}, at::kLong),
            .src_weight = weightless ? at::Tensor() : at::full({images, r}, 0.5)};
  }
  bool fails = false, throws_a_number = false, weightless = false;
};

}  // namespace

TEST_CASE("on the GPU dense models give the fixtures' logits", "[cuda][gpu]") {
  PYRA_NEEDS_GPU();
  const Golden golden = test::read_golden(GENERATE("vit_dense", "deit_distilled_dense"));
  check_golden(test::golden_model(golden), golden);
}

TEST_CASE("on the GPU ToMe gives the fixtures' logits", "[cuda][gpu]") {
  PYRA_NEEDS_GPU();
  const Golden golden = test::read_golden(GENERATE("vit_tome", "deit_distilled_tome", "mae_pool_tome"));
  nn::Vit vit = test::golden_model(golden);
  attach(vit, "tome", removing(golden.describe.at("remove").get<std::vector<int64_t>>()),
         golden.describe.value("proportional_attention", true));
  check_golden(vit, golden);
}

TEST_CASE("on the GPU DiffRate gives the fixture's logits", "[cuda][gpu]") {
  PYRA_NEEDS_GPU();
  const Golden golden = test::read_golden("vit_diffrate");
  nn::Vit vit = test::golden_model(golden);
  sdk::Schedule kept;
  kept.text = "fixture";
  kept.prune = golden.describe.at("kept_after_prune").get<std::vector<int64_t>>();
  kept.merge = golden.describe.at("kept_after_merge").get<std::vector<int64_t>>();
  attach(vit, "diffrate", kept);
  check_golden(vit, golden);
}

TEST_CASE("on the GPU PYRA with LoRA gives the fixture's logits", "[cuda][gpu]") {
  PYRA_NEEDS_GPU();
  const Golden golden = test::read_golden("vit_pyra_lora");
  nn::Vit vit = test::golden_model(golden);
  test::attach_golden_lora(vit, golden);
  test::attach_golden_pyra(vit, golden);
  check_golden(vit, golden);
}

TEST_CASE("the GPU computes what the CPU computes, from bytes, at every precision", "[cuda][gpu]") {
  PYRA_NEEDS_GPU();
  const nn::VitConfig config = small_config();
  nn::Vit vit(config, nn::random_weights(config, 1));
  const std::string merger = GENERATE("dense", "tome", "pyra", "diffrate");
  const auto [precision, tolerance] = GENERATE(table<Precision, double>(
      {{Precision::fp32, 1e-4}, {Precision::tf32, 5e-3}, {Precision::fp16, 1e-2}, {Precision::bf16, 5e-2}}));
  CAPTURE(merger, engine::precision_name(precision));
  // No merge in the low precisions: a key that rounds otherwise may choose another partner, which is no error.
  if (precision != Precision::fp32 && merger != "dense") return;
  if (merger != "dense") attach(vit, merger, removing({9, 0, 6}));
  const at::Tensor images = bytes(config, 5);
  const auto cpu = engine::make_engine(vit, {.size = config.image_size}, {});
  CHECK(relative_difference(on_gpu(vit, precision)->run(images), cpu->run(images)) <= tolerance);
}

TEST_CASE("a third party's plan runs inside the graph", "[cuda][gpu]") {
  PYRA_NEEDS_GPU();
  const nn::VitConfig config = small_config();
  nn::Vit vit(config, nn::random_weights(config, 1));
  const auto merger = std::make_shared<Foreign>();
  attach(vit, merger, "foreign", removing({9, 0, 6}));
  const auto cpu = engine::make_engine(vit, {.size = config.image_size}, {});
  const auto gpu = on_gpu(vit);
  for (const uint64_t seed : {1, 2, 3}) {
    const at::Tensor images = bytes(config, 4, seed);
    CHECK(relative_difference(gpu->run(images), cpu->run(images)) <= kTolerance);
  }
  merger->fails = true;
  CHECK_THROWS_WITH(gpu->run(bytes(config, 4)),
                    Catch::Equals("merger 'foreign', block 0: plan() failed: out of ideas"));
  merger->fails = false;
  merger->throws_a_number = true;
  CHECK_THROWS_WITH(gpu->run(bytes(config, 4)), Catch::Contains("no std::exception"));
  merger->throws_a_number = false;
  merger->weightless = true;
  CHECK_THROWS_WITH(gpu->run(bytes(config, 4)), Catch::Contains("block 0: the plan's shape is another"));
  merger->weightless = false;
  const at::Tensor images = bytes(config, 3);
  CHECK(relative_difference(gpu->run(images), cpu->run(images)) <= kTolerance);
}

TEST_CASE("on the GPU an image's logits are its own, bit for bit, from run to run and whoever is beside it",
          "[cuda][gpu]") {
  PYRA_NEEDS_GPU();
  const nn::VitConfig config = small_config();
  nn::Vit vit(config, nn::random_weights(config, 1));
  const std::string merger = GENERATE("dense", "pyra", "diffrate");
  const Precision precision = GENERATE(Precision::fp32, Precision::bf16);
  CAPTURE(merger, engine::precision_name(precision));
  if (merger != "dense") attach(vit, merger, removing({9, 0, 6}));
  const at::Tensor images = bytes(config, 33);
  const auto gpu = on_gpu(vit, precision);
  const at::Tensor logits = gpu->run(images);
  CHECK(at::equal(gpu->run(images), logits));
  CHECK(at::equal(gpu->run(images.flip(0)), logits.flip(0)));
  CHECK(at::equal(on_gpu(vit, precision)->run(images), logits));
  // Another batch size may take another algorithm for its matrix products: near, not equal.
  CHECK(relative_difference(gpu->run(images.narrow(0, 0, 2)), logits.narrow(0, 0, 2)) <=
        (precision == Precision::fp32 ? 1e-4 : 5e-2));
}

TEST_CASE("batches in flight come back in order, whatever their size and company", "[cuda][gpu]") {
  PYRA_NEEDS_GPU();
  // Up to how many images a pass has company: as the engine sees it (all of these), none, those of 4 and 1.
  const test::EnvironmentVariable most("PYRA_CUDA_BESIDE", GENERATE("", "0", "5"));
  const nn::VitConfig config = small_config();
  nn::Vit vit(config, nn::random_weights(config, 1));
  attach(vit, "tome", removing({9, 4, 6}));
  const auto gpu = on_gpu(vit);
  std::vector<at::Tensor> batches, expected;
  for (const int64_t count : {4, 9, 4, 1, 4, 9, 30, 1}) batches.push_back(bytes(config, count, uint64_t(count) + 10));
  for (const at::Tensor& batch : batches) expected.push_back(on_gpu(vit)->run(batch));
  std::vector<at::Tensor> found;
  for (size_t i = 0; i < batches.size(); ++i) {
    if (int64_t(i - found.size()) == gpu->in_flight()) found.push_back(gpu->collect());
    gpu->submit(batches[i]);
  }
  while (found.size() < batches.size()) found.push_back(gpu->collect());
  for (size_t i = 0; i < batches.size(); ++i) {
    CAPTURE(i);
    CHECK(at::equal(found[i], expected[i]));
  }
  CHECK_THROWS_AS(gpu->collect(), Error);
}

/// Where few images have a Hopper card alone, matching goes in line with attention and projection, which wait for each
/// other by counts: behind attention if the projection has few rows, else in front of it. In company it has a stream.
TEST_CASE("a pass is the same bits alone and in company", "[cuda][gpu]") {
  PYRA_NEEDS_GPU();
  nn::VitConfig config = small_config();
  config.embed_dim = 128, config.num_heads = 2, config.mlp_dim = 256;  // heads that Hopper's attention takes
  nn::Vit vit(config, nn::random_weights(config, 1));
  const std::string merger = GENERATE("tome", "pyra");
  attach(vit, merger, removing({9, 4, 6}));
  const int64_t count = GENERATE(1, 3, 10, 18, 24);
  const Precision precision = GENERATE(Precision::bf16, Precision::fp16);
  CAPTURE(merger, count, engine::precision_name(precision));
  const auto gpu = on_gpu(vit, precision);
  std::vector<at::Tensor> batches, alone;
  for (uint64_t seed = 1; seed <= 8; ++seed) batches.push_back(bytes(config, count, seed));
  for (const at::Tensor& batch : batches) alone.push_back(gpu->run(batch));
  for (int repeat = 0; repeat < 10; ++repeat) {
    size_t collected = 0;
    const auto collect = [&] { CHECK(at::equal(gpu->collect(), alone[collected++])); };
    for (size_t i = 0; i < batches.size(); ++i) {
      if (int64_t(i - collected) == gpu->in_flight()) collect();
      gpu->submit(batches[i]);
    }
    while (collected < batches.size()) collect();
    for (size_t i = 0; i < batches.size(); ++i) CHECK(at::equal(gpu->run(batches[i]), alone[i]));
  }
}

TEST_CASE("time that passes side by side share is counted once", "[cuda][gpu]") {
  PYRA_NEEDS_GPU();
  const std::string limit = GENERATE("", "0", "40");
  const test::EnvironmentVariable most("PYRA_CUDA_BESIDE", limit.c_str());
  const nn::VitConfig config = small_config();
  const auto gpu = on_gpu(nn::Vit(config, nn::random_weights(config, 1)));
  const at::Tensor large = bytes(config, 64), small = bytes(config, 32);
  for (const at::Tensor& images : {large, small}) (void)gpu->time_ms(images, 1, gpu->in_flight());  // captures
  double seconds = 0;
  const auto collect = [&] {
    (void)gpu->collect();
    CHECK(gpu->last_seconds() >= 0);
    seconds += gpu->last_seconds();
  };
  const auto start = std::chrono::steady_clock::now();
  int64_t in_flight = 0;
  for (int i = 0; i < 60; ++i, ++in_flight) {
    if (in_flight == gpu->in_flight()) collect(), --in_flight;
    gpu->submit(i % 5 == 0 ? large : small);
  }
  for (; in_flight > 0; --in_flight) collect();
  CHECK(seconds > 0);
  CHECK(seconds <= seconds_since(start));
  // The second lane is counted where there is one.
  CHECK((gpu->device_bytes(32, 3) > gpu->device_bytes(32, 1)) == (limit != "0"));
  CHECK((gpu->device_bytes(64, 3) > gpu->device_bytes(64, 1)) == limit.empty());
}

TEST_CASE("a plan that fails ends what is in flight, and the engine goes on", "[cuda][gpu]") {
  PYRA_NEEDS_GPU();
  const nn::VitConfig config = small_config();
  nn::Vit vit(config, nn::random_weights(config, 1));
  const auto merger = std::make_shared<Foreign>();
  attach(vit, merger, "foreign", removing({9, 0, 6}));
  const auto gpu = on_gpu(vit);
  const at::Tensor images = bytes(config, 4), expected = gpu->run(images);
  merger->fails = true;
  for (int i = 0; i < 3; ++i) gpu->submit(images);
  CHECK_THROWS_WITH(gpu->collect(), Catch::Contains("out of ideas"));
  CHECK_THROWS_WITH(gpu->collect(), Catch::Contains("without a batch submitted"));
  merger->fails = false;
  CHECK(at::equal(gpu->run(images), expected));
}

TEST_CASE("what the GPU does not do is refused in words", "[cuda][gpu]") {
  PYRA_NEEDS_GPU();
  nn::VitConfig config = small_config();
  config.num_heads = 8;  // 8 channels a head
  const nn::Vit vit(config, nn::random_weights(config, 1));
  CHECK_THROWS_WITH(on_gpu(vit), Catch::Contains("8 channels") && Catch::Contains("--device cpu"));
  CHECK_THROWS_WITH(engine::make_engine(vit, {}, {.device = "cuda:99"}), Catch::Contains("this machine has"));
  const nn::VitConfig good = small_config();
  const nn::Vit other(good, nn::random_weights(good, 1));
  CHECK_THROWS_WITH(on_gpu(other)->run(at::zeros({1, 3, 8, 8})), Catch::Contains("expected uint8"));
}
