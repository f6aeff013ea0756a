// A pass of DiffRate's search on a GPU: all tokens through the frozen model under masks, the loss, and back to the
// masks alone. No weight has a gradient. What tokens survive changes from step to step, and kernels' launches with it,
// so there is no graph; a pass waits for the device once, at its end.
#pragma once
#include <array>
#include <memory>

#include "engine/cuda/device_model.h"
#include "engine/soft_pass.h"
#include "kernels/cuda/adamw.h"
#include "kernels/cuda/linear.h"

namespace pyra::engine {

/// What the forward pass of a block leaves for the way back. `compute` is the type of the products' operands.
struct SoftBlock {
  DeviceMemory normalised1, normalised2;  ///< [rows,C] compute: norm1's and norm2's rows before weight and bias
  DeviceMemory inverse1, inverse2;        ///< [rows] fp32
  DeviceMemory qkv, attended;             ///< [rows,3C], [rows,C] compute
  DeviceMemory hidden;                    ///< [rows,mlp] compute: before GELU
  DeviceMemory sizes, mask;               ///< [B,N] fp32, of the tokens that enter
  DeviceMemory top, inverse, peak;        ///< [B,H,N] of attention's queries
  DeviceMemory value_mean;                ///< [B,C]
  DeviceMemory keep, src, dst, cosine;    ///< [B,N] at most: the ranking
};

/// All memory of a pass, planned once for its one batch size.
struct SoftMemory {
  SoftMemory() = default;
  SoftMemory(const DeviceModel& model, int batch);
  /// Bytes that `batch` images would take.
  [[nodiscard]] static size_t bytes_for(const DeviceModel& model, int batch);

  size_t bytes = 0;
  DeviceMemory images, labels;
  std::vector<SoftBlock> blocks;
  DeviceMemory last_sizes, last_mask;    ///< [B,N] of the tokens behind the last block
  std::array<DeviceMemory, 2> stream;    ///< [B,N,C] fp32; every sum is written to the one that it does not read
  std::array<DeviceMemory, 2> d_stream;  ///< [B,N,C] fp32: its gradient; a reduction's way back changes over
  DeviceMemory rows, branch;             ///< [B,N,C] compute: a norm's output, or the gradient of an input; a branch's
  DeviceMemory wide;                     ///< [B,N,max(3C,mlp)] compute: patches, hidden rows; gradients of both and qkv
  DeviceMemory class_rows, d_mask_rows, delta, correction;  ///< [B,H,N] fp32
  DeviceMemory attention, d_ranks;                          ///< [B,N] fp32
  std::array<DeviceMemory, 2> d_mask;                       ///< [B,N] fp32
  DeviceMemory d_survival;                                  ///< [depth,2,N] fp32: of pruning, of merging
  DeviceMemory pooled, d_pooled, normalised, inverse, features, d_features;  ///< [B,C] fp32; inverse [B]
  DeviceMemory logits, d_logits;                                             ///< [B,classes] fp32
  DeviceMemory status;

 private:
  template <class Allocate>
  void plan(const DeviceModel& model, int images, const Allocate& allocate);
};

class CudaSoftPass final : public SoftPass {
 public:
  CudaSoftPass(const nn::Vit& model, const nn::Preprocess& preprocess, const SoftPassOptions& options, int device);
  ~CudaSoftPass() override;

  [[nodiscard]] SoftPassResult run(const SoftBatch& batch, std::span<const kernels::SoftCounts> counts) override;
  [[nodiscard]] int64_t device_bytes() const override { return int64_t(model_.bytes() + memory_.bytes); }

 private:
  void check(const SoftBatch& batch, std::span<const kernels::SoftCounts> counts) const;
  void send(const SoftBatch& batch);
  [[nodiscard]] SoftPassResult receive();

  void embed(bool is_float);
  void forward_block(int index);
  void attend(int index);
  void reduce(int index);
  void add_norm(const DeviceNorm& norm, const DeviceMemory& normalised, const DeviceMemory& inverse);
  void onto_stream(const DeviceLinear& layer, const void* x);
  void hidden_rows(int index);
  void head();

  void backward();
  void head_backward();
  void backward_mlp(int index);
  void backward_mask(int index);
  void backward_reduce(int index);
  void backward_attention(int index);
  void backward_qkv(int index);
  void product_backward(const DeviceLinear& layer, const void* dy, void* dx, const void* activation = nullptr);
  void norm_backward(const DeviceNorm& norm, const DeviceMemory& normalised, const DeviceMemory& inverse,
                     void* d_branch);

  [[nodiscard]] kernels::cuda::LinearCall call_of(const DeviceLinear& layer, const void* x, int rows) const;
  [[nodiscard]] const float* sizes(int index) const;  ///< null where a merged token weighs one
  [[nodiscard]] const DeviceMemory& sizes_after(int index) const;
  [[nodiscard]] const DeviceMemory& mask_after(int index) const;
  [[nodiscard]] int tokens() const { return int(model_.config.tokens()); }
  [[nodiscard]] int channels() const { return int(model_.config.embed_dim); }
  [[nodiscard]] int heads() const { return int(model_.config.num_heads); }
  [[nodiscard]] int depth() const { return int(model_.config.depth); }
  [[nodiscard]] int rows() const { return batch_ * tokens(); }
  [[nodiscard]] kernels::cuda::DType compute() const { return model_.types.compute; }
  [[nodiscard]] bool exact_gelu() const { return compute() == kernels::cuda::DType::fp32; }

  int device_;
  nn::Preprocess preprocess_;
  bool proportional_;
  int batch_;
  DeviceModel model_;
  SoftMemory memory_;
  PinnedMemory host_images_, host_labels_, host_survival_, host_status_;
  std::shared_ptr<kernels::cuda::GemmCache> cache_;
  kernels::cuda::LinearRunner runner_;
  cudaStream_t stream_ = nullptr;
  // Of the pass being enqueued.
  std::vector<kernels::SoftCounts> counts_;
  int now_ = 0;         ///< of memory_.stream
  int d_now_ = 0;       ///< of memory_.d_stream
  int d_mask_now_ = 0;  ///< of memory_.d_mask
};

}  // namespace pyra::engine
