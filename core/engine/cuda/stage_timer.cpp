#include "engine/cuda/stage_timer.h"

#include <algorithm>

#include "kernels/cuda/cuda_call.h"

namespace pyra::engine {

StageTimer::~StageTimer() {
  for (const Mark& mark : marks_) (void)cudaEventDestroy(mark.end);
}

void StageTimer::begin(cudaStream_t stream) {
  mark("", 0, 0, stream);
}

void StageTimer::mark(const char* name, double bytes, double operations, cudaStream_t stream) {
  Mark mark{name, bytes, operations, nullptr};
  PYRA_CUDA(cudaEventCreate(&mark.end));
  marks_.push_back(mark);
  PYRA_CUDA(cudaEventRecord(mark.end, stream));
}

std::vector<Stage> StageTimer::read() const {
  std::vector<Stage> stages;
  if (marks_.empty()) return stages;
  PYRA_CUDA(cudaEventSynchronize(marks_.back().end));
  for (size_t i = 1; i < marks_.size(); ++i) {
    const Mark& mark = marks_[i];
    float ms = 0;
    PYRA_CUDA(cudaEventElapsedTime(&ms, marks_[i - 1].end, mark.end));
    auto stage = std::ranges::find(stages, mark.name, &Stage::name);
    if (stage == stages.end()) stage = stages.insert(stages.end(), Stage{.name = mark.name});
    ++stage->calls;
    stage->ms += double(ms);
    stage->bytes += mark.bytes;
    stage->operations += mark.operations;
  }
  return stages;
}

}  // namespace pyra::engine
