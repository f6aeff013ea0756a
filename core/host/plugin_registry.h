// Opens plugins with Boost.DLL, checks their tag before anything of theirs runs, and never unloads them.
#pragma once
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "sdk/plugin.h"

namespace pyra::host {

struct PluginInfo {
  std::string kind, name, version, description;
  std::filesystem::path path;
  std::vector<sdk::Parameter> parameters;
};

/// Made once, in main (or by a library's user). A plugin that was asked for and cannot load is Error(plugin) with its
/// path and the reason; one that was not found, with the names that were. Nothing falls back to another plugin.
/// Const and without mutable state: threads may share it.
class PluginRegistry {
 public:
  /// Searched in order: `extra` (--plugin-path), $PYRA_PLUGIN_PATH (colon-separated), beside the binary
  /// (<folder of the program>/../lib/pyra/plugins), beside libpyra (<folder>/pyra/plugins). Never the working folder:
  /// entries of `extra` are made absolute here and must be folders; entries of $PYRA_PLUGIN_PATH must be absolute and
  /// need not exist. Anything else throws Error(usage).
  explicit PluginRegistry(const std::vector<std::filesystem::path>& extra = {});

  /// Names come from file names (libpyra_<kind>_<name>.so), so listing them loads nothing. Sorted; a name that stands
  /// in two folders is listed once, and the first folder's plugin is the one that is used.
  [[nodiscard]] std::vector<std::string> names(const std::string& kind) const;
  [[nodiscard]] const std::vector<std::filesystem::path>& search_path() const { return search_path_; }

  [[nodiscard]] PluginInfo info(const std::string& kind, const std::string& name) const;
  /// `given` is checked against the declaration, by Error(usage); `where` opens messages about it. What the factory
  /// throws becomes Error(plugin) naming the plugin, unless it is Error(usage) itself; so does what the object's
  /// methods throw (guarded_plugin.h).
  [[nodiscard]] std::shared_ptr<const sdk::TokenMerger> merger(const std::string& name,
                                                               const std::map<std::string, sdk::ParameterValue>& given,
                                                               std::string_view where) const;
  [[nodiscard]] std::shared_ptr<const sdk::PeftMethod> peft(const std::string& name,
                                                            const std::map<std::string, sdk::ParameterValue>& given,
                                                            std::string_view where) const;

  /// Opens one file as a plugin would be and returns what it says of itself: `plugins check`. The factory runs once
  /// with default parameters.
  [[nodiscard]] static PluginInfo check(const std::filesystem::path& file);

 private:
  [[nodiscard]] std::filesystem::path find(const std::string& kind, const std::string& name) const;
  std::vector<std::filesystem::path> search_path_;
};

}  // namespace pyra::host
