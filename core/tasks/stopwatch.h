// Times a compressed model against its dense one, in turns: a change of the machine's speed meets both.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>

#include "engine/engine.h"

namespace pyra::tasks {

struct Timing {
  double dense = 0, compressed = 0;  ///< median seconds a batch
  /// Median and quartiles over pairs of dense time / compressed time.
  double speedup = 0, low = 0, high = 0;
  int64_t pairs = 0;
};

class Stopwatch {
 public:
  Stopwatch(const nn::Vit& dense, const nn::Preprocess& preprocess, const engine::EngineOptions& options,
            int64_t batch);
  ~Stopwatch();

  /// At least `pairs` of runs, and more of them as long as `seconds` have not passed, up to four times as many.
  /// Error(130 or 143) when a signal came.
  [[nodiscard]] Timing time(const nn::Vit& compressed, int64_t pairs, double seconds) const;

 private:
  [[nodiscard]] double once(engine::Engine& engine) const;

  at::Tensor images_;
  nn::Preprocess preprocess_;
  engine::EngineOptions options_;
  std::unique_ptr<engine::Engine> dense_;
};

}  // namespace pyra::tasks
