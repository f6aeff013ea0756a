#include "base/toml.h"

#include <algorithm>

#include "base/error.h"

namespace pyra {
namespace {

// Each dot may open one more table, and tables are taken down by recursion.
constexpr int64_t kMaxDots = 2000;

}  // namespace

toml::table parse_toml(std::string_view text, const std::string& where) {
  if (const auto dots = std::count(text.begin(), text.end(), '.'); dots > kMaxDots) {
    fail(ExitCode::usage, where, ": has ", dots, " dots, the limit is ", kMaxDots);
  }
  try {
    return toml::parse(text);
  } catch (const toml::parse_error& error) {
    const toml::source_position at = error.source().begin;
    fail(ExitCode::usage, where, ":", at.line, ":", at.column,
         ": not valid TOML: ", printable(error.description(), 300));
  }
}

}  // namespace pyra
