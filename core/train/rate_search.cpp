#include "train/rate_search.h"

#include <chrono>
#include <cmath>

#include "base/clock.h"
#include "base/error.h"

namespace pyra::train {
namespace {

constexpr double kWeightDecay = 0;  // the rates have no natural zero to decay to

std::string logits_name(int64_t block, const char* kind) {
  return cat("blocks.", block, ".", kind, "_logits");
}

sdk::TensorMap make_logits(const nn::VitConfig& config, const KeptCounts& start) {
  sdk::TensorMap logits;
  for (int64_t block = 0; block < config.depth; ++block) {
    const auto add = [&](const char* kind, const std::vector<int64_t>& counts) {
      at::Tensor values = at::zeros({block == 0 ? 1 : config.patches()}, at::kFloat);
      if (block > 0 && !counts.empty())
        values = logits_for(counts[size_t(block)], config.patches(), config.protected_tokens());
      logits.emplace(logits_name(block, kind), values.set_requires_grad(true));
    };
    add("prune", start.prune);
    add("merge", start.merge);
  }
  return logits;
}

/// The mean candidate under p_i ~ exp(tilt candidate_i / patches).
double tilted_mean(double tilt, int64_t patches) {
  double sum = 0, weighted = 0;
  for (int64_t kept = 1; kept <= patches; ++kept) {
    const double share = double(kept) / double(patches);
    const double p = std::exp(tilt * share - std::max(tilt, 0.0));
    sum += p;
    weighted += p * double(kept);
  }
  return weighted / sum;
}

KeptCounts scaled(const nn::VitConfig& config, const KeptCounts& counts, double factor) {
  const int64_t least = config.protected_tokens() + 1;
  int64_t tokens = config.tokens();
  KeptCounts result;
  for (size_t block = 0; block < counts.prune.size(); ++block) {
    const auto count = [&](int64_t kept) {
      if (block == 0) return tokens;
      const double wanted = std::min(double(kept) * factor, double(tokens));
      return std::clamp(int64_t(std::llround(wanted)), least, tokens);
    };
    result.prune.push_back(tokens = count(counts.prune[block]));
    result.merge.push_back(tokens = count(counts.merge[block]));
  }
  return result;
}

}  // namespace

at::Tensor logits_for(int64_t count, int64_t patches, int64_t protected_tokens) {
  // In the middle of those sums that are rounded up to it; the very least takes a distribution that is certain, and
  // such a one has no gradient.
  const double wanted = std::clamp(double(count - protected_tokens) - 0.5, 1.0 + 1e-3, double(patches) - 1e-3);
  double low = -64 * double(patches), high = 64 * double(patches);
  for (int i = 0; i < 100; ++i) {
    const double middle = (low + high) / 2;
    (tilted_mean(middle, patches) < wanted ? low : high) = middle;
  }
  return at::arange(patches, 0, -1, at::kDouble).mul_((low + high) / 2 / double(patches)).to(at::kFloat);
}

Rates rates_of(const nn::VitConfig& config, const sdk::TensorMap& logits) {
  Rates rates;
  for (int64_t block = 0; block < config.depth; ++block) {
    const auto rate = [&](const char* kind) {
      return rate_of(logits.find(logits_name(block, kind))->second, config.patches(), config.protected_tokens());
    };
    rates.prune.push_back(rate("prune"));
    rates.merge.push_back(rate("merge"));
  }
  return rates;
}

at::Tensor search_loss(const at::Tensor& cross_entropy, const at::Tensor& macs, const RateSearchSettings& settings) {
  return cross_entropy + settings.weight * ((macs - settings.target) / settings.unit).square();
}

at::Tensor pass_cross_entropy(const engine::SoftPassResult& result, const Rates& rates,
                              std::span<const kernels::SoftCounts> counts) {
  at::Tensor sum = at::scalar_tensor(result.cross_entropy, at::kDouble);
  const auto add = [&](const at::Tensor& survival, const at::Tensor& gradient) {
    const at::Tensor linear = (survival * gradient).sum();
    sum = sum + (linear - linear.detach());
  };
  for (size_t block = 0; block < counts.size(); ++block) {
    if (counts[block].prunes()) add(rates.prune[block].survival, result.d_prune[int64_t(block)]);
    if (counts[block].merges()) add(rates.merge[block].survival, result.d_merge[int64_t(block)]);
  }
  return sum;
}

KeptCounts fit_counts(const nn::VitConfig& config, const KeptCounts& counts, int64_t target) {
  const auto fits = [&](double factor) {
    return nn::count_macs(config, scaled(config, counts, factor).merge) <= target;
  };
  double low = 0, high = double(config.tokens());
  if (!fits(low)) return {};
  if (fits(high)) return scaled(config, counts, high);
  for (int i = 0; i < 60; ++i) {
    const double middle = (low + high) / 2;
    (fits(middle) ? low : high) = middle;
  }
  return scaled(config, counts, low);
}

RateSearch::RateSearch(const nn::Vit& model, const data::StoredSet& images, const nn::Preprocess& preprocess,
                       const RateSearchSettings& settings)
    : model_(model),
      images_(images),
      preprocess_(preprocess),
      settings_(settings),
      logits_(make_logits(model.config(), settings.start)),
      optimiser_(logits_, {.weight_decay = kWeightDecay}) {
  if (images.labels.size(0) == 0) fail(ExitCode::input, "there is no image to search rates on");
  if (model.config().depth < 2)
    fail(ExitCode::usage, "the model has one block, and the first keeps all its tokens: there are no rates to search");
  if (settings.device == "cpu") return;
  pass_ = engine::make_cuda_soft_pass(model, preprocess,
                                      {.device = settings.device,
                                       .precision = settings.precision,
                                       .batch = images_per_step(),
                                       .proportional_attention = settings.proportional_attention});
}

int64_t RateSearch::images_per_step() const {
  return std::min(settings_.batch, images_.labels.size(0));
}

int64_t RateSearch::steps_per_epoch() const {
  return images_.labels.size(0) / images_per_step();
}

Rates RateSearch::rates() const {
  return rates_of(model_.config(), logits_);
}

KeptCounts RateSearch::counts() const {
  const at::NoGradGuard no_gradients;
  return kept_counts(rates(), model_.config().tokens());
}

std::vector<int64_t> RateSearch::next_indices() {
  if (order_epoch_ != position_.epoch) {
    order_ = data::epoch_order(images_.labels.size(0), settings_.seed, position_.epoch);
    order_epoch_ = position_.epoch;
  }
  const auto begin = order_.begin() + position_.batch * images_per_step();
  return {begin, begin + images_per_step()};
}

RateSearch::Outcome RateSearch::outcome_on_cpu(const std::vector<int64_t>& indices, const Rates& rates) const {
  const data::Batch batch = data::make_batch(images_, indices, preprocess_, {}, settings_.seed, position_.epoch);
  const auto compute = settings_.precision == engine::Precision::bf16 ? at::kBFloat16 : at::kFloat;
  RateMasks masks(model_.config(), rates, images_per_step(), settings_.proportional_attention);
  const at::Tensor logits = model_.forward(batch.images, {.compute = compute, .soft = &masks});
  return {.cross_entropy = at::cross_entropy_loss(logits, batch.labels),
          .correct = (logits.detach().argmax(1) == batch.labels).sum().item<int64_t>()};
}

RateSearch::Outcome RateSearch::outcome_of_pass(const std::vector<int64_t>& indices, const Rates& rates) {
  const int64_t tokens = model_.config().tokens(), side = images_.images.image_size();
  const at::Tensor images = at::empty({images_per_step(), side, side, 3}, at::kByte);
  images_.images.read(indices, images.data_ptr<uint8_t>());
  const at::Tensor labels = images_.labels.index_select(0, at::tensor(indices, at::kLong));
  const std::vector<kernels::SoftCounts> counts = soft_counts(kept_counts(rates, tokens), tokens);
  const engine::SoftPassResult result = pass_->run({.images = images, .labels = labels}, counts);
  return {.cross_entropy = pass_cross_entropy(result, rates, counts), .correct = result.correct};
}

void RateSearch::step() {
  const auto start = std::chrono::steady_clock::now();
  const std::vector<int64_t> indices = next_indices();
  const at::AutoGradMode gradients(true);
  const Rates now = rates();
  const Outcome outcome = pass_ ? outcome_of_pass(indices, now) : outcome_on_cpu(indices, now);
  const at::Tensor cross_entropy = outcome.cross_entropy, macs = soft_macs(model_.config(), now);
  const at::Tensor loss = search_loss(cross_entropy, macs, settings_);
  double norm = 0;
  if (loss.isfinite().item<bool>()) {
    loss.backward();
    norm = optimiser_.gradient_norm();
  }
  if (!loss.isfinite().item<bool>() || !std::isfinite(norm)) {
    optimiser_.drop_gradients();
    throw Diverged(cat("the search diverged at step ", position_.step + 1, " (epoch ", position_.epoch + 1,
                       ", learning rate ", settings_.lr, "): cross-entropy ", cross_entropy.item<double>(),
                       ", gradient norm ", norm));
  }
  optimiser_.set_steps(position_.step);
  optimiser_.step(settings_.lr, settings_.lr);
  last_cross_entropy_ = cross_entropy.item<double>();
  last_macs_ = int64_t(std::llround(macs.item<double>()));
  position_.seconds += seconds_since(start);
  advance(outcome.correct, images_per_step());
}

void RateSearch::advance(int64_t correct, int64_t images) {
  position_.loss_sum += last_cross_entropy_ * double(images);
  position_.correct += correct;
  position_.images += images;
  ++position_.step;
  if (++position_.batch < steps_per_epoch()) return;
  position_ = {.step = position_.step, .epoch = position_.epoch + 1, .batch = 0, .seconds = position_.seconds};
}

void RateSearch::restore(const Position& position, const sdk::TensorMap& state, const std::string& where) {
  restore_trained(optimiser_.tensors(), state, where);
  position_ = position;
}

}  // namespace pyra::train
