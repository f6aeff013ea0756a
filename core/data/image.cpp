#include "data/image.h"

#include <cmath>
#include <string_view>

#include "base/error.h"
#include "data/decoders.h"

namespace pyra::data {
namespace {

bool starts_with(Bytes bytes, std::string_view magic) {
  return bytes.size() >= magic.size() &&
         std::equal(magic.begin(), magic.end(), bytes.begin(), [](char a, uint8_t b) { return uint8_t(a) == b; });
}

/// What bytes that we do not decode are, as far as their first few tell.
std::string describe(Bytes bytes) {
  static constexpr std::pair<std::string_view, const char*> kKnown[] = {
      {"GIF8", "a GIF"},
      {"RIFF", "a RIFF file (WebP?)"},
      {"II*", "a TIFF"},
      {"MM", "a TIFF"},
      {"P1", "a plain-text bitmap (PBM)"},
      {"P2", "a plain-text PGM"},
      {"P3", "a plain-text PPM"},
      {"P4", "a bitmap (PBM)"},
      {"version https://git-lfs", "a Git LFS pointer: fetch the file with 'git lfs pull'"},
      {"<", "text (HTML or XML?)"},
      {"\x1f\x8b", "gzip-compressed"},
      {"PK", "a zip archive"},
  };
  if (bytes.empty()) return "an empty file";
  for (const auto& [magic, what] : kKnown) {
    if (starts_with(bytes, magic)) return what;
  }
  return "of an unknown kind";
}

/// Python's round(): halves go to the even neighbour, which centre crops are defined by.
int64_t round_half_even(int64_t twice) {
  const int64_t floor = twice / 2;
  return twice % 2 == 0 ? floor : floor + floor % 2;
}

}  // namespace

Image allocate_image(int64_t height, int64_t width, const std::string& name) {
  if (height < 1 || width < 1 || height > kMaxImageSide || width > kMaxImageSide || height * width > kMaxImagePixels) {
    fail(ExitCode::input, name, ": an image of ", width, " x ", height, " pixels; sides from 1 to ", kMaxImageSide,
         " and at most ", kMaxImagePixels, " pixels are read");
  }
  return {height, width, std::vector<uint8_t>(size_t(height * width * 3))};
}

Image decode(std::span<const uint8_t> bytes, const std::string& name) {
  if (starts_with(bytes, "\xff\xd8\xff")) return decode_jpeg(bytes, name);
  if (starts_with(bytes, "\x89PNG\r\n\x1a\n")) return decode_png(bytes, name);
  if (starts_with(bytes, "BM")) return decode_bmp(bytes, name);
  if (starts_with(bytes, "P5") || starts_with(bytes, "P6")) return decode_pnm(bytes, name);
  fail(ExitCode::input, name, ": not an image that can be read: it is ", describe(bytes),
       "; expected JPEG, PNG, BMP, PGM or PPM");
}

bool is_image_name(std::string_view name) {
  const size_t dot = name.rfind('.');
  if (dot == std::string_view::npos) return false;
  std::string ending(name.substr(dot));
  for (char& c : ending) c = char(c >= 'A' && c <= 'Z' ? c - 'A' + 'a' : c);
  return std::ranges::find(kImageEndings, ending) != std::end(kImageEndings);
}

Image crop(const Image& image, int64_t top, int64_t left, int64_t height, int64_t width) {
  Image out{height, width, std::vector<uint8_t>(size_t(height * width * 3))};
  for (int64_t y = 0; y < height; ++y) {
    const auto row = image.pixels.begin() + ((top + y) * image.width + left) * 3;
    std::copy(row, row + width * 3, out.pixels.begin() + y * width * 3);
  }
  return out;
}

Image prepare(const Image& image, const nn::Preprocess& preprocess) {
  const int64_t size = preprocess.size;
  if (preprocess.mode == nn::ResizeMode::squash) return resize_bicubic(image, size, size);
  const int64_t shorter = preprocess.shorter;
  if (shorter < size) {
    fail(ExitCode::input, "preprocessing crops ", size, " pixels out of a shorter side of ", shorter,
         "; the shorter side must be at least the crop");
  }
  // torchvision's Resize(shorter) and CenterCrop(size): the longer side is truncated, the margin rounded to even.
  const bool portrait = image.height > image.width;
  const int64_t longer = portrait ? shorter * image.height / image.width : shorter * image.width / image.height;
  // An extreme strip would grow to gigabytes only to be cropped away.
  if (longer * shorter > kMaxImagePixels) {
    fail(ExitCode::input, "an image of ", image.width, " x ", image.height, " pixels is too narrow to be resized to a ",
         "shorter side of ", shorter);
  }
  const int64_t height = portrait ? longer : shorter, width = portrait ? shorter : longer;
  const Image resized = resize_bicubic(image, height, width);
  return crop(resized, round_half_even(height - size), round_half_even(width - size), size, size);
}

}  // namespace pyra::data
