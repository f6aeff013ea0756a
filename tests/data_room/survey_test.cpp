#include "data/survey.h"

#include <set>

#include "data_support.h"
#include "support.h"

namespace pyra::data {
namespace {

std::string pnm(const char* kind, int width, int height, const std::string& pixels) {
  return cat(kind, "\n", width, " ", height, "\n255\n", pixels);
}

TEST_CASE("a survey tells size, one colour and equal pixels, whatever the file") {
  const test::TempDir folder;
  const std::string grey = "\x01\x02\x03\x04\x05\x06", rgb = "\1\1\1\2\2\2\3\3\3\4\4\4\5\5\5\6\6\6";
  test::put(folder / "grey.pgm", pnm("P5", 3, 2, grey));
  test::put(folder / "same.ppm", pnm("P6", 3, 2, rgb));     // other bytes, the same pixels
  test::put(folder / "turned.pgm", pnm("P5", 2, 3, grey));  // the same pixels, another size
  test::put(folder / "other.pgm", pnm("P5", 3, 2, "\x01\x02\x03\x04\x05\x07"));
  test::put(folder / "flat.ppm", pnm("P6", 3, 2, "abcabcabcabcabcabc"));
  test::put(folder / "dot.pgm", pnm("P5", 1, 1, "a"));
  test::put(folder / "cut.pgm", pnm("P5", 3, 2, "ab"));
  test::put(folder / "test.txt",
            "grey.pgm 0\nsame.ppm 0\nturned.pgm 0\nother.pgm 0\nflat.ppm 0\ndot.pgm 0\ncut.pgm 0\ngone.pgm 0\n");
  const Dataset dataset = Dataset::open(folder.path());
  const std::vector<Look> looks = survey(dataset, dataset.split("test"));
  REQUIRE(looks.size() == 8);
  for (size_t i = 0; i < 6; ++i) CHECK(looks[i].problem.empty());
  CHECK(looks[0].height == 2);
  CHECK(looks[0].width == 3);
  CHECK(looks[0].digest == looks[1].digest);
  CHECK(looks[0].digest != looks[2].digest);
  CHECK(looks[0].digest != looks[3].digest);
  CHECK_FALSE(looks[0].one_colour);
  CHECK(looks[4].one_colour);
  CHECK(looks[5].one_colour);
  CHECK(looks[6].problem.find("cut.pgm") != std::string::npos);
  CHECK(looks[7].problem.find("missing") != std::string::npos);
}

TEST_CASE("one changed pixel anywhere changes the digest") {
  const test::TempDir folder;
  std::string list, pixels(60, 'x');
  for (size_t i = 0; i <= pixels.size(); ++i) {
    std::string changed = pixels;
    if (i < pixels.size()) changed[i] = 'y';
    test::put(folder / cat(i, ".ppm"), pnm("P6", 5, 4, changed));
    list += cat(i, ".ppm 0\n");
  }
  test::put(folder / "test.txt", list);
  const Dataset dataset = Dataset::open(folder.path());
  std::set<Digest> digests;
  for (const Look& look : survey(dataset, dataset.split("test"))) digests.insert(look.digest);
  CHECK(digests.size() == pixels.size() + 1);
}

}  // namespace
}  // namespace pyra::data
