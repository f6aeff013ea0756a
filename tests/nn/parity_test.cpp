// Whole models against the fixtures: logits, tokens and sizes after every block, gradients, merged weights.
#include "base/text.h"
#include "engine/cpu_engine.h"
#include "goldens.h"
#include "nn/vit.h"
#include "support.h"

using namespace pyra;
using test::Golden;

namespace {

constexpr double kTolerance = 1e-5;

/// max |a - b| relative to the largest |b|.
double relative_difference(const at::Tensor& a, const at::Tensor& b) {
  return test::max_difference(a, b) / std::max(1e-30, b.detach().abs().max().item<double>());
}

sdk::Schedule removing(const nlohmann::json& counts) {
  sdk::Schedule schedule;
  schedule.text = "fixture";
  schedule.remove = counts.get<std::vector<int64_t>>();
  return schedule;
}

void attach(nn::Vit& vit, const std::string& name, sdk::Schedule schedule, bool proportional) {
  auto setup = std::make_unique<nn::MergeSetup>();
  setup->name = name;
  setup->merger = test::built_plugins().merger(name, {}, "test");
  setup->schedule = setup->merger->resolve(schedule, vit.config().shape());
  setup->proportional_attention = proportional;
  vit.set_merge(std::move(setup));
}

/// Logits and, where the fixture has them, tokens and sizes after every block.
void check_forward(const nn::Vit& vit, const Golden& golden) {
  std::vector<std::pair<at::Tensor, at::Tensor>> blocks;
  const at::NoGradGuard no_grad;
  const at::Tensor logits =
      vit.forward(golden.at("input"), {.trace = [&](int64_t, const at::Tensor& tokens, const at::Tensor& sizes) {
                    blocks.emplace_back(tokens, sizes);
                  }});
  REQUIRE(int64_t(blocks.size()) == vit.config().depth);
  for (size_t i = 0; i < blocks.size(); ++i) {
    CAPTURE(golden.name, i);
    if (golden.has(cat("tokens.", i)))
      CHECK(relative_difference(blocks[i].first, golden.at(cat("tokens.", i))) <= kTolerance);
    if (golden.has(cat("sizes.", i)))
      CHECK(test::max_difference(blocks[i].second, golden.at(cat("sizes.", i))) <= kTolerance);
  }
  if (golden.has("size_last")) CHECK(test::max_difference(blocks.back().second, golden.at("size_last")) <= kTolerance);
  CHECK(relative_difference(logits, golden.at("logits")) <= kTolerance);
  // The engine's tiles and the plain forward are one truth.
  CHECK(relative_difference(engine::CpuEngine(vit, at::kFloat).run(golden.at("input")), golden.at("logits")) <=
        kTolerance);
}

}  // namespace

TEST_CASE("dense models give the fixtures' logits", "[nn][parity]") {
  const Golden golden = test::read_golden(GENERATE("vit_dense", "deit_distilled_dense"));
  check_forward(test::golden_model(golden), golden);
}

TEST_CASE("ToMe gives the fixtures' tokens, sizes and logits", "[nn][parity]") {
  const Golden golden = test::read_golden(GENERATE("vit_tome", "deit_distilled_tome", "mae_pool_tome"));
  nn::Vit vit = test::golden_model(golden);
  const bool proportional = golden.describe.value("proportional_attention", true);
  if (golden.has("logits_dense")) {
    const at::NoGradGuard no_grad;
    CHECK(relative_difference(vit.forward(golden.at("input")), golden.at("logits_dense")) <= kTolerance);
  }
  attach(vit, "tome", removing(golden.describe.at("remove")), proportional);
  check_forward(vit, golden);
}

TEST_CASE("DiffRate with given counts gives the fixture's tokens, sizes, logits and MACs", "[nn][parity]") {
  const Golden golden = test::read_golden("vit_diffrate");
  nn::Vit vit = test::golden_model(golden);
  sdk::Schedule kept;
  kept.text = "fixture";
  kept.prune = golden.describe.at("kept_after_prune").get<std::vector<int64_t>>();
  kept.merge = golden.describe.at("kept_after_merge").get<std::vector<int64_t>>();
  attach(vit, "diffrate", kept, true);
  check_forward(vit, golden);
  CHECK(double(nn::count_macs(vit.config(), vit.tokens_after())) == golden.at("flops").item<double>());
}

TEST_CASE("PYRA with LoRA gives the fixture's logits, loss and gradients", "[nn][parity]") {
  const Golden golden = test::read_golden("vit_pyra_lora");
  nn::Vit vit = test::golden_model(golden);
  test::attach_golden_lora(vit, golden);
  test::attach_golden_pyra(vit, golden);
  check_forward(vit, golden);

  const sdk::TensorMap trained = vit.train_mode();
  const at::Tensor loss =
      at::cross_entropy_loss(vit.forward(golden.at("input"), {.training = true}), golden.at("labels"));
  CHECK(relative_difference(loss.reshape({1}), golden.at("loss")) <= kTolerance);
  loss.backward();

  double largest = 0;
  for (const auto& [name, tensor] : golden.tensors)
    if (name.starts_with("grad.")) largest = std::max(largest, tensor.abs().max().item<double>());
  size_t compared = 0;
  for (const auto& [name, tensor] : golden.tensors) {
    if (!name.starts_with("grad.")) continue;
    const std::string ours = test::trained_name(name.substr(5));
    CAPTURE(name, ours);
    REQUIRE(trained.contains(ours));
    CHECK(test::max_difference(trained.find(ours)->second.grad(), tensor) <= kTolerance * largest);
    ++compared;
  }
  CHECK(compared == trained.size());
}

TEST_CASE("merging LoRA gives the fixture's weights and logits", "[nn][parity]") {
  const Golden golden = test::read_golden("lora_merged"), source = test::read_golden("vit_pyra_lora");
  nn::Vit vit = test::golden_model(source);
  test::attach_golden_lora(vit, source);
  const sdk::TensorMap merged = nn::merged_weights(vit);
  size_t compared = 0;
  for (const auto& [name, tensor] : golden.tensors) {
    if (!name.starts_with("blocks.")) continue;
    CHECK(relative_difference(merged.find(name)->second, tensor) <= kTolerance);
    ++compared;
  }
  CHECK(compared > 0);
  const at::NoGradGuard no_grad;
  const nn::Vit dense(vit.config(), merged);
  CHECK(relative_difference(dense.forward(golden.at("input")), golden.at("logits_dense")) <= kTolerance);
}

TEST_CASE("in bf16 the fixtures' logits stay near", "[nn][parity]") {
  const Golden golden = test::read_golden("vit_dense");
  const nn::Vit vit = test::golden_model(golden);
  const at::Tensor logits = engine::CpuEngine(vit, at::kBFloat16).run(golden.at("input"));
  CHECK(relative_difference(logits, golden.at("logits")) <= 3e-2);
}
