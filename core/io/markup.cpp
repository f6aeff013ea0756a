#include "io/markup.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <utility>

namespace pyra::io {
namespace {

constexpr const char* kReplacement = "\xEF\xBF\xBD";  // U+FFFD
constexpr const char* kNoNumber = "\xE2\x80\x93";     // an en dash

/// Bytes of the UTF-8 character that `text` begins with; 0 when it begins with none (Unicode 15, table 3-7).
size_t utf8_length(std::string_view text) {
  const auto byte = [&](size_t i) { return i < text.size() ? static_cast<unsigned char>(text[i]) : 0u; };
  const auto continues = [&](size_t i) { return (byte(i) & 0xC0u) == 0x80u; };
  const unsigned first = byte(0);
  if (first < 0x80) return 1;
  if (first >= 0xC2 && first <= 0xDF) return continues(1) ? 2 : 0;
  if (first >= 0xE0 && first <= 0xEF) {
    // Neither longer than it need be nor a surrogate.
    const bool fits = (first != 0xE0 || byte(1) >= 0xA0) && (first != 0xED || byte(1) < 0xA0);
    return fits && continues(1) && continues(2) ? 3 : 0;
  }
  if (first >= 0xF0 && first <= 0xF4) {
    const bool fits = (first != 0xF0 || byte(1) >= 0x90) && (first != 0xF4 || byte(1) < 0x90);
    return fits && continues(1) && continues(2) && continues(3) ? 4 : 0;
  }
  return 0;
}

/// U+0000 to U+001F but tab and newline, and U+007F to U+009F.
bool is_control(std::string_view character) {
  const auto first = static_cast<unsigned char>(character[0]);
  if (character.size() == 1) return (first < 0x20 && first != '\t' && first != '\n') || first == 0x7F;
  return first == 0xC2 && static_cast<unsigned char>(character[1]) < 0xA0;
}

std::string_view reference(char letter) {
  switch (letter) {
    case '&':
      return "&amp;";
    case '<':
      return "&lt;";
    case '>':
      return "&gt;";
    case '"':
      return "&quot;";
    case '\'':
      return "&#39;";
    default:
      return {};
  }
}

constexpr const char* kStyle = R"(
:root{color-scheme:light dark;--bg:#fff;--fg:#1b1b1f;--dim:#5c5f66;--line:#d6d8dd;--card:#f5f6f8;--warn:#8a4b00;
--s0:#1662b0;--s1:#b0450e;--s2:#1d7a4c;--s3:#8a2f8f;--s4:#7a6200;--s5:#0e7584;--s6:#a3264b;--s7:#55606e}
@media(prefers-color-scheme:dark){:root{--bg:#15171b;--fg:#e6e7ea;--dim:#a2a6ae;--line:#3a3d45;--card:#1e2126;
--warn:#f0b45a;--s0:#6cb0f5;--s1:#f09560;--s2:#5fc890;--s3:#d58ad9;--s4:#d3b94a;--s5:#5cc5d3;--s6:#f0839f;--s7:#aab4c0}}
body{background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,sans-serif;margin:0}
main{max-width:76rem;margin:0 auto;padding:1rem}
h1{font-size:1.5rem}h2{font-size:1.2rem;margin-top:2rem}h3{font-size:1rem}
.dim{color:var(--dim)}.warn{color:var(--warn);font-weight:600}
.wide{overflow-x:auto}.row{display:flex;flex-wrap:wrap;gap:1rem}.row>*{flex:1 1 24rem;max-width:44rem;min-width:0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}caption{text-align:left;color:var(--dim)}
th,td{padding:.2rem .6rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
td.n,th.n{text-align:right;white-space:nowrap}tr.front td,tr.front th{background:var(--card)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1rem;margin:.5rem 0}dt{color:var(--dim)}dd{margin:0}
dd,td,h1,h2,li,summary{overflow-wrap:anywhere}
details{border:1px solid var(--line);border-radius:.4rem;padding:.5rem 1rem;margin:1rem 0}
summary{cursor:pointer;font-weight:600}a{color:var(--s0)}
svg{display:block;max-width:100%;height:auto;font:12px system-ui,sans-serif}svg text{fill:var(--fg)}
svg .dim{fill:var(--dim)}.axis{stroke:var(--dim);fill:none}.grid{stroke:var(--line);fill:none}
.curve{fill:none;stroke-linejoin:round}.front{stroke:var(--dim);stroke-dasharray:5 4;fill:none}
.s0{stroke:var(--s0)}.s1{stroke:var(--s1)}.s2{stroke:var(--s2)}.s3{stroke:var(--s3)}.s4{stroke:var(--s4)}
.s5{stroke:var(--s5)}.s6{stroke:var(--s6)}.s7{stroke:var(--s7)}
.f0{fill:var(--s0)}.f1{fill:var(--s1)}.f2{fill:var(--s2)}.f3{fill:var(--s3)}.f4{fill:var(--s4)}
.f5{fill:var(--s5)}.f6{fill:var(--s6)}.f7{fill:var(--s7)}.hollow{fill:var(--bg)}
)";

}  // namespace

std::string escaped(std::string_view text) {
  std::string safe;
  safe.reserve(text.size());
  while (!text.empty()) {
    const size_t length = utf8_length(text);
    const std::string_view character = text.substr(0, std::max<size_t>(1, length));
    if (length == 0 || is_control(character)) {
      safe += kReplacement;
    } else if (const std::string_view named = reference(character[0]); !named.empty()) {
      safe += named;
    } else {
      safe += character;
    }
    text.remove_prefix(character.size());
  }
  return safe;
}

std::string decimal(double value, int decimals) {
  if (!std::isfinite(value)) return kNoNumber;
  char text[400];  // 309 digits before the point at most
  std::string number(text, std::to_chars(text, text + sizeof text, value, std::chars_format::fixed, decimals).ptr);
  if (number.find('.') != std::string::npos) {
    number.resize(number.find_last_not_of('0') + 1);
    if (number.back() == '.') number.pop_back();
  }
  return number == "-0" ? "0" : number;
}

std::string significant(double value) {
  if (!std::isfinite(value)) return kNoNumber;
  char text[64];
  return {text, std::to_chars(text, text + sizeof text, value, std::chars_format::general, 7).ptr};
}

std::string percent(double share) {
  if (!std::isfinite(share)) return kNoNumber;
  char text[400];
  const char* end = std::to_chars(text, text + sizeof text, 100 * share, std::chars_format::fixed, 2).ptr;
  return std::string(static_cast<const char*>(text), end) + " %";
}

std::string base64(std::string_view bytes) {
  constexpr std::string_view kLetters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string text;
  text.reserve((bytes.size() + 2) / 3 * 4);
  const auto byte = [&](size_t i) { return i < bytes.size() ? uint32_t(static_cast<unsigned char>(bytes[i])) : 0u; };
  for (size_t i = 0; i < bytes.size(); i += 3) {
    const uint32_t word = byte(i) << 16 | byte(i + 1) << 8 | byte(i + 2);
    for (size_t letter = 0; letter < 4; ++letter)
      text += i + letter <= bytes.size() ? kLetters[word >> (18 - 6 * letter) & 63] : '=';
  }
  return text;
}

void Markup::begin(const char* tag, Attributes attributes) {
  out_.append(1, '<').append(tag);
  for (const Attribute& attribute : attributes)
    out_.append(1, ' ').append(attribute.name).append("=\"").append(attribute.value).append(1, '"');
}

void Markup::open(const char* tag, Attributes attributes) {
  begin(tag, attributes);
  out_ += '>';
  open_.push_back(tag);
}

void Markup::close() {
  out_.append("</").append(open_.back()).append(">\n");
  open_.pop_back();
}

void Markup::empty(const char* tag, Attributes attributes) {
  begin(tag, attributes);
  out_ += "/>\n";
}

void Markup::element(const char* tag, Attributes attributes, std::string_view content) {
  open(tag, attributes);
  text(content);
  close();
}

std::string Markup::id() {
  return "n" + std::to_string(++ids_);
}

void Markup::open_svg(double width, double height, std::string_view title, std::string_view description) {
  const std::string title_id = id(), description_id = id();
  open("svg", {{"xmlns", "http://www.w3.org/2000/svg"},
               {"viewBox", "0 0 " + decimal(width, 2) + " " + decimal(height, 2)},
               {"width", width},
               {"height", height},
               {"role", "img"},
               {"aria-labelledby", title_id + " " + description_id}});
  element("title", {{"id", title_id}}, title);
  element("desc", {{"id", description_id}}, description);
}

std::string Markup::take() && {
  while (!open_.empty()) close();
  return std::move(out_);
}

Markup open_page(std::string_view title) {
  Markup page;
  page.fixed("<!DOCTYPE html>\n");
  page.open("html", {{"lang", "en"}, {"xmlns", "http://www.w3.org/1999/xhtml"}});
  page.open("head");
  page.empty("meta", {{"charset", "utf-8"}});
  page.empty("meta", {{"http-equiv", "Content-Security-Policy"},
                      {"content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:"}});
  page.empty("meta", {{"name", "viewport"}, {"content", "width=device-width, initial-scale=1"}});
  page.element("title", title);
  page.open("style");
  page.fixed(kStyle);
  page.close();
  page.close();
  page.open("body");
  page.open("main");
  return page;
}

}  // namespace pyra::io
