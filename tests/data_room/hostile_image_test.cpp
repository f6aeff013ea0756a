// Images as an attacker or a broken disk writes them: each is refused as an input error or decodes, nothing else.
#include <sys/resource.h>

#include <iostream>

#include "base/philox.h"
#include "data_support.h"

namespace pyra::data {
namespace {

using test::check_error;
using test::get_bytes;
using Encoded = std::vector<uint8_t>;

std::vector<std::filesystem::path> pictures() {
  std::vector<std::filesystem::path> paths;
  for (const char* folder : {"goldens/images", "pillow/images"}) {
    for (const auto& item : std::filesystem::directory_iterator(std::filesystem::path(PYRA_TEST_DATA) / folder)) {
      paths.push_back(item.path());
    }
  }
  std::ranges::sort(paths);
  return paths;
}

/// True when it decodes, to as many pixels as it says; false when it is refused as it should be.
bool decodes(const Encoded& bytes) {
  const auto error = test::error_of([&] {
    const Image image = decode(bytes, "picture");
    if (image.pixels.size() != size_t(image.height * image.width * 3)) throw std::logic_error("size");
  });
  if (!error) return true;
  REQUIRE(error->code() == ExitCode::input);
  REQUIRE(std::string(error->what()).starts_with("picture: "));
  return false;
}

Encoded text(std::string_view bytes) {
  return {bytes.begin(), bytes.end()};
}

/// Big- or little-endian 32-bit value at `at`.
void patch(Encoded& bytes, size_t at, uint32_t value, bool big) {
  for (size_t i = 0; i < 4; ++i) bytes[at + i] = uint8_t(value >> 8 * (big ? 3 - i : i));
}

Encoded picture(const char* name) {
  return get_bytes(std::filesystem::path(PYRA_TEST_DATA) / "goldens/images" / name);
}

TEST_CASE("a cut image is refused, wherever it is cut") {
  for (const auto& path : pictures()) {
    CAPTURE(path.filename());
    const Encoded whole = get_bytes(path);
    REQUIRE(decodes(whole));
    const size_t step = std::max<size_t>(1, whole.size() / 150);
    // The last bytes of a PNG and of a BMP's last row carry no pixel; what follows a JPEG's end is no part of it.
    const size_t pixels_end = whole.size() - 64 / (whole.size() > 1000 ? 1 : 2);
    for (size_t size = 0; size < whole.size(); size += step) {
      CAPTURE(size);
      const bool accepted = decodes({whole.begin(), whole.begin() + int64_t(size)});
      if (size < pixels_end) REQUIRE_FALSE(accepted);
    }
  }
}

TEST_CASE("bytes changed at random never do worse than fail to decode") {
  size_t refused = 0, count = 0;
  for (const auto& path : pictures()) {
    CAPTURE(path.filename());
    const Encoded whole = get_bytes(path);
    const uint64_t rounds = whole.size() > 50'000 ? 60 : 250;
    for (uint64_t round = 0; round < rounds; ++round) {
      CAPTURE(round);
      const Philox random(round, RandomStream::verify, whole.size());
      Encoded bytes = whole;
      // Half of the changes hit the header, where they do most harm.
      const uint64_t reach = round % 2 ? bytes.size() : std::min<uint64_t>(bytes.size(), 128);
      for (uint64_t change = 0; change <= round % 8; ++change) {
        bytes[random.below(2 * change, reach)] = uint8_t(random.word(8 * change + 5));
      }
      refused += !decodes(bytes);
      ++count;
    }
  }
  CHECK(refused > count / 10);
  CHECK(refused < count);
}

TEST_CASE("huge declared sizes are refused before any memory is taken") {
  struct rusage before {};
  getrusage(RUSAGE_SELF, &before);
  for (const uint32_t side : {0x80000000u, 0x7fffffffu, 0x40000000u, 16385u, 0u}) {
    CAPTURE(side);
    for (const size_t field : {16u, 20u}) {
      Encoded png = picture("rgb.png");
      patch(png, field, side, true);
      CHECK_FALSE(decodes(png));
    }
    for (const size_t field : {18u, 22u}) {
      Encoded bmp = picture("rgb.bmp");
      patch(bmp, field, side, false);
      CHECK_FALSE(decodes(bmp));
    }
  }
  Encoded both = picture("rgb.bmp");
  patch(both, 18, 16000, false), patch(both, 22, 16000, false);
  check_error(ExitCode::input, {"16000 x 16000", "100000000"}, [&] { (void)decode(both, "picture"); });
  CHECK_FALSE(decodes(text("P6 16384 16384 255\n")));
  CHECK_FALSE(decodes(text("P5 99999999999999999999 1 255\n")));
  CHECK_FALSE(decodes(text("P6 -1 5 255\n")));
  struct rusage after {};
  getrusage(RUSAGE_SELF, &after);
  CHECK(after.ru_maxrss - before.ru_maxrss < 64 * 1024);  // KiB
}

TEST_CASE("what is not an image is named for what it is") {
  check_error(ExitCode::input, {"a.jpg", "empty"}, [] { (void)decode({}, "a.jpg"); });
  const std::pair<std::string_view, std::string> cases[] = {{"GIF89a.....", "GIF"},
                                                            {"RIFF....WEBP", "WebP"},
                                                            {"version https://git-lfs.github.com/spec/v1", "git lfs"},
                                                            {"<!DOCTYPE html>", "HTML"},
                                                            {"P3 1 1 255 1 2 3", "plain-text"},
                                                            {"\x89PNG\r\n", "unknown"},
                                                            {"hello", "unknown"}};
  for (const auto& [bytes, word] : cases) {
    check_error(ExitCode::input, {"a.jpg", word, "expected JPEG, PNG, BMP"},
                [&] { (void)decode(text(bytes), "a.jpg"); });
  }
  CHECK_FALSE(decodes(text("BM")));
  CHECK_FALSE(decodes(text("P5")));
  CHECK_FALSE(decodes(text("\xff\xd8\xff")));
  CHECK_FALSE(decodes(text("\x89PNG\r\n\x1a\n")));
}

TEST_CASE("a BMP may not name colours beyond its palette") {
  // 8 bits a pixel, 2 x 1, a palette of one colour, and pixel values 0 and 1.
  Encoded bmp(54 + 4 + 4, 0);
  bmp[0] = 'B', bmp[1] = 'M';
  patch(bmp, 10, 58, false), patch(bmp, 14, 40, false), patch(bmp, 18, 2, false), patch(bmp, 22, 1, false);
  bmp[26] = 1, bmp[28] = 8;
  CHECK(decodes(bmp));
  bmp[59] = 1;
  check_error(ExitCode::input, {"palette of 1"}, [&] { (void)decode(bmp, "picture"); });
}

}  // namespace
}  // namespace pyra::data
