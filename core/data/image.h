// Encoded bytes -> RGB as Pillow's convert("RGB") makes it, and Pillow's bicubic resize.
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "nn/preprocess.h"

namespace pyra::data {

struct Image {
  int64_t height = 0, width = 0;
  std::vector<uint8_t> pixels;  ///< [height, width, 3] RGB
};

inline constexpr size_t kMaxImageBytes = 256 << 20;  ///< encoded, of one image
inline constexpr int64_t kMaxImageSide = 16384;
inline constexpr int64_t kMaxImagePixels = 100'000'000;

/// JPEG (libjpeg-turbo), PNG (libspng), BMP and PNM (stb_image) by their magic numbers. `name` opens messages.
/// Error(input): what the bytes are, why they do not decode; sides and pixels are bounded before any decoding.
/// Grey, palette, RGBA and 16-bit are converted as Pillow's convert("RGB") does.
[[nodiscard]] Image decode(std::span<const uint8_t> bytes, const std::string& name);

/// Whether a file's name ends as an image's that decode() may read, in any case.
[[nodiscard]] bool is_image_name(std::string_view name);
inline constexpr std::string_view kImageEndings[] = {".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".pnm"};

/// The part of `height` x `width` whose upper left corner is (top, left); it must lie within the image.
[[nodiscard]] Image crop(const Image& image, int64_t top, int64_t left, int64_t height, int64_t width);

/// resize((width, height), BICUBIC) of Pillow 13: antialiased, a = -0.5, two fixed-point passes, equal to the last bit.
[[nodiscard]] Image resize_bicubic(const Image& image, int64_t height, int64_t width);

/// Squash, or shorter side and centre crop: [size,size,3] uint8. Error(input) when the crop exceeds the shorter side.
/// One picture for a model: normalise(prepare(decode(bytes, name), preprocess)), nn/preprocess.h.
[[nodiscard]] Image prepare(const Image& image, const nn::Preprocess& preprocess);

/// The image as a PNG file's bytes: 8 bits a channel, RGB, nothing lost.
[[nodiscard]] std::string encode_png(const Image& image);

}  // namespace pyra::data
