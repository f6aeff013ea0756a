// HTML and SVG, written so that nothing out of a file becomes markup and no locale changes a number.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>
#include <vector>

namespace pyra::io {

/// Text as an element's content or a quoted attribute's value: & < > " ' as references; control characters other than
/// newline and tab, and bytes that are not UTF-8, become U+FFFD.
[[nodiscard]] std::string escaped(std::string_view text);

/// At most `decimals` digits after the point, without trailing zeros: "12.5", "3", "-0.25". "–" for what is not finite.
[[nodiscard]] std::string decimal(double value, int decimals);
/// Seven significant digits at most: "0.001", "1e-06", "40000". "–" for what is not finite.
[[nodiscard]] std::string significant(double value);
/// 0.7725 as "77.25 %", always two decimals.
[[nodiscard]] std::string percent(double share);

/// RFC 4648, with padding.
[[nodiscard]] std::string base64(std::string_view bytes);

/// An attribute; numbers have two decimals at most.
struct Attribute {
  Attribute(const char* attribute, std::string_view text) : name(attribute), value(escaped(text)) {}
  Attribute(const char* attribute, double number) : name(attribute), value(decimal(number, 2)) {}
  const char* name;
  std::string value;  ///< escaped
};

/// A document under way. Tags and attribute names are ours, in the source; everything else is escaped. Elements are
/// closed in the order that they need, and empty ones are written as XML wants them: pages are well-formed XML too.
class Markup {
 public:
  using Attributes = std::initializer_list<Attribute>;
  void open(const char* tag, Attributes attributes = {});
  void close();
  /// <tag …/>
  void empty(const char* tag, Attributes attributes = {});
  /// <tag …>text</tag>
  void element(const char* tag, Attributes attributes, std::string_view text);
  void element(const char* tag, std::string_view text) { element(tag, {}, text); }
  void text(std::string_view text) { out_ += escaped(text); }
  /// Markup from the source (a style sheet), as it is. Never anything read from a file.
  void fixed(const char* markup) { out_ += markup; }
  /// A name for an element that others refer to: "n1", "n2" …
  [[nodiscard]] std::string id();
  /// <svg role="img"> of this size with a title and a description that screen readers speak; close() ends it.
  void open_svg(double width, double height, std::string_view title, std::string_view description);
  /// The whole text; what is still open is closed.
  [[nodiscard]] std::string take() &&;

 private:
  void begin(const char* tag, Attributes attributes);
  std::string out_;
  std::vector<const char*> open_;
  int64_t ids_ = 0;
};

/// The start of a page: doctype, head with a style sheet for light and dark screens, and a policy that forbids scripts
/// and everything from elsewhere; <main> is open.
[[nodiscard]] Markup open_page(std::string_view title);

}  // namespace pyra::io
