// How an image becomes a model's input: part of a model, kept in its file.
#pragma once
#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>

namespace pyra::nn {

enum class ResizeMode {
  squash,  ///< to size x size, aspect not kept (VTAB-1k as published)
  crop,    ///< shorter side to `shorter`, then the centre size x size
};

struct Preprocess {
  int64_t size = 224;
  ResizeMode mode = ResizeMode::squash;
  int64_t shorter = 256;                        ///< only for crop
  std::array<float, 3> mean{0.5f, 0.5f, 0.5f};  ///< of values in [0,1], RGB
  std::array<float, 3> std{0.5f, 0.5f, 0.5f};
  bool operator==(const Preprocess&) const = default;
};

/// What each of the 256 values of each channel becomes, (v/255 - mean)/std: as exact as computing it, and cheaper.
using NormaliseTables = std::array<std::array<float, 256>, 3>;
[[nodiscard]] NormaliseTables normalise_tables(const Preprocess& preprocess);

/// One image: uint8 [pixels,3] -> fp32 [3,pixels].
void normalise_image(const uint8_t* from, float* to, int64_t pixels, const NormaliseTables& tables);

/// uint8 [B,H,W,3] -> fp32 [B,3,H,W], channel by channel.
[[nodiscard]] at::Tensor normalise(const at::Tensor& images, const Preprocess& preprocess);

}  // namespace pyra::nn
