// The memory of a training step: what each part of it leaves for another, and from when to when it is needed.
#pragma once
#include <array>
#include <vector>

#include "engine/cuda/device_memory.h"
#include "engine/cuda/train_model.h"

namespace pyra::engine {

/// Rows are those of a block's tokens, of all images: before its merge, or (rows2) after it. All but what is said to be
/// fp32 is of the compute type.
struct BlockMemory {
  // Left by the forward pass for the way back.
  DeviceSpan normalised1, normalised2;  ///< [rows,C], [rows2,C]: norm1's and norm2's rows before weight and bias
  DeviceSpan inverse1, inverse2;        ///< [rows], [rows2] fp32
  std::array<DeviceSpan, 4> low;        ///< [rows or rows2,padded]: drop(x) Aᵀ, at the index of the linear kind
  DeviceSpan qkv;                       ///< [rows,3C]
  DeviceSpan attended, log_sum;         ///< [rows,C], [B,H,N] fp32
  DeviceSpan hidden;                    ///< [rows2,fc2.stride]: before GELU
  DeviceSpan keep, src, dst, cosine;    ///< the plan

  // Of the forward pass alone.
  DeviceSpan input1, input2;            ///< [rows,qkv.stride], [rows2,fc1.stride]: the norms' outputs
  DeviceSpan class_rows;                ///< [B,H,N] fp32
  DeviceSpan proj_input;                ///< [rows,proj.stride], where proj has a LoRA term
  DeviceSpan attention_branch;          ///< [rows,C]: what proj adds to the stream
  DeviceSpan activated, hidden_branch;  ///< [rows2,fc2.stride] after GELU, [rows2,C] what fc2 adds

  // Of the way back alone: gradients of the above, with the strides of the layers' operands.
  DeviceSpan d_hidden_branch, d_hidden, d_input2, d_attention_branch, d_attended;
  DeviceSpan d_qkv, d_input1;
  DeviceSpan fc2_input;        ///< [rows2,fc2.stride], where fc2 has a LoRA term: after GELU, made again
  DeviceSpan packed_attended;  ///< [rows,C], where proj has a LoRA term: d_attended without what is behind its rows
};

/// All memory of a step, planned once for its one batch size.
struct TrainMemory {
  TrainMemory() = default;
  TrainMemory(const TrainModel& model, int batch);
  /// Bytes that `batch` images would take.
  [[nodiscard]] static size_t bytes_for(const TrainModel& model, int batch);

  int batch = 0;
  size_t bytes = 0;
  DeviceSpan patches, embedded;    ///< [B P, 3 p p], [B P, C]
  std::vector<DeviceSpan> stream;  ///< [B,N,C] fp32; the one before each merge or choice of class tokens, and the last
  std::vector<DeviceSpan> d_stream;  ///< their gradients, fp32
  std::vector<DeviceSpan> sizes;     ///< [B,N], of the tokens after each merge
  std::vector<BlockMemory> blocks;
  DeviceSpan pooled, features_normalised, features, d_features, features_inverse;
  DeviceSpan logits, d_logits;
  DeviceSpan patch_gradient;           ///< [B P, C] fp32, where the embedding's bias trains
  std::vector<DeviceMemory> partials;  ///< gradients' partial sums

 private:
  class Timeline;
  class Planner;
  DeviceMemory arena_;
};

/// Whether the gradients of a block's qkv are made beside the rest of the way back, where nothing that they read may
/// give its place away until the step ends. Not the last block's: the most memory is needed just after it.
[[nodiscard]] bool gradients_aside(const TrainModel& model, int block);

}  // namespace pyra::engine
