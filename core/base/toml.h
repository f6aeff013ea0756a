// TOML from users and others, with bounds that the parser itself does not have.
#pragma once
#include <toml++/toml.h>

#include <string>
#include <string_view>

namespace pyra {

/// Error(usage), `where` opens the text, with line and column: syntax, invalid UTF-8, nesting without bounds.
[[nodiscard]] toml::table parse_toml(std::string_view text, const std::string& where);

}  // namespace pyra
