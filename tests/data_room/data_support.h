// What the tests of this room share.
#pragma once
#include <ATen/ATen.h>

#include "data/image.h"
#include "io/io_support.h"

namespace pyra::test {

inline const std::filesystem::path kDemo = std::filesystem::path(PYRA_SOURCE_DIR) / "recipes/demo/fashion_mnist_1k.tar";

inline std::vector<uint8_t> get_bytes(const std::filesystem::path& path) {
  const std::string text = get(path);
  return {text.begin(), text.end()};
}

/// uint8 [H,W,3].
inline at::Tensor as_tensor(const data::Image& image) {
  return at::from_blob(const_cast<uint8_t*>(image.pixels.data()), {image.height, image.width, 3}, at::kByte).clone();
}

inline data::Image as_image(const at::Tensor& pixels) {
  const at::Tensor dense = pixels.contiguous();
  return {dense.size(0), dense.size(1), {dense.data_ptr<uint8_t>(), dense.data_ptr<uint8_t>() + dense.numel()}};
}

}  // namespace pyra::test
