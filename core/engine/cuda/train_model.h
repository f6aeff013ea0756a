// A model in training on the device: frozen weights in the compute type, trained tensors as fp32 masters in one arena
// with their moments, and beside each master the copy of it that the forward pass reads.
//
// The columns behind a linear layer's weight hold scale * B of its LoRA term; behind the layer's input stands
// drop(x) Aᵀ. So one matrix product computes both, forward and backward.
#pragma once
#include "engine/cuda/device_model.h"
#include "engine/trainer.h"
#include "kernels/cuda/adamw.h"
#include "kernels/cuda/lora.h"

namespace pyra::engine {

/// How far back a step must go: position of what trains first. A block's layers in the order in which data pass them.
enum class Place { norm1, qkv, proj, merge, norm2, fc1, fc2 };
[[nodiscard]] constexpr int position_of(int block, Place place) {
  return 8 * block + int(place);
}
constexpr int kEmbedPosition = -1;

/// A trained tensor's place in the arena, or none.
struct TrainedSlot {
  int tensor = -1;
  explicit operator bool() const { return tensor >= 0; }
};

struct LoraTerm {
  const float* a = nullptr;  ///< master, [rank,in]
  int rank = 0, padded = 0;  ///< columns behind weight and input: rank, rounded up
  float scale = 1;
  kernels::cuda::Dropout dropout{};
  TrainedSlot a_slot{}, b_slot{};
  std::vector<std::pair<int, int>> b_rows{};  ///< [begin,end) of the rows of B that train: q, k and v are three parts
};

struct TrainLinear {
  void* weight = nullptr;      ///< [out,stride] of the compute type
  const void* bias = nullptr;  ///< [out] of the compute type
  int in = 0, out = 0, stride = 0;
  TrainedSlot bias_slot{};
  std::optional<LoraTerm> lora{};
};

struct TrainNorm {
  const float *weight = nullptr, *bias = nullptr;  ///< a master where it trains
  TrainedSlot weight_slot, bias_slot;
};

struct TrainBlock {
  TrainNorm norm1, norm2;
  TrainLinear qkv, proj, fc1, fc2;
  int tokens = 0;  ///< entering
  std::optional<DeviceMerge> merge;
  TrainedSlot gate_a{}, gate_b{}, gate_weight{}, gate_bias{};
  bool class_alone = false;  ///< behind attention only the class tokens' rows go on: nobody reads the others
  [[nodiscard]] int tokens_after() const { return class_alone ? 1 : merge ? merge->kept : tokens; }
};

class TrainModel {
 public:
  /// Uploads the model; `tensors` and their storage outlive this. Error(usage) naming the tensor, the PEFT method or
  /// the merger that only the CPU trains.
  TrainModel(const nn::Vit& model, const std::vector<TrainedTensor>& tensors, const TrainerOptions& options,
             const uint64_t* step_on_device);

  /// Values and moments from the CPU tensors, and the copies; or back to the CPU tensors.
  void take_over();
  void publish() const;

  DeviceTypes types;
  nn::VitConfig config;
  TrainLinear patch_embed;
  const float *prefix = nullptr, *positions = nullptr;  ///< [protected,C], [patches,C]
  std::vector<TrainBlock> blocks;
  TrainNorm norm;
  const float *head_weight = nullptr, *head_bias = nullptr;  ///< masters
  TrainedSlot head_weight_slot, head_bias_slot;
  bool proportional_attention = true;
  int first_position = 0;  ///< of what trains first; the head's beyond all blocks
  [[nodiscard]] size_t bytes() const { return store_.bytes() + arena_.size() * arena_[0].bytes(); }

  /// One segment a trained tensor, in their order; whoever computes a gradient says where its partial sums are.
  std::vector<kernels::cuda::Segment> segments;
  [[nodiscard]] kernels::cuda::Segment& segment(TrainedSlot slot) { return segments[size_t(slot.tensor)]; }
  [[nodiscard]] float* values() const { return arena_[0].get<float>(); }
  [[nodiscard]] float* first_moments() const { return arena_[1].get<float>(); }
  [[nodiscard]] float* second_moments() const { return arena_[2].get<float>(); }
  [[nodiscard]] float* gradients() const { return arena_[3].get<float>(); }
  [[nodiscard]] int64_t arena_size() const { return arena_floats_; }

 private:
  void add_arena();
  void add_block(const nn::Vit& model, int index, int tokens);
  void add_merge(const nn::MergeSetup& setup, TrainBlock& block, int index, int kept);
  void add_head(const nn::Vit& model);
  void keep_what_the_head_reads();
  [[nodiscard]] TrainedSlot slot_of(const at::Tensor& tensor, int position);
  [[nodiscard]] const float* master(TrainedSlot slot) const;
  [[nodiscard]] const float* master_or_upload(const at::Tensor& tensor, TrainedSlot slot);
  TrainNorm norm_of(const nn::TensorMap& weights, const std::string& name, int position);
  TrainLinear linear(const nn::Vit& model, const std::string& name, int position);
  TrainLinear block_linear(const nn::Vit& model, int block, sdk::LinearKind kind, Place place);
  LoraTerm lora_of(const sdk::LinearSite& site, const sdk::LowRank& term, int position);
  void find_b(LoraTerm& term, const at::Tensor& b, int position);
  void copy_out(const TrainedTensor& tensor, const kernels::cuda::Segment& segment) const;
  void check_all_claimed() const;

  const std::vector<TrainedTensor>& tensors_;
  const TrainerOptions& options_;
  const nn::PeftSetup* peft_ = nullptr;
  const uint64_t* step_;
  std::vector<bool> claimed_;
  std::array<DeviceMemory, 4> arena_;
  int64_t arena_floats_ = 0;
  DeviceStore store_;
};

}  // namespace pyra::engine
