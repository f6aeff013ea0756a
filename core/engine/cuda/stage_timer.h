// Times the steps of a forward pass by an event after each.
#pragma once
#include <cuda_runtime_api.h>

#include <string>
#include <vector>

#include "engine/engine.h"

namespace pyra::engine {

class StageTimer {
 public:
  StageTimer() = default;
  ~StageTimer();
  StageTimer(const StageTimer&) = delete;
  StageTimer& operator=(const StageTimer&) = delete;

  void begin(cudaStream_t stream);
  /// What was enqueued since the last mark was a step of this name.
  void mark(const char* name, double bytes, double operations, cudaStream_t stream);
  /// Waits for the last mark; steps of one name added up, in the order of their first.
  [[nodiscard]] std::vector<Stage> read() const;

 private:
  struct Mark {
    const char* name;
    double bytes, operations;
    cudaEvent_t end;
  };
  std::vector<Mark> marks_;
};

}  // namespace pyra::engine
