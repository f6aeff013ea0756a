#include "io/markup.h"

#include <limits>
#include <locale>

#include "base/philox.h"
#include "catch.h"
#include "pages.h"

using namespace pyra;
using test::PageReader;

namespace {

const Philox kRandom(11, RandomStream::bench);

/// The letters that matter, and any byte.
std::string random_bytes(uint64_t number) {
  constexpr std::string_view kLetters = "<>&\"';=/ a\n\t\r\x01\x7f\xc2\x80\xe2\x82\xac\xed\xa0\xf0\x9f\x98\xff";
  std::string text;
  const uint64_t length = kRandom.below(number * 64, 40);
  for (uint64_t i = 0; i < length; ++i) {
    const uint64_t draw = kRandom.below(number * 64 + i + 1, 256 + 4 * kLetters.size());
    text += draw < 256 ? char(draw) : kLetters[(draw - 256) % kLetters.size()];
  }
  return text;
}

std::string utf8(uint32_t code) {
  if (code < 0x80) return {char(code)};
  if (code < 0x800) return {char(0xC0 | code >> 6), char(0x80 | (code & 63))};
  if (code < 0x10000) return {char(0xE0 | code >> 12), char(0x80 | (code >> 6 & 63)), char(0x80 | (code & 63))};
  return {char(0xF0 | code >> 18), char(0x80 | (code >> 12 & 63)), char(0x80 | (code >> 6 & 63)),
          char(0x80 | (code & 63))};
}

/// Code points of all lengths that stand for themselves.
std::string random_text(uint64_t number) {
  std::string text;
  for (uint64_t i = 0; i < 20; ++i) {
    const auto draw = uint32_t(kRandom.below(number * 64 + i, 1 << 16));
    const uint32_t limits[] = {0x5F, 0x700, 0xC000, 0x100000};
    const uint32_t firsts[] = {0x20, 0xA0, 0x800, 0x10000};
    text += utf8(firsts[draw % 4] + uint32_t(uint64_t(draw) * limits[draw % 4] >> 16));
  }
  return text;
}

std::string unescaped(std::string text) {
  for (const auto& [reference, letter] :
       {std::pair{"&lt;", "<"}, {"&gt;", ">"}, {"&quot;", "\""}, {"&#39;", "'"}, {"&amp;", "&"}}) {
    for (size_t at = 0; (at = text.find(reference, at)) != std::string::npos; ++at)
      text.replace(at, std::string_view(reference).size(), letter);
  }
  return text;
}

struct Continental : std::numpunct<char> {
  char do_decimal_point() const override { return ','; }
  char do_thousands_sep() const override { return '.'; }
  std::string do_grouping() const override { return "\3"; }
};

}  // namespace

TEST_CASE("whatever bytes a text has, they stay text", "[markup]") {
  for (uint64_t number = 0; number < 3000; ++number) {
    const std::string text = random_bytes(number);
    io::Markup markup;
    markup.open("p", {{"title", text}});
    markup.text(text);
    const std::string page = std::move(markup).take();
    PageReader reader(page);
    INFO("text " << number << ": " << page);
    REQUIRE(reader.fault().empty());
    REQUIRE(reader.elements == std::vector<std::string>{"p"});
    REQUIRE(reader.attributes.size() == 1);
    // Escaped text is UTF-8 without control characters: escaping what stands for it changes nothing more.
    REQUIRE(io::escaped(unescaped(io::escaped(text))) == io::escaped(text));
  }
}

TEST_CASE("text that is UTF-8 comes back letter by letter", "[markup]") {
  for (uint64_t number = 0; number < 2000; ++number) {
    const std::string text = random_text(number);
    REQUIRE(unescaped(io::escaped(text)) == text);
  }
}

TEST_CASE("what is no character becomes U+FFFD", "[markup]") {
  const std::string mark = "\xEF\xBF\xBD";
  CHECK(io::escaped("a<b & 'c' \"d\">") == "a&lt;b &amp; &#39;c&#39; &quot;d&quot;&gt;");
  CHECK(io::escaped(std::string_view("\0x", 2)) == mark + "x");
  CHECK(io::escaped("\x1b[31m") == mark + "[31m");
  CHECK(io::escaped("\t\n") == "\t\n");
  CHECK(io::escaped("\xC0\xBC") == mark + mark);             // an overlong <
  CHECK(io::escaped("\xE0\x80\xBC") == mark + mark + mark);  // likewise
  CHECK(io::escaped("\xED\xA0\x80") == mark + mark + mark);  // a surrogate
  CHECK(io::escaped("\xF4\x90\x80\x80").size() == 4 * 3);    // beyond U+10FFFF
  CHECK(io::escaped("\xE2\x82") == mark + mark);             // cut
  CHECK(io::escaped("\xE2\x82<script>") == mark + mark + "&lt;script&gt;");
  CHECK(io::escaped("\xC2\x85") == mark);  // a control character of two bytes
  CHECK(io::escaped("\xE2\x82\xAC") == "\xE2\x82\xAC");
}

TEST_CASE("numbers are the same in every locale", "[markup]") {
  const auto all = [] {
    return std::vector<std::string>{io::decimal(1234567.891, 2), io::decimal(-0.25, 3), io::significant(40318.5),
                                    io::percent(0.77), io::decimal(2000, 0)};
  };
  const std::vector<std::string> expected{"1234567.89", "-0.25", "40318.5", "77.00 %", "2000"};
  CHECK(all() == expected);
  const std::locale before = std::locale::global(std::locale(std::locale::classic(), new Continental));
  const auto got = all();
  std::locale::global(before);
  CHECK(got == expected);
}

TEST_CASE("numbers at their limits", "[markup]") {
  CHECK(io::decimal(3.0, 2) == "3");
  CHECK(io::decimal(100, 0) == "100");
  CHECK(io::decimal(-0.0001, 2) == "0");
  CHECK(io::decimal(1e308, 2).size() == 309);
  CHECK(io::significant(1e-6) == "1e-06");
  CHECK(io::significant(0.1 + 0.2) == "0.3");
  for (const double value : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    CHECK(io::decimal(value, 2) == "\xE2\x80\x93");
    CHECK(io::significant(-value) == "\xE2\x80\x93");
    CHECK(io::percent(value) == "\xE2\x80\x93");
  }
}

TEST_CASE("base64 as RFC 4648 has it", "[markup]") {
  CHECK(io::base64("").empty());
  CHECK(io::base64("f") == "Zg==");
  CHECK(io::base64("fo") == "Zm8=");
  CHECK(io::base64("foo") == "Zm9v");
  CHECK(io::base64("foob") == "Zm9vYg==");
  CHECK(io::base64("fooba") == "Zm9vYmE=");
  CHECK(io::base64("foobar") == "Zm9vYmFy");
  CHECK(io::base64("\xFB\xFF\xBF") == "+/+/");
}

TEST_CASE("a page is whole wherever its writer stops, and asks for nothing", "[markup]") {
  io::Markup page = io::open_page("A & B");
  page.open("table");
  page.open("tr");
  page.element("td", {{"class", "n"}}, "<3>");
  const std::string text = std::move(page).take();
  CAPTURE(text);
  CHECK(test::page_fault(text).empty());
  CHECK(text.find("<title>A &amp; B</title>") != std::string::npos);
  CHECK(text.find("default-src 'none'") == std::string::npos);  // escaped in its attribute
  CHECK(text.find("default-src &#39;none&#39;") != std::string::npos);
  CHECK(text.find("prefers-color-scheme:dark") != std::string::npos);
  CHECK(text.find("url(") == std::string::npos);
}
