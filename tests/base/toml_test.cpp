#include "base/toml.h"

#include "base/error.h"
#include "catch.h"

namespace pyra {
namespace {

std::string message(const std::string& text) {
  try {
    (void)parse_toml(text, "schedule x.toml");
  } catch (const Error& error) {
    CHECK(error.code() == ExitCode::usage);
    return error.what();
  }
  return "";
}

std::string repeated(const std::string& piece, int times) {
  std::string text;
  for (int i = 0; i < times; ++i) text += piece;
  return text;
}

}  // namespace

TEST_CASE("TOML is told by line and column where it breaks") {
  CHECK(parse_toml("a = [1, 2]", "x").get("a")->is_array());
  CHECK(message("a = 1\nb = = 2").find("schedule x.toml:2:5: not valid TOML: ") == 0);
}

TEST_CASE("nesting is bounded in every way TOML can nest") {
  CHECK(message("a" + repeated(".a", 200'000) + " = 1").find("200000 dots") != std::string::npos);
  CHECK(message("[a" + repeated(".a", 200'000) + "]").find("200000 dots") != std::string::npos);
  CHECK(message("a = " + repeated("[", 100'000)).find("not valid TOML") != std::string::npos);
  CHECK(message("a = " + repeated("{a=", 100'000)).find("not valid TOML") != std::string::npos);
  // The deepest that is let through comes and goes without harm.
  CHECK(message("a" + repeated(".a", 2000) + " = " + repeated("[", 200) + repeated("]", 200)).empty());
}

}  // namespace pyra
