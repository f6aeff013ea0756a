#include "tasks/likeness.h"

#include <ATen/Functions.h>

#include <cmath>

#include "base/philox.h"
#include "base/text.h"
#include "data/loader.h"
#include "tasks/run_model.h"

namespace pyra::tasks {
namespace {

/// The model with a head that hands its features through.
std::unique_ptr<nn::Vit> feature_model(const Model& model, bool merged) {
  nn::VitConfig config = model.file.config;
  config.num_classes = config.embed_dim;
  sdk::TensorMap weights = model.file.weights;
  for (const char* head : {"head", "head_dist"}) {
    if (head == std::string_view("head_dist") && !config.distilled) continue;
    weights[cat(head, ".weight")] = at::eye(config.embed_dim, at::kFloat);
    weights[cat(head, ".bias")] = at::zeros({config.embed_dim}, at::kFloat);
  }
  auto vit = std::make_unique<nn::Vit>(std::move(config), std::move(weights));
  if (merged && model.vit->merge()) vit->set_merge(std::make_unique<nn::MergeSetup>(*model.vit->merge()));
  return vit;
}

at::Tensor run_all(const nn::Vit& vit, const nn::Preprocess& preprocess, const at::Tensor& images,
                   const engine::EngineOptions& options, int64_t batch) {
  const auto engine = engine::make_engine(vit, preprocess, options);
  return run_in_batches(*engine, images, batch, "the search");
}

}  // namespace

JudgeImages images_of_split(const data::Dataset& dataset, const std::string& split, int64_t count,
                            const nn::Preprocess& preprocess) {
  const data::ImageSet set = data::load_some(dataset, split, count, preprocess, data::BadImages::skip);
  return {set.images, set.labels};
}

JudgeImages noise_images(int64_t count, int64_t size) {
  const Philox random(0, RandomStream::search, 1);
  at::Tensor sum = at::zeros({count, 3, size, size}, at::kFloat);
  uint64_t at = 0;
  for (int64_t side = 2; side <= size; side *= 2) {
    at::Tensor octave = at::empty({count, 3, side, side}, at::kFloat);
    float* values = octave.mutable_data_ptr<float>();
    for (int64_t i = 0; i < octave.numel(); ++i) values[i] = random.normal(at++);
    // Amplitude falls with frequency: an octave of twice the frequency has half of it.
    sum += at::upsample_bilinear2d(octave, {size, size}, false) * (2.0 / double(side));
  }
  const at::Tensor flat = sum.flatten(1);
  const at::Tensor deviation = flat.std(1, /*unbiased=*/false).clamp_min(1e-6).view({-1, 1, 1, 1});
  const at::Tensor images = (sum / deviation * 56 + 118).round().clamp(0, 255).to(at::kByte);
  return {images.permute({0, 2, 3, 1}).contiguous(), {}};
}

Likeness::Likeness(const Model& model, JudgeImages images, const engine::EngineOptions& options, int64_t batch)
    : images_(std::move(images)), options_(options), batch_(batch) {
  dense_ = features(model, false);
  mean_ = dense_.mean(0, /*keepdim=*/true);
  dense_ = dense_ - mean_;
}

at::Tensor Likeness::features(const Model& model, bool merged) const {
  return run_all(*feature_model(model, merged), model.file.preprocess, images_.images, options_, batch_);
}

double Likeness::of(const Model& model) const {
  return at::cosine_similarity(features(model, true) - mean_, dense_, 1).mean().item<double>();
}

SampledAccuracy accuracy_on(const Model& model, const JudgeImages& images, const engine::EngineOptions& options,
                            int64_t batch) {
  const at::Tensor logits = run_all(*model.vit, model.file.preprocess, images.images, options, batch);
  SampledAccuracy result{.images = images.labels.size(0),
                         .correct = logits.argmax(1).eq(images.labels).sum().item<int64_t>()};
  constexpr double z = 1.959964;  // of the normal distribution, 95 %
  const auto n = double(result.images);
  const double p = result.share(), centre = p + z * z / (2 * n);
  const double reach = z * std::sqrt(p * (1 - p) / n + z * z / (4 * n * n));
  result.low = (centre - reach) / (1 + z * z / n);
  result.high = (centre + reach) / (1 + z * z / n);
  return result;
}

}  // namespace pyra::tasks
