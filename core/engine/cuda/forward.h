// The forward pass as a sequence of kernels: on one stream, or with the matching beside it on another.
#pragma once
#include <array>
#include <exception>
#include <memory>
#include <vector>

#include "engine/cuda/device_model.h"
#include "engine/cuda/host_planner.h"
#include "engine/cuda/span_plan.h"
#include "engine/cuda/stage_timer.h"
#include "kernels/cuda/attention.h"
#include "kernels/cuda/layer_norm.h"
#include "kernels/cuda/linear.h"

namespace pyra::engine {

/// Room for the activations of up to `batch` images, one piece of memory planned once: nothing is allocated while a
/// forward pass runs. Of what a block makes, two things share a place where one is dead before the other is written: q,
/// k, v and the MLP's hidden rows; the norm's output and attention's.
struct Activations {
  Activations() = default;
  Activations(const DeviceModel& model, int batch);
  /// Bytes that a batch of that size would take.
  [[nodiscard]] static size_t bytes_for(const DeviceModel& model, int batch);

  int batch = 0;
  std::array<DeviceSpan, 2> stream;  ///< [B,N,C] residual type; a merge reads one and writes the other
  DeviceSpan rows;                   ///< [B,N,C] compute type: a norm's output, attention's output
  DeviceSpan wide;                   ///< [B,N,max(3C, mlp)] compute type: q, k, v, hidden rows, image patches
  std::array<DeviceSpan, 2> sizes;   ///< [B,N] fp32
  DeviceSpan keep, src, dst, cosine, class_rows;
  DeviceSpan tallies;                   ///< [blocks,2] int: of attention, of matching
  DeviceSpan pooled, features, logits;  ///< [B,C], [B,C], [B,classes] fp32

 private:
  [[nodiscard]] SpanPlan plan(const DeviceModel& model, int images);
  DeviceMemory arena_;
};

/// Where the images of a batch lie.
struct DeviceImages {
  const void* data = nullptr;
  bool is_float = false;  ///< fp32 [B,3,S,S], normalised; else uint8 [B,S,S,3]
};

/// Owns the streams, the workspace of the matrix products and the events that join the streams.
class Forward {
 public:
  Forward(const nn::Vit& model, const DeviceModel& device_model, const nn::Preprocess& preprocess, bool exact_gelu,
          std::shared_ptr<kernels::cuda::GemmCache> cache);
  ~Forward();
  Forward(const Forward&) = delete;
  Forward& operator=(const Forward&) = delete;

  [[nodiscard]] cudaStream_t stream() const { return main_; }
  /// Images to patches, in activations.wide.
  void read_images(const DeviceImages& images, int batch, const Activations& activations) const;
  /// Whether a pass that shares the GPU is other kernels than one that has it alone; the results are the same bits.
  [[nodiscard]] bool minds_company(int batch) const;
  /// Patches to logits. Neither allocates nor synchronises once every shape's matrix product has been chosen (the first
  /// call with this batch), so it can be captured. `beside`: another pass shares the GPU.
  void enqueue(int batch, const Activations& activations, bool beside);
  /// Likewise, each step alone for the timer: matching waits its turn.
  void enqueue_timed(int batch, const Activations& activations, StageTimer& timer);
  /// What a third party's plan() threw since the last call, the first of the first block that failed, if
  /// anything.
  [[nodiscard]] std::exception_ptr take_failure();

 private:
  struct State;
  void embed(State& state);
  void block(State& state, const DeviceBlock& block, int index);
  void enqueue(State& state);
  int attend(const State& state, const kernels::cuda::AttentionCall& call);
  void attend_and_match(State& state, const DeviceBlock& block, int index);
  void match(const State& state, const DeviceMerge& merge, cudaStream_t stream, int* done, bool qkv_is_there);
  void rank(const State& state, const DeviceMerge& merge);
  void merge(State& state, const DeviceBlock& block, int index);
  void mlp(State& state, const DeviceBlock& block);
  void head(State& state);
  void classify(const kernels::cuda::LayerNormCall& features, const DeviceLinear& head, void* logits, bool add);
  void linear(const DeviceLinear& layer, kernels::cuda::LinearCall call, bool gelu = false);
  void block_linear(const char* name, const DeviceLinear& layer, const kernels::cuda::LinearCall& call,
                    bool gelu = false);
  [[nodiscard]] kernels::cuda::LinearCall rows_to_rows(const void* x, int rows, void* y, bool onto_stream) const;
  [[nodiscard]] kernels::cuda::LinearCall projection(const State& state) const;
  [[nodiscard]] kernels::cuda::AttentionCall attention(const State& state, bool class_rows) const;
  void mark(const char* name, double bytes, double operations = 0);
  void norm(State& state, const DeviceNorm& weights, void* y);

  const DeviceModel& model_;
  nn::Preprocess preprocess_;
  bool exact_gelu_;
  cudaStream_t main_ = nullptr, side_ = nullptr;
  cudaEvent_t fork_ = nullptr, join_ = nullptr;
  kernels::cuda::LinearRunner runner_;
  StageTimer* timer_ = nullptr;                         ///< of the pass being enqueued
  std::vector<std::unique_ptr<HostPlanner>> planners_;  ///< by block; null where the kernels plan
};

}  // namespace pyra::engine
