#include "base/text.h"

#include "catch.h"

namespace pyra {

TEST_CASE("text from a file is shown without what a terminal would obey") {
  CHECK(printable("plain é") == "plain é");
  CHECK(printable("a\n\x1b[2J\x7f") == "a\\x0a\\x1b[2J\\x7f");
  CHECK(printable("a\xc2\x9b"
                  "2Jb\xc2\x80\xc2\x9f") == "a\\xc2\\x9b2Jb\\xc2\\x80\\xc2\\x9f");  // CSI in one character
  CHECK(printable("\xc2\xa0§") == "\xc2\xa0§");
  CHECK(printable("a\xc2") == "a\xc2");
  CHECK(printable("") == "");
}

TEST_CASE("long text is cut between characters") {
  CHECK(printable("abcdef", 6) == "abcdef");
  CHECK(printable("abcdefg", 6) == "abcdef…");
  CHECK(printable("abcdé", 5) == "abcd…");
}

TEST_CASE("a hint is given only for a name that is near") {
  const std::vector<std::string> names{"batch", "epochs", "lr"};
  CHECK(did_you_mean("batchs", names) == "; did you mean 'batch'?");
  CHECK(did_you_mean("something", names).empty());
  CHECK(nearest(std::string(10'000, 'x'), names).empty());
}

TEST_CASE("split keeps empty pieces") {
  CHECK(split("a,,b", ',') == std::vector<std::string>{"a", "", "b"});
  CHECK(split("", ',').empty());
}

TEST_CASE("digits are grouped by three") {
  CHECK(grouped(1234567) == "1 234 567");
  CHECK(grouped(-123) == "-123");
  CHECK(grouped(-1234) == "-1 234");
  CHECK(grouped(0) == "0");
}

}  // namespace pyra
