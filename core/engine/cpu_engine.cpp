#include "engine/cpu_engine.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <chrono>

#include "base/clock.h"
#include "base/error.h"

namespace pyra::engine {
namespace {

// Four images of a ViT-Ti keep their widest activation (197 x 768 fp32 each) near a core's cache, and one
// call's fixed costs are shared by four.
constexpr int64_t kTile = 4;

using Clock = std::chrono::steady_clock;

}  // namespace

CpuEngine::CpuEngine(const nn::Vit& model, at::ScalarType compute, const nn::Preprocess& preprocess)
    : model_(model), compute_(compute), preprocess_(preprocess) {}

at::Tensor CpuEngine::run(const at::Tensor& given) {
  const at::NoGradGuard no_grad;
  const at::Tensor images = given.scalar_type() == at::kByte ? nn::normalise(given, preprocess_) : given;
  const nn::ForwardOptions options{.compute = compute_};
  const int64_t batch = images.size(0), threads = at::get_num_threads();
  // A lone image has only the kernels' own parallelism to gain from.
  if (batch < 2 || threads < 2 || at::in_parallel_region()) return model_.forward(images, options);

  const int64_t tile = std::clamp<int64_t>((batch + threads - 1) / threads, 1, kTile);
  const int64_t tiles = (batch + tile - 1) / tile;
  at::Tensor logits = at::empty({batch, model_.config().num_classes}, at::kFloat);
  const bool inference = c10::InferenceMode::is_enabled();
  at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    // Both are a thread's own: without them a caller's inference tensors could not be written here.
    const c10::InferenceMode caller_mode(inference);
    const at::NoGradGuard no_grad_here;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * tile, count = std::min(tile, batch - first);
      logits.narrow(0, first, count).copy_(model_.forward(images.narrow(0, first, count), options));
    }
  });
  return logits;
}

void CpuEngine::submit(const at::Tensor& images) {
  const auto start = Clock::now();
  at::Tensor logits = run(images);
  done_.emplace_back(std::move(logits), seconds_since(start));
}

at::Tensor CpuEngine::collect() {
  if (done_.empty()) fail(ExitCode::internal, "engine: collect() without a batch submitted");
  at::Tensor logits = std::move(done_.front().first);
  last_seconds_ = done_.front().second;
  done_.pop_front();
  return logits;
}

std::vector<double> CpuEngine::time_ms(const at::Tensor& given, int64_t runs, int64_t /*in_flight*/) {
  const at::Tensor images = given.scalar_type() == at::kByte ? nn::normalise(given, preprocess_) : given;
  std::vector<double> times;
  for (int64_t i = 0; i < runs; ++i) {
    const auto start = Clock::now();
    (void)run(images);
    times.push_back(std::chrono::duration<double, std::milli>(Clock::now() - start).count());
  }
  return times;
}

}  // namespace pyra::engine
