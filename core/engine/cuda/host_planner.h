// A third party's plan() inside the graph: inputs copied to the host, the plan made there, its indices copied back.
//
// No CUDA code is asked of the plugin and nothing waits outside the stream; what it costs is the way to the host and
// back, and the CPU's time. A merger with a recipe (sdk/plan_recipe.h) never comes here.
#pragma once
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "base/error.h"
#include "engine/cuda/device_memory.h"
#include "engine/engine.h"
#include "kernels/cuda/merge.h"

namespace pyra::engine {

/// The same bytes on both sides.
struct Mirror {
  void reserve(size_t bytes);
  void to_host(size_t bytes, cudaStream_t stream);
  void to_device(size_t bytes, cudaStream_t stream);
  DeviceMemory device;
  PinnedMemory host;
};

class HostPlanner {
 public:
  /// For one block of a model, whose merger it keeps. tokens and kept: entering and leaving.
  HostPlanner(const nn::Vit& model, int block, int tokens, int kept);

  /// What is on the device: the stream [B,N,C], sizes (null: all one), q k v, class rows.
  struct Inputs {
    const void* stream = nullptr;
    const float* sizes = nullptr;
    const void* qkv = nullptr;
    const float* class_rows = nullptr;
    kernels::cuda::DType residual = kernels::cuda::DType::fp32, compute = kernels::cuda::DType::fp32;
  };
  /// Makes room for `batch` images; not while captured.
  void reserve(int batch);
  /// Enqueues copies, the plan and its way back, and fills the plan's part of `call`. The first call waits for the
  /// plan, to learn what its shape is; later ones may be captured, and a plan of another shape is an error of the
  /// merger's.
  void enqueue(const Inputs& inputs, int batch, kernels::cuda::MergeCall& call, cudaStream_t stream);
  /// What plan() (under guard(), base/guard.h) or its check threw since the last call, if anything.
  [[nodiscard]] std::exception_ptr take_failure();
  [[nodiscard]] const sdk::Needs& needs() const { return needs_; }

 private:
  /// What of a plan depends on the schedule alone, and so must be the same every time.
  struct Shape {
    int merged = 0;
    bool weighted = true, gate = false, src_weight = false, src_size_scale = false;
    float gate_eps = 0;
    bool operator==(const Shape&) const = default;
  };
  struct Task {
    HostPlanner* planner;
    int batch;
    bool has_sizes;
    at::ScalarType stream_type;
  };
  static void run(void* task);
  [[nodiscard]] Shape make_plan(const Task& task);
  void keep_failure(std::exception_ptr failure) noexcept;
  void take_harmless_plan(int batch) noexcept;
  void send_inputs(const Inputs& inputs, int batch, cudaStream_t stream);
  void send_plan(int batch, kernels::cuda::MergeCall& call, cudaStream_t stream);

  nn::VitConfig config_;
  std::string who_;  ///< in errors: merger and block
  std::shared_ptr<const sdk::TokenMerger> merger_;
  sdk::Schedule schedule_;
  nn::TensorMap learned_;
  sdk::Needs needs_;
  int block_ = 0, tokens_ = 0, kept_ = 0;
  std::optional<Shape> shape_;
  std::vector<std::unique_ptr<Task>> tasks_;  ///< what captured graphs point to
  Mirror stream_, sizes_, keys_, attention_, keep_, src_, dst_, weight_, scale_, gate_;
  std::mutex mutex_;  ///< of failure_: the driver's thread makes plans while others look
  std::exception_ptr failure_;
};

}  // namespace pyra::engine
