// A training step as a sequence of kernels: forward, loss, backward down to what trains first. The optimiser follows in
// cuda_trainer.cpp.
#pragma once
#include "engine/cuda/forward.h"
#include "engine/cuda/train_memory.h"

namespace pyra::engine {

/// Where a step finds its batch, on the device.
struct TrainBatch {
  const void* images = nullptr;  ///< uint8 [B,S,S,3], or fp32 [B,3,S,S] if `is_float`
  bool is_float = false;
  const int32_t* labels = nullptr;      ///< [B]
  const float* branch_scale = nullptr;  ///< [depth,2,B], drop-path's factor; null: none is dropped
  kernels::cuda::StepStatus* status = nullptr;
  const float* teacher = nullptr;  ///< [B,classes], or null
  Distillation distillation{};     ///< how much it counts
};

/// A norm and where its results go.
struct NormPlaces {
  const TrainNorm* norm = nullptr;
  const DeviceSpan *normalised = nullptr, *inverse = nullptr, *y = nullptr;
  int64_t y_stride = 0;
};

class TrainStepRunner {
 public:
  /// Chooses where partial sums go: the model's segments are complete after this.
  TrainStepRunner(TrainModel& model, const nn::Preprocess& preprocess, int batch,
                  std::shared_ptr<kernels::cuda::GemmCache> cache);
  ~TrainStepRunner();
  TrainStepRunner(const TrainStepRunner&) = delete;
  TrainStepRunner& operator=(const TrainStepRunner&) = delete;

  [[nodiscard]] cudaStream_t stream() const { return main_; }
  [[nodiscard]] size_t bytes() const { return memory_.bytes; }
  /// Neither allocates nor synchronises once every shape's matrix product has been chosen (the first call).
  void enqueue(const TrainBatch& batch);

 private:
  void plan_partials();
  void plan_norm(const TrainNorm& norm, int rows);
  void plan_linear(const TrainLinear& layer, int rows);
  void plan_gate(const TrainBlock& block);
  float* add_partial(TrainedSlot slot, int chunks, int64_t chunk_stride);
  void point_to_partial(TrainedSlot slot, float* partial, int chunks, int64_t chunk_stride);
  [[nodiscard]] float* partial_of(TrainedSlot slot);

  void embed(const TrainBatch& batch);
  void forward_block(const TrainBatch& batch, int index);
  void add_and_norm(const float* branch_scale, const DeviceSpan* branch, int tokens, const NormPlaces& then = {});
  void low_rank_input(const TrainLinear& layer, int block, sdk::LinearKind kind, void* input, int rows);
  [[nodiscard]] kernels::cuda::LinearCall call_of(const TrainLinear& layer, const void* x, int rows) const;
  void product(const TrainLinear& layer, const void* x, int rows, void* y);
  void match(int index);
  void attend(int index);
  [[nodiscard]] const void* projection_input(int index);
  void merge(int index);
  void project_and_add(const TrainBatch& batch, int index);
  void choose_class(int index);
  void hidden_rows(int index);
  void head(const TrainBatch& batch);
  void copy_rows(const void* from, int from_stride, void* to, int to_stride, int columns, int rows);
  [[nodiscard]] const float* sizes() const;
  [[nodiscard]] const float* scale_of(const TrainBatch& batch, int block, int branch) const;

  void head_backward(const TrainBatch& batch);
  void backward_block(const TrainBatch& batch, int index);
  void backward_mlp(int index);
  void backward_norm2_and_merge(const TrainBatch& batch, int index);
  void backward_attention(int index);
  void backward_embed();
  void projection_backward(int index);
  void spread_class(int index);
  void norm_backward(const TrainNorm& norm, const DeviceSpan& normalised, const DeviceSpan& inverse, const void* d_y,
                     int64_t stride, int rows, int tokens, void* d_branch, const float* scale);
  void product_backward(const TrainLinear& layer, const void* dy, int64_t dy_stride, int rows, void* dx,
                        const void* activation = nullptr, int64_t dx_stride = 0);
  void low_columns_backward(const TrainLinear& layer, const void* dy, int rows, void* d_input);
  void low_rank_backward(const TrainLinear& layer, int block, sdk::LinearKind kind, const void* dy, int64_t dy_stride,
                         const void* x, int64_t x_stride, const TrainNorm* norm, void* d_input, int rows);
  void b_gradient(const TrainLinear& layer, int block, sdk::LinearKind kind, const void* dy, int64_t dy_stride,
                  int rows, cudaStream_t stream);
  void a_gradient(const TrainLinear& layer, const void* x, int64_t x_stride, const TrainNorm* norm, void* d_input,
                  int rows, bool input_needed, cudaStream_t stream);
  void qkv_gradients(int index);
  cudaStream_t begin_aside();
  void end_aside();
  void sum_columns(TrainedSlot slot, const void* d, DType dtype, int64_t stride, int rows, int channels,
                   const void* factor = nullptr);
  /// Whether anything trains at this position or before it.
  [[nodiscard]] bool needed(int position) const { return position >= model_.first_position; }

  TrainModel& model_;
  nn::Preprocess preprocess_;
  TrainMemory memory_;
  kernels::cuda::LinearRunner runner_;
  cudaStream_t main_ = nullptr, side_ = nullptr;
  cudaStream_t aside_ = nullptr;  ///< of lower priority: gradients that only the optimiser waits for
  cudaEvent_t fork_ = nullptr, join_ = nullptr;
  // Where the pass being enqueued stands.
  int stream_ = 0;  ///< of memory_.stream and memory_.d_stream
  bool exact_gelu_ = false;
  bool aside_runs_ = false;  ///< has work that main_ has not waited for
};

}  // namespace pyra::engine
