// What an outsider's plugin can do: everything a built-in one can. Runs the installed, moved program.
#include "catch.h"
#include "support.h"

TEST_CASE("the installed program runs where it was moved", "[package]") {
  const auto result = pyra::test::run({PYRA_PACKAGE "/prefix/bin/pyractl", "--version"});
  CAPTURE(result.out, result.err);
  CHECK(result.exit_code == 0);
}
