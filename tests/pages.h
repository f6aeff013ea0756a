// What tests look for in a page that the program wrote: well-formed XML, and nothing from elsewhere.
#pragma once
#include <cctype>
#include <string>
#include <string_view>
#include <vector>

#include "base/text.h"

namespace pyra::test {

/// Reads a page as strictly as XML does, as far as ours go (no comments, no CDATA); "" or what is wrong, and where.
class PageReader {
 public:
  explicit PageReader(std::string_view page) : page_(page) {}

  [[nodiscard]] std::string fault() {
    if (page_.starts_with("<!DOCTYPE html>")) at_ = 15;
    while (at_ < page_.size()) {
      const std::string wrong = page_[at_] == '<' ? tag() : reference_or_text();
      if (!wrong.empty()) return cat(wrong, " at ", at_, ": ", page_.substr(at_, 60));
    }
    return open_.empty() ? "" : cat("<", open_.back(), "> is not closed");
  }

  /// Names of the elements, in order, and all attributes "name=value" with references as they stand.
  std::vector<std::string> elements, attributes;

 private:
  std::string reference_or_text() {
    if (page_[at_] != '&') return ++at_, "";
    for (const char* known : {"&amp;", "&lt;", "&gt;", "&quot;", "&#39;"}) {
      if (!page_.substr(at_).starts_with(known)) continue;
      at_ += std::string_view(known).size();
      return {};
    }
    return "a bare &";
  }

  std::string word() {
    const size_t begin = at_;
    while (at_ < page_.size() && (std::isalnum(static_cast<unsigned char>(page_[at_])) || page_[at_] == '-')) ++at_;
    return std::string(page_.substr(begin, at_ - begin));
  }

  bool take(std::string_view text) {
    if (!page_.substr(at_).starts_with(text)) return false;
    at_ += text.size();
    return true;
  }

  std::string tag() {
    if (take("</")) {
      const std::string name = word();
      if (open_.empty() || open_.back() != name || !take(">")) return "</" + name + "> closes nothing";
      open_.pop_back();
      return {};
    }
    ++at_;
    const std::string name = word();
    if (name.empty()) return "a bare <";
    elements.push_back(name);
    while (take(" ")) {
      const std::string wrong = attribute();
      if (!wrong.empty()) return wrong;
    }
    if (take("/>")) return {};
    if (!take(">")) return "<" + name + " does not end";
    open_.push_back(name);
    return {};
  }

  std::string attribute() {
    const std::string name = word();
    if (name.empty() || !take("=\"")) return "an attribute without a quoted value";
    const size_t begin = at_;
    while (at_ < page_.size() && page_[at_] != '"') {
      if (page_[at_] == '<') return "< in an attribute";
      if (const std::string wrong = reference_or_text(); !wrong.empty()) return wrong;
    }
    attributes.push_back(name + "=" + std::string(page_.substr(begin, at_ - begin)));
    return take("\"") ? "" : "an attribute without an end";
  }

  std::string_view page_;
  size_t at_ = 0;
  std::vector<std::string> open_;
};

/// "" when the page is well-formed, runs nothing and asks for nothing: no script, no frame, no handler, and links only
/// to places in it, to data, or to pages beside it.
inline std::string page_fault(std::string_view page) {
  PageReader reader(page);
  if (const std::string wrong = reader.fault(); !wrong.empty()) return wrong;
  for (const std::string& name : reader.elements) {
    for (const char* bad : {"script", "iframe", "object", "embed", "link", "img", "form", "base", "foreignObject"})
      if (name == bad) return cat("holds <", name, ">");
  }
  for (const std::string& attribute : reader.attributes) {
    if (attribute.starts_with("on")) return "holds a handler: " + attribute;
    if (attribute.starts_with("style=")) return "holds a style: " + attribute;
    if (!attribute.starts_with("href=") && !attribute.starts_with("src=")) continue;
    const std::string target = attribute.substr(attribute.find('=') + 1);
    const bool beside = target.find(':') == std::string::npos && target.find('/') == std::string::npos;
    if (!beside && !target.starts_with("data:image/png;base64,")) return "refers to " + target;
  }
  return {};
}

/// How often `word` stands in `text`.
inline size_t count_of(std::string_view text, std::string_view word) {
  size_t count = 0;
  for (size_t at = 0; (at = text.find(word, at)) != std::string_view::npos; at += word.size()) ++count;
  return count;
}

}  // namespace pyra::test
