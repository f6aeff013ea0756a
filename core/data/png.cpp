#include <spng.h>

#include <cstdlib>
#include <memory>

#include "base/error.h"
#include "data/decoders.h"

namespace pyra::data {
namespace {

struct FreeContext {
  void operator()(spng_ctx* context) const { spng_ctx_free(context); }
};

// Chunks other than pixels (profiles, text) are of no use here, but libspng reads the palette among them.
constexpr size_t kMaxChunk = 16 << 20, kMaxChunks = 64 << 20;
// Deflate cannot do better than 1032 : 1.
constexpr uint64_t kMaxDeflateRatio = 1032;

void check(int status, const std::string& name) {
  if (status != 0) fail(ExitCode::input, name, ": a PNG that does not decode: ", spng_strerror(status));
}

int channels(const spng_ihdr& header) {
  switch (header.color_type) {
    case SPNG_COLOR_TYPE_TRUECOLOR:
      return 3;
    case SPNG_COLOR_TYPE_GRAYSCALE_ALPHA:
      return 2;
    case SPNG_COLOR_TYPE_TRUECOLOR_ALPHA:
      return 4;
    default:
      return 1;
  }
}

/// 16-bit grey clips at 255 in Pillow's conversion from "I;16", it does not scale.
void decode_grey16(spng_ctx* context, Image& image, const std::string& name) {
  std::vector<uint16_t> grey(size_t(image.height * image.width));
  check(spng_decode_image(context, grey.data(), grey.size() * sizeof(uint16_t), SPNG_FMT_PNG, 0), name);
  for (size_t i = 0; i < grey.size(); ++i) {
    std::fill_n(image.pixels.begin() + int64_t(i) * 3, 3, uint8_t(std::min<uint16_t>(grey[i], 255)));
  }
}

}  // namespace

Image decode_png(Bytes bytes, const std::string& name) {
  const std::unique_ptr<spng_ctx, FreeContext> context(spng_ctx_new(0));
  if (!context) fail(ExitCode::device, name, ": no memory for a PNG decoder");
  check(spng_set_chunk_limits(context.get(), kMaxChunk, kMaxChunks), name);
  check(spng_set_png_buffer(context.get(), bytes.data(), bytes.size()), name);
  spng_ihdr header{};
  check(spng_get_ihdr(context.get(), &header), name);
  const uint64_t bits = uint64_t(header.width) * header.height * uint64_t(channels(header)) * header.bit_depth;
  if (header.width <= kMaxImageSide && header.height <= kMaxImageSide && bits / 8 / kMaxDeflateRatio > bytes.size()) {
    fail(ExitCode::input, name, ": a PNG of ", header.width, " x ", header.height, " pixels cannot fit in its ",
         bytes.size(), " bytes; the file is cut or damaged");
  }
  Image image = allocate_image(header.height, header.width, name);
  // Alpha and tRNS are dropped, gamma is not applied, 16 bits keep their upper 8: as Pillow does.
  if (header.color_type == SPNG_COLOR_TYPE_GRAYSCALE && header.bit_depth == 16) {
    decode_grey16(context.get(), image, name);
  } else {
    check(spng_decode_image(context.get(), image.pixels.data(), image.pixels.size(), SPNG_FMT_RGB8, 0), name);
  }
  return image;
}

std::string encode_png(const Image& image) {
  const std::unique_ptr<spng_ctx, FreeContext> context(spng_ctx_new(SPNG_CTX_ENCODER));
  if (!context) fail(ExitCode::device, "no memory for a PNG encoder");
  const auto check_encoder = [](int status) {
    if (status != 0) fail(ExitCode::internal, "an image that does not encode as PNG: ", spng_strerror(status));
  };
  spng_ihdr header{};
  header.width = uint32_t(image.width);
  header.height = uint32_t(image.height);
  header.bit_depth = 8;
  header.color_type = SPNG_COLOR_TYPE_TRUECOLOR;
  check_encoder(spng_set_ihdr(context.get(), &header));
  check_encoder(spng_set_option(context.get(), SPNG_ENCODE_TO_BUFFER, 1));
  check_encoder(
      spng_encode_image(context.get(), image.pixels.data(), image.pixels.size(), SPNG_FMT_PNG, SPNG_ENCODE_FINALIZE));
  size_t size = 0;
  int status = 0;
  const std::unique_ptr<void, decltype(&std::free)> bytes(spng_get_png_buffer(context.get(), &size, &status),
                                                          &std::free);
  check_encoder(status);
  return {static_cast<const char*>(bytes.get()), size};
}

}  // namespace pyra::data
