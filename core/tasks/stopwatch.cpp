#include "tasks/stopwatch.h"

#include <ATen/Functions.h>

#include <chrono>

#include "base/clock.h"
#include "base/philox.h"
#include "tasks/bench_stats.h"
#include "tasks/run_model.h"

namespace pyra::tasks {
namespace {

using Clock = std::chrono::steady_clock;

at::Tensor timing_images(int64_t batch, int64_t size) {
  at::Tensor images = at::empty({batch, 3, size, size}, at::kFloat);
  const Philox random(0, RandomStream::bench);
  float* values = images.mutable_data_ptr<float>();
  for (int64_t i = 0; i < images.numel(); ++i) values[i] = 2 * random.uniform(uint64_t(i)) - 1;
  return images;
}

}  // namespace

Stopwatch::Stopwatch(const nn::Vit& dense, const nn::Preprocess& preprocess, const engine::EngineOptions& options,
                     int64_t batch)
    : images_(timing_images(batch, dense.config().image_size)),
      preprocess_(preprocess),
      options_(options),
      dense_(engine::make_engine(dense, preprocess, options)) {}

Stopwatch::~Stopwatch() = default;

double Stopwatch::once(engine::Engine& engine) const {
  return engine.time_ms(images_, 1, 1)[0] * 1e-3;
}

Timing Stopwatch::time(const nn::Vit& compressed, int64_t pairs, double seconds) const {
  const auto engine = engine::make_engine(compressed, preprocess_, options_);
  // Weights are packed and algorithms chosen on first use: not what is measured.
  static_cast<void>(once(*dense_));
  static_cast<void>(once(*engine));
  std::vector<double> dense_times, times, ratios;
  for (const auto start = Clock::now();
       int64_t(ratios.size()) < pairs || (int64_t(ratios.size()) < 4 * pairs && seconds_since(start) < seconds);) {
    stop_if_asked("timing");
    dense_times.push_back(once(*dense_));
    times.push_back(once(*engine));
    ratios.push_back(dense_times.back() / times.back());
  }
  return {quantile(dense_times, 0.5), quantile(times, 0.5),   quantile(ratios, 0.5),
          quantile(ratios, 0.25),     quantile(ratios, 0.75), int64_t(ratios.size())};
}

}  // namespace pyra::tasks
