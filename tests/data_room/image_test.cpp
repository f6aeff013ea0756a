#include "data/image.h"

#include <regex>

#include "base/philox.h"
#include "data_support.h"
#include "goldens.h"
#include "io/safetensors.h"
#include "support.h"

namespace pyra::data {
namespace {

using test::as_image;
using test::as_tensor;
using test::check_error;
using test::get_bytes;

/// One "<file>.<what>" of a set of pictures and what Pillow makes of them.
void check_picture(const io::SafetensorsFile& set, const std::filesystem::path& folder, const std::string& tensor,
                   double resize_tolerance) {
  CAPTURE(tensor);
  static const std::regex kName(R"((.+)\.(decoded|bicubic(\d+)|shorter(\d+)_centre(\d+)))");
  std::smatch part;
  REQUIRE(std::regex_match(tensor, part, kName));
  const Image image = decode(get_bytes(folder / part[1].str()), part[1]);
  const at::Tensor expected = set.tensor(tensor);
  if (part[2] == "decoded") {
    CHECK(test::max_difference(as_tensor(image), expected) == 0);
    return;
  }
  nn::Preprocess preprocess;
  if (part[3].matched) {
    preprocess.size = std::stoll(part[3]);
  } else {
    preprocess.mode = nn::ResizeMode::crop;
    preprocess.shorter = std::stoll(part[4]);
    preprocess.size = std::stoll(part[5]);
  }
  // From Pillow's own pixels, so that the resize alone is judged.
  const Image pillow = as_image(set.tensor(part[1].str() + ".decoded"));
  CHECK(test::max_difference(as_tensor(prepare(pillow, preprocess)), expected) <= resize_tolerance);
}

void check_pictures(const std::filesystem::path& tensors, const std::filesystem::path& images,
                    double resize_tolerance) {
  const io::SafetensorsFile set(tensors);
  REQUIRE(!set.entries().empty());
  for (const auto& [name, entry] : set.entries()) check_picture(set, images, name, resize_tolerance);
}

TEST_CASE("decode and resize give the fixtures' pixels", "[parity]") {
  check_pictures(test::goldens_folder() / "preprocess.safetensors", test::goldens_folder() / "images", 1);
}

TEST_CASE("every colour type, depth, subsampling and maximum decodes as Pillow converts it to RGB") {
  const auto folder = std::filesystem::path(PYRA_TEST_DATA) / "pillow";
  check_pictures(folder / "decoded.safetensors", folder / "images", 0);
}

namespace {

Image turned(const Image& image) {
  Image out{image.width, image.height, image.pixels};
  for (int64_t y = 0; y < image.height; ++y)
    for (int64_t x = 0; x < image.width; ++x)
      std::copy_n(&image.pixels[size_t((y * image.width + x) * 3)], 3, &out.pixels[size_t((x * image.height + y) * 3)]);
  return out;
}

}  // namespace

// Many columns go through the processor's vectors, one column alone byte by byte, and rows are another function.
TEST_CASE("a resized column is what it is alone, and a row what it is as a column") {
  const auto [height, width, to] =
      GENERATE(table<int64_t, int64_t, int64_t>({{7, 40, 31}, {64, 33, 17}, {100, 16, 224}, {9, 17, 1}, {2, 500, 5}}));
  CAPTURE(height, width, to);
  const Philox random(5, RandomStream::bench);
  Image image{height, width, std::vector<uint8_t>(size_t(height * width * 3))};
  for (size_t i = 0; i < image.pixels.size(); ++i) image.pixels[i] = uint8_t(random.below(i, 256));
  const Image resized = resize_bicubic(image, to, width);
  for (int64_t x = 0; x < width; ++x) {
    const Image alone = resize_bicubic(crop(image, 0, x, height, 1), to, 1);
    REQUIRE(alone.pixels == crop(resized, 0, x, to, 1).pixels);
  }
  CHECK(turned(resize_bicubic(turned(image), width, to)).pixels == resized.pixels);
}

TEST_CASE("a resize to the image's own size changes nothing") {
  const Image image{2, 3, {1, 2, 3, 250, 251, 252, 0, 255, 0, 9, 8, 7, 6, 5, 4, 255, 255, 255}};
  CHECK(resize_bicubic(image, 2, 3).pixels == image.pixels);
}

TEST_CASE("a flat image stays flat at any size") {
  const Image image{37, 5, std::vector<uint8_t>(37 * 5 * 3, 201)};
  for (const auto& [height, width] : {std::pair<int64_t, int64_t>{1, 1}, {224, 224}, {3, 1000}, {36, 6}}) {
    const Image resized = resize_bicubic(image, height, width);
    REQUIRE(resized.pixels.size() == size_t(height * width * 3));
    CHECK(std::ranges::count(resized.pixels, 201) == height * width * 3);
  }
}

TEST_CASE("a crop larger than the shorter side is refused") {
  const Image image{4, 4, std::vector<uint8_t>(48)};
  check_error(ExitCode::input, {"crops 224", "128"},
              [&] { (void)prepare(image, {.size = 224, .mode = nn::ResizeMode::crop, .shorter = 128}); });
}

TEST_CASE("an image written as PNG is read back to the last bit", "[data]") {
  const Philox random(3, RandomStream::bench);
  for (const auto& [height, width] : {std::pair<int64_t, int64_t>{1, 1}, {1, 7}, {13, 1}, {16, 16}, {112, 97}}) {
    Image image{height, width, std::vector<uint8_t>(size_t(height * width * 3))};
    for (size_t i = 0; i < image.pixels.size(); ++i) image.pixels[i] = uint8_t(random.below(i, 256));
    const std::string bytes = encode_png(image);
    const Image read = decode({reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size()}, "png");
    CHECK(read.height == height);
    CHECK(read.width == width);
    CHECK(read.pixels == image.pixels);
  }
}

}  // namespace
}  // namespace pyra::data
