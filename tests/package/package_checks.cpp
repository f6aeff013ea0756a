// What an outsider's program and plugin can do: everything a built-in one can. Runs what was built against the
// installed, moved package.
#include "catch.h"
#include "support.h"

namespace {

const std::string kModel = PYRA_SOURCE_DIR "/recipes/demo/vit_ti_patch8_112.safetensors";
const std::string kImage = PYRA_TEST_DATA "/goldens/images/rgb_q90.jpg";

std::string embed(const std::string& program) {
  return PYRA_PACKAGE "/embed/build/" + program;
}

}  // namespace

TEST_CASE("the installed program runs where it was moved", "[package]") {
  const auto result = pyra::test::run({PYRA_PACKAGE "/prefix/bin/pyractl", "--version"});
  CAPTURE(result.out, result.err);
  CHECK(result.exit_code == 0);
}

TEST_CASE("programs that embed the library, in C++ and in C, say what pyractl says", "[package]") {
  const auto cpp = pyra::test::run({embed("embed_cpp"), kModel, kImage});
  const auto c = pyra::test::run({embed("embed_c"), kModel, kImage});
  CAPTURE(cpp.err, c.err);
  REQUIRE(cpp.exit_code == 0);
  REQUIRE(c.exit_code == 0);
  CHECK(cpp.out == c.out);
  const auto ours =
      pyra::test::pyractl({"predict", kModel, kImage, "--top", "1", "--json", "--device", "cpu", "--dtype", "fp32"});
  REQUIRE(ours.exit_code == 0);
  const std::string label = cpp.out.substr(0, cpp.out.find(' '));
  CHECK_THAT(ours.out, Catch::Contains("\"label\": " + label));
}

TEST_CASE("what goes wrong in an embedding program has the same words and codes", "[package]") {
  const std::string program = GENERATE("embed_cpp", "embed_c");
  const auto no_model = pyra::test::run({embed(program), kImage, kImage});
  CHECK(no_model.exit_code == 3);
  CHECK_THAT(no_model.err, Catch::Contains("rgb_q90.jpg"));
  const auto no_image = pyra::test::run({embed(program), kModel, kModel});
  CHECK(no_image.exit_code == 3);
  CHECK_THAT(no_image.err, Catch::StartsWith("image"));
}
