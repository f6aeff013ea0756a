// Twelve optimiser steps against the fixture, the losses on the way and the trained tensors at the end; and one step of
// DiffRate's search, its counts, logits and gradients.
#include <regex>

#include "goldens.h"
#include "support.h"
#include "train/adamw.h"
#include "train/rate_search.h"

using namespace pyra;
using test::Golden;

namespace {

constexpr double kTolerance = 1e-5;

/// The number after `word` in the fixture's words: "AdamW beta .9 .999 eps 1e-8 … weight decay 1e-4".
double number_after(const std::string& text, const std::string& word) {
  std::smatch match;
  if (!std::regex_search(text, match, std::regex(word + R"(\s+([0-9.eE+-]+))"))) {
    throw std::runtime_error("no number after '" + word + "' in: " + text);
  }
  return std::stod(match[1]);
}

train::AdamWSettings described_settings(const Golden& golden) {
  const std::string text = golden.describe.at("optimizer");
  return {.beta1 = number_after(text, "beta"),
          .beta2 = number_after(text, R"(beta\s+[0-9.]+)"),
          .eps = number_after(text, "eps"),
          .weight_decay = number_after(text, "decay")};
}

}  // namespace

TEST_CASE("AdamW on LoRA, PYRA and head gives the fixture's losses and tensors", "[train][parity]") {
  const Golden golden = test::read_golden("train_adamw"), source = test::read_golden("vit_pyra_lora");
  nn::Vit vit = test::golden_model(source);
  test::attach_golden_lora(vit, source);
  test::attach_golden_pyra(vit, source);
  const sdk::TensorMap trained = vit.train_mode();
  for (const auto& [name, tensor] : golden.tensors) {
    if (name.starts_with("start.")) trained.at(test::trained_name(name.substr(6))).detach().copy_(tensor);
  }
  vit.weights_changed();

  train::AdamW optimiser(trained, described_settings(golden));
  const at::Tensor rates = golden.at("learning_rates"), losses = golden.at("losses");
  REQUIRE(rates.numel() > 0);
  for (int64_t step = 0; step < rates.numel(); ++step) {
    const at::Tensor loss =
        at::cross_entropy_loss(vit.forward(source.at("input"), {.training = true}), source.at("labels"));
    loss.backward();
    const double lr = rates[step].item<double>();
    optimiser.step(lr, lr);
    vit.weights_changed();
    CAPTURE(step, lr);
    CHECK(test::max_difference(loss.detach(), losses[step]) <= kTolerance);
  }
  size_t compared = 0;
  for (const auto& [name, tensor] : golden.tensors) {
    if (!name.starts_with("end.")) continue;
    CAPTURE(name);
    CHECK(test::max_difference(trained.at(test::trained_name(name.substr(4))), tensor) <= kTolerance);
    ++compared;
  }
  CHECK(compared == trained.size());
}

namespace {

/// "cross-entropy + 5e4*(flops/1e9-0.0085932544)^2" as settings.
train::RateSearchSettings described_search(const Golden& golden) {
  const std::string text = golden.describe.at("loss");
  const std::regex pattern(R"(cross-entropy\s*\+\s*([0-9.eE+-]+)\*\(flops/([0-9.eE+]+)-([0-9.eE+-]+)\)\^2)");
  std::smatch match;
  if (!std::regex_search(text, match, pattern)) throw std::runtime_error("no weight, unit and target in: " + text);
  const double unit = std::stod(match[2]);
  return {.target = std::stod(match[3]) * unit, .weight = std::stod(match[1]), .unit = unit};
}

double relative_difference(const at::Tensor& a, const at::Tensor& b) {
  return test::max_difference(a, b) / std::max(1e-30, b.detach().abs().max().item<double>());
}

}  // namespace

TEST_CASE("a step of DiffRate's search gives the fixture's counts, logits, loss and gradients", "[train][parity]") {
  const Golden golden = test::read_golden("diffrate_search_step");
  const std::string from = golden.describe.at("starts_from");
  const nn::Vit vit = test::golden_model(test::read_golden(from.substr(0, from.find(':'))));
  const nn::VitConfig& config = vit.config();
  sdk::TensorMap logits;
  for (const auto& [name, tensor] : golden.tensors)
    if (name.starts_with("blocks.")) logits.emplace(name, tensor.clone().set_requires_grad(true));

  const train::Rates rates = train::rates_of(config, logits);
  const auto kept = golden.describe.at("kept").get<std::vector<std::vector<int64_t>>>();
  REQUIRE(kept.size() == 2);
  for (size_t block = 0; block < rates.prune.size(); ++block) {
    CHECK(rates.prune[block].count == kept[0].at(block));
    CHECK(rates.merge[block].count == kept[1].at(block));
  }
  const at::Tensor& input = golden.at("input");
  train::RateMasks masks(config, rates, input.size(0));
  const at::Tensor found = vit.forward(input, {.soft = &masks});
  const at::Tensor cross_entropy = at::cross_entropy_loss(found, golden.at("labels"));
  const at::Tensor macs = train::soft_macs(config, rates);
  CHECK(relative_difference(found, golden.at("logits")) <= kTolerance);
  CHECK(relative_difference(cross_entropy.reshape({1}), golden.at("ce")) <= kTolerance);
  CHECK(macs.item<double>() == golden.at("flops").item<double>());

  train::search_loss(cross_entropy, macs, described_search(golden)).backward();
  size_t compared = 0;
  for (const auto& [name, tensor] : golden.tensors) {
    if (!name.starts_with("grad.")) continue;
    CAPTURE(name);
    REQUIRE(logits.contains(name.substr(5)));
    CHECK(relative_difference(logits.at(name.substr(5)).grad(), tensor) <= kTolerance);
    ++compared;
  }
  CHECK(compared == logits.size());
}
