// The decoders behind decode(): one file each, named for its library. Inside the room only.
#pragma once
#include <cstdint>
#include <span>
#include <string>

#include "data/image.h"

namespace pyra::data {

using Bytes = std::span<const uint8_t>;

/// An image of that size, once its sides and pixels are within bounds; Error(input) opens with `name`.
[[nodiscard]] Image allocate_image(int64_t height, int64_t width, const std::string& name);

[[nodiscard]] Image decode_jpeg(Bytes bytes, const std::string& name);
[[nodiscard]] Image decode_png(Bytes bytes, const std::string& name);
[[nodiscard]] Image decode_bmp(Bytes bytes, const std::string& name);
[[nodiscard]] Image decode_pnm(Bytes bytes, const std::string& name);

}  // namespace pyra::data
