// What a plugin says of itself, as `plugins info`, `plugins check` and `inspect` show it.
#pragma once
#include <nlohmann/json.hpp>
#include <ostream>

#include "host/plugin_registry.h"

namespace pyra::cli {

[[nodiscard]] nlohmann::json plugin_json(const host::PluginInfo& info);
void print_plugin(std::ostream& out, const host::PluginInfo& info);

}  // namespace pyra::cli
