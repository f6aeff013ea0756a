// Twelve optimiser steps against the fixture: the losses on the way and the trained tensors at the end.
#include <regex>

#include "goldens.h"
#include "support.h"
#include "train/adamw.h"

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
