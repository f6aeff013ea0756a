// How an image becomes a model's input: part of a model, kept in its file.
#pragma once
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

}  // namespace pyra::nn
