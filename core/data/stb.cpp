// BMP and PNM by stb_image with every other decoder compiled out. Debian ships 2.27, which trusts headers: it reads
// uninitialised palette entries, takes the missing end of a cut file for zeros and 16-bit PNM for 8-bit
// (CVE-2021-42716). So headers are checked here first, and stb_image sees only files that hold what they declare.
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>

#include "base/error.h"
#include "data/decoders.h"

/// From 2.28 on stb_image's PNM reader calls this for 16-bit files and, with PNG and PSD compiled out, has it not. Such
/// files never come so far; a version that has it finds its own the better match.
template <class Data, class... Rest>
static Data* stbi__convert_format16(Data* pixels, Rest...) {
  std::free(pixels);
  return nullptr;
}

#define STB_IMAGE_STATIC
#define STB_IMAGE_IMPLEMENTATION
#define STBI_ONLY_BMP
#define STBI_ONLY_PNM
#define STBI_NO_STDIO
#define STBI_NO_LINEAR
#define STBI_MAX_DIMENSIONS 16384
#define STBI_ASSERT(condition) ((void)0)  // inputs of others may not abort the process; writes are bounded without it
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"
#include <stb/stb_image.h>
#pragma GCC diagnostic pop

namespace pyra::data {
namespace {

static_assert(STBI_MAX_DIMENSIONS == kMaxImageSide);

struct Free {
  void operator()(stbi_uc* pixels) const { stbi_image_free(pixels); }
};

/// Fills `image`, whose size the caller read from the header, with what stb_image reads.
void decode_stb(Bytes bytes, Image& image, const char* kind, const std::string& name) {
  const auto refuse = [&](const char* reason) {
    fail(ExitCode::input, name, ": a ", kind, " that does not decode: ", reason ? reason : "unknown reason");
  };
  if (bytes.size() > size_t(std::numeric_limits<int>::max())) refuse("more than 2 GB");
  const int size = int(bytes.size());
  int width = 0, height = 0, components = 0;
  if (!stbi_info_from_memory(bytes.data(), size, &width, &height, &components)) refuse(stbi_failure_reason());
  // stb_image's info call keeps the sign that says in which order a BMP stores its rows.
  if (width != image.width || std::abs(int64_t(height)) != image.height) refuse("its header can be read in two ways");
  const std::unique_ptr<stbi_uc, Free> pixels(
      stbi_load_from_memory(bytes.data(), size, &width, &height, &components, 3));
  if (!pixels) refuse(stbi_failure_reason());
  std::copy_n(pixels.get(), image.pixels.size(), image.pixels.begin());
}

/// Little-endian, 0 beyond the end: sizes are checked where they are used.
uint32_t little_endian(Bytes bytes, size_t at, size_t width) {
  uint32_t value = 0;
  for (size_t i = 0; i < width && at + i < bytes.size(); ++i) value |= uint32_t(bytes[at + i]) << (8 * i);
  return value;
}

struct BmpHeader {
  uint64_t pixels = 0;  ///< where they begin
  uint64_t palette = 0, colours = 0;
  uint32_t green_mask = 0x3E0;  ///< of 16 bits: 5 or (0x7E0) 6 of green
  int64_t width = 0, height = 0, bits = 0;

  [[nodiscard]] uint64_t stride() const { return (uint64_t(width) * uint64_t(bits) + 31) / 32 * 4; }
};

BmpHeader read_bmp_header(Bytes bytes) {
  constexpr size_t kFileHeader = 14, kOs2Header = 12;
  const uint64_t size = little_endian(bytes, kFileHeader, 4);
  BmpHeader header;
  header.pixels = little_endian(bytes, 10, 4);
  header.palette = kFileHeader + size;
  if (size == kOs2Header) {
    header.width = little_endian(bytes, 18, 2);
    header.height = little_endian(bytes, 20, 2);
    header.bits = little_endian(bytes, 24, 2);
  } else {
    header.width = int32_t(little_endian(bytes, 18, 4));
    header.height = std::abs(int64_t(int32_t(little_endian(bytes, 22, 4))));
    header.bits = little_endian(bytes, 28, 2);
    constexpr uint32_t kBitFields = 3;
    if (little_endian(bytes, 30, 4) == kBitFields) {
      header.green_mask = little_endian(bytes, 58, 4);
      if (size <= 56) header.palette += 12;  // the masks
    }
    // stb_image takes all between header and pixels for the palette, but skips some of OS/2's shorter one.
    if (header.pixels > header.palette) header.colours = (header.pixels - header.palette) / 4;
  }
  return header;
}

/// The largest palette index of a picture of 1, 4 or 8 bits a pixel, whose bytes are known to be there.
uint64_t largest_index(Bytes bytes, const BmpHeader& header) {
  const uint64_t bits = uint64_t(header.bits), mask = (1u << bits) - 1;
  uint64_t largest = 0;
  for (uint64_t y = 0; y < uint64_t(header.height); ++y) {
    const uint8_t* const row = bytes.data() + header.pixels + y * header.stride();
    for (uint64_t x = 0; x < uint64_t(header.width); ++x) {
      const uint64_t shift = 8 - bits - x * bits % 8;
      largest = std::max(largest, row[x * bits / 8] >> shift & mask);
    }
  }
  return largest;
}

/// stb_image spreads 5 and 6 bits over 8 by repeating them, Pillow by n * 255 / 31 and / 63.
void rescale_16bit(Image& image, bool six_of_green) {
  for (size_t i = 0; i < image.pixels.size(); ++i) {
    const int value = image.pixels[i];
    image.pixels[i] = uint8_t(six_of_green && i % 3 == 1 ? (value >> 2) * 255 / 63 : (value >> 3) * 255 / 31);
  }
}

struct PnmHeader {
  int64_t width = 0, height = 0, maximum = 0, channels = 0;
  size_t pixels = 0;  ///< where they begin
};

/// A decimal number at `at`, after white space and comments; -1 when there is none of a sensible size.
int64_t read_number(Bytes bytes, size_t& at) {
  const auto is_space = [](uint8_t c) { return c == ' ' || (c >= '\t' && c <= '\r'); };
  while (at < bytes.size() && (is_space(bytes[at]) || bytes[at] == '#')) {
    if (bytes[at] == '#') {
      while (at < bytes.size() && bytes[at] != '\n' && bytes[at] != '\r') ++at;
    } else {
      ++at;
    }
  }
  constexpr int64_t kTooLarge = 1 << 30;
  int64_t value = -1;
  for (; at < bytes.size() && bytes[at] >= '0' && bytes[at] <= '9'; ++at) {
    value = std::max<int64_t>(value, 0) * 10 + (bytes[at] - '0');
    if (value > kTooLarge) return -1;
  }
  return value;
}

PnmHeader read_pnm_header(Bytes bytes, const std::string& name) {
  PnmHeader header;
  size_t at = 2;
  header.channels = bytes[1] == '6' ? 3 : 1;
  header.width = read_number(bytes, at);
  header.height = read_number(bytes, at);
  header.maximum = read_number(bytes, at);
  header.pixels = at + 1;
  if (header.width < 0 || header.height < 0 || header.maximum < 1 || header.maximum > 65535) {
    fail(ExitCode::input, name, ": a PNM whose header does not read 'P5|P6 width height maximum', maximum 1 to 65535");
  }
  return header;
}

/// value of maximum as Pillow scales it to `full`: in double, halves to even.
int64_t scale_sample(int64_t value, int64_t maximum, int64_t full) {
  return std::min(full, int64_t(std::nearbyint(double(value) / double(maximum) * double(full))));
}

void scale_8bit(Image& image, int64_t maximum) {
  for (uint8_t& value : image.pixels) value = uint8_t(scale_sample(value, maximum, 255));
}

/// 16-bit colour is scaled to 8; 16-bit grey is scaled to 16 and then clips at 255, as Pillow's "I" to "RGB".
void read_16bit(const uint8_t* from, const PnmHeader& header, Image& image) {
  const bool grey = header.channels == 1;
  const size_t copies = grey ? 3 : 1;
  for (size_t i = 0; i < image.pixels.size(); i += copies, from += 2) {
    const int64_t value = scale_sample(from[0] << 8 | from[1], header.maximum, grey ? 65535 : 255);
    std::fill_n(image.pixels.begin() + int64_t(i), copies, uint8_t(std::min<int64_t>(value, 255)));
  }
}

}  // namespace

Image decode_bmp(Bytes bytes, const std::string& name) {
  const BmpHeader header = read_bmp_header(bytes);
  Image image = allocate_image(header.height, header.width, name);
  static constexpr int64_t kDepths[] = {1, 4, 8, 16, 24, 32};
  if (std::ranges::find(kDepths, header.bits) == std::end(kDepths)) {
    fail(ExitCode::input, name, ": a BMP of ", header.bits, " bits a pixel; expected 1, 4, 8, 16, 24 or 32");
  }
  // The padding of the last row may be missing, in Pillow's eyes too.
  const uint64_t last_row = (uint64_t(header.width) * uint64_t(header.bits) + 7) / 8;
  const uint64_t needed = header.pixels + header.stride() * uint64_t(header.height - 1) + last_row;
  if (header.pixels < header.palette || needed > bytes.size()) {
    fail(ExitCode::input, name, ": a BMP that is cut: ", bytes.size(), " bytes; its header asks for ", needed);
  }
  if (header.bits <= 8 && largest_index(bytes, header) >= header.colours) {
    fail(ExitCode::input, name, ": a BMP whose pixels name colours beyond its palette of ", header.colours);
  }
  if (header.bits == 16 && header.green_mask != 0x3E0 && header.green_mask != 0x7E0) {
    fail(ExitCode::input, name, ": a 16-bit BMP whose bits are neither 5-5-5 nor 5-6-5");
  }
  decode_stb(bytes, image, "BMP", name);
  if (header.bits == 16) rescale_16bit(image, header.green_mask == 0x7E0);
  return image;
}

Image decode_pnm(Bytes bytes, const std::string& name) {
  const PnmHeader header = read_pnm_header(bytes, name);
  Image image = allocate_image(header.height, header.width, name);
  const bool wide = header.maximum > 255;
  const uint64_t needed = uint64_t(header.width * header.height * header.channels) * (wide ? 2 : 1);
  if (header.pixels > bytes.size() || bytes.size() - header.pixels < needed) {
    fail(ExitCode::input, name, ": a PNM that is cut: ", bytes.size(), " bytes; its header asks for ",
         header.pixels + needed);
  }
  if (wide) {
    read_16bit(bytes.data() + header.pixels, header, image);
  } else {
    decode_stb(bytes, image, "PNM", name);
    if (header.maximum < 255) scale_8bit(image, header.maximum);
  }
  return image;
}

}  // namespace pyra::data
