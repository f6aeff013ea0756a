#include <turbojpeg.h>

#include <memory>
#include <string_view>

#include "base/error.h"
#include "data/decoders.h"

namespace pyra::data {
namespace {

struct Close {
  void operator()(void* handle) const { tjDestroy(handle); }
};
using Decoder = std::unique_ptr<void, Close>;

/// Whether an end-of-image marker follows the last scan. libjpeg invents a missing one and paints the rest grey;
/// inside a scan 0xFF is always followed by a stuffed 0 or a restart marker, so the search cannot be misled.
bool has_end_marker(Bytes bytes) {
  for (size_t i = bytes.size(); i-- > 1;) {
    if (bytes[i - 1] != 0xFF) continue;
    if (bytes[i] == 0xD9) return true;
    if (bytes[i] == 0xDA) return false;
  }
  return false;
}

/// Damage that loses no pixel, which Pillow, too, reads past.
bool is_harmless(std::string_view warning) {
  return warning.find("extraneous bytes before marker") != std::string_view::npos ||
         warning.find("unknown JFIF revision") != std::string_view::npos ||
         warning.find("Unknown Adobe color transform") != std::string_view::npos;
}

/// Pillow's integer division by 255, exact for products of two bytes.
uint8_t multiply(int a, int b) {
  const int product = a * b + 128;
  return uint8_t(((product >> 8) + product) >> 8);
}

/// Inks as Adobe writes them, inverted (255 is no ink), to RGB as Pillow's convert("RGB").
void cmyk_to_rgb(const std::vector<uint8_t>& inks, std::vector<uint8_t>& rgb) {
  for (size_t pixel = 0; pixel < inks.size() / 4; ++pixel) {
    const int black = inks[pixel * 4 + 3];
    for (size_t c = 0; c < 3; ++c) rgb[pixel * 3 + c] = uint8_t(black - multiply(255 - inks[pixel * 4 + c], black));
  }
}

}  // namespace

Image decode_jpeg(Bytes bytes, const std::string& name) {
  const Decoder decoder(tjInitDecompress());
  if (!decoder) fail(ExitCode::device, name, ": no memory for a JPEG decoder");
  const auto reason = [&] { return std::string(tjGetErrorStr2(decoder.get())); };

  int width = -1, height = -1, subsampling = -1, space = -1;
  const int status =
      tjDecompressHeader3(decoder.get(), bytes.data(), bytes.size(), &width, &height, &subsampling, &space);
  // An unusual subsampling is an error to this call alone: the image itself decodes.
  if (status != 0 && (width < 1 || height < 1 || space < 0)) {
    fail(ExitCode::input, name, ": a JPEG that does not decode: ", reason());
  }
  Image image = allocate_image(height, width, name);
  if (!has_end_marker(bytes)) {
    fail(ExitCode::input, name, ": a JPEG that is cut: no end-of-image marker in its ", bytes.size(), " bytes");
  }

  const bool inks = space == TJCS_CMYK || space == TJCS_YCCK;
  std::vector<uint8_t> cmyk(inks ? size_t(image.height * image.width * 4) : 0);
  uint8_t* const out = inks ? cmyk.data() : image.pixels.data();
  // Slow integer IDCT and smooth upsampling are what Pillow uses; the scan limit is against bombs of empty scans.
  if (tjDecompress2(decoder.get(), bytes.data(), bytes.size(), out, width, 0, height, inks ? TJPF_CMYK : TJPF_RGB,
                    TJFLAG_ACCURATEDCT | TJFLAG_LIMITSCANS) != 0 &&
      (tjGetErrorCode(decoder.get()) != TJERR_WARNING || !is_harmless(reason()))) {
    fail(ExitCode::input, name, ": a JPEG that does not decode: ", reason());
  }
  if (inks) cmyk_to_rgb(cmyk, image.pixels);
  return image;
}

}  // namespace pyra::data
