#include "host/plugin_registry.h"

#include <dlfcn.h>

#include <boost/dll/runtime_symbol_info.hpp>
#include <boost/dll/shared_library.hpp>
#include <cstdlib>
#include <set>

#include "base/error.h"
#include "base/guard.h"
#include "host/elf_check.h"
#include "host/guarded_plugin.h"

namespace pyra::host {
namespace fs = std::filesystem;
namespace {

constexpr std::string_view kPrefix = "libpyra_", kSuffix = ".so";

/// What a file name says: libpyra_<kind>_<name>.so.
struct FileName {
  std::string kind, name;
};

bool is_word(std::string_view text) {
  const auto plain = [](unsigned char c) { return std::isalnum(c) || c == '_' || c == '-'; };
  return !text.empty() && std::all_of(text.begin(), text.end(), plain);
}

std::optional<FileName> parse_file_name(const fs::path& file) {
  const std::string text = file.filename().string();
  std::string_view rest = text;
  if (!rest.starts_with(kPrefix) || !rest.ends_with(kSuffix)) return std::nullopt;
  rest.remove_prefix(kPrefix.size());
  if (rest.size() <= kSuffix.size()) return std::nullopt;
  rest.remove_suffix(kSuffix.size());
  const size_t underscore = rest.find('_');
  if (underscore == std::string_view::npos) return std::nullopt;
  const std::string_view kind = rest.substr(0, underscore), name = rest.substr(underscore + 1);
  if ((kind != "merge" && kind != "peft") || !is_word(name)) return std::nullopt;
  return FileName{std::string(kind), std::string(name)};
}

std::string who(const fs::path& file) {
  return cat("plugin ", file.string());
}

[[noreturn]] void refuse(const fs::path& file, const std::string& reason) {
  fail(ExitCode::plugin, who(file), ": ", reason);
}

std::string text_or(const char* text, const char* otherwise) {
  return text ? text : otherwise;
}

/// The entry of a file whose name says `expected`, its tag, kind and name checked.
const PyraPlugin& open(fs::path file, FileName expected) {  // by value: GCC takes references for what is returned
  const std::string damaged = check_elf(file);
  if (!damaged.empty()) refuse(file, damaged);
  // Its code must outlive every object it made, wherever that dies; so it stays mapped when the handle closes.
  const auto mode = boost::dll::load_mode::rtld_now | boost::dll::load_mode::rtld_local |
                    static_cast<boost::dll::load_mode::type>(RTLD_NODELETE);
  const PyraPlugin* plugin = guard(who(file), "loading", [&] {
    boost::dll::shared_library library(file, mode);
    if (!library.has(PYRA_TEXT(PYRA_PLUGIN_ENTRY))) {
      refuse(file, "it has no symbol " PYRA_TEXT(PYRA_PLUGIN_ENTRY) ", so it is not a plugin; "
                   "a plugin ends with PYRA_MERGE_PLUGIN or PYRA_PEFT_PLUGIN");
    }
    return library.get<const PyraPlugin*()>(PYRA_TEXT(PYRA_PLUGIN_ENTRY))();
  });
  if (!plugin) refuse(file, "its entry returned nothing");
  const std::string tag = text_or(plugin->abi_tag, "(none)");
  if (tag != PYRA_ABI_TAG) {
    refuse(file, cat("it was built for another version: its tag is '", tag, "', this program's '", PYRA_ABI_TAG,
                     "'; build it again against this installation"));
  }
  const std::string kind = text_or(plugin->kind, "(none)"), name = text_or(plugin->name, "(none)");
  if (kind != expected.kind || name != expected.name) {
    refuse(file, cat("it says that it is the ", kind, " plugin '", name, "'; its file name says ", expected.kind, " '",
                     expected.name, "'"));
  }
  if (!plugin->parameters || !(kind == "merge" ? bool(plugin->create_merger) : bool(plugin->create_peft))) {
    refuse(file, "its entry lacks a factory or its parameters");
  }
  return *plugin;
}

std::vector<sdk::Parameter> parameters_of(const PyraPlugin& plugin, const fs::path& file) {
  auto declared = guard(who(file), "parameters()", [&] { return plugin.parameters(); });
  if (const std::string wrong = sdk::check_declared(plugin.kind, declared); !wrong.empty()) refuse(file, wrong);
  return declared;
}

PluginInfo describe(const PyraPlugin& plugin, const fs::path& file) {
  return {.kind = plugin.kind,
          .name = plugin.name,
          .version = text_or(plugin.version, ""),
          .description = text_or(plugin.description, ""),
          .path = file,
          .parameters = parameters_of(plugin, file)};
}

template <class Object>
std::shared_ptr<const Object> create(Object* (*factory)(const sdk::Parameters&), const sdk::Parameters& parameters,
                                     const fs::path& file) {
  std::shared_ptr<const Object> object(guard(who(file), "its factory", [&] { return factory(parameters); }));
  if (!object) refuse(file, "its factory returned nothing");
  return object;
}

fs::path normal(const fs::path& folder) {
  std::error_code ignored;
  const fs::path resolved = fs::weakly_canonical(folder, ignored);
  return resolved.empty() ? folder : resolved;
}

std::vector<fs::path> environment_folders() {
  std::vector<fs::path> folders;
  const char* text = std::getenv("PYRA_PLUGIN_PATH");
  for (const std::string& entry : split(text ? text : "", ':')) {
    if (entry.empty()) continue;
    if (!fs::path(entry).is_absolute()) {
      fail(ExitCode::usage, "PYRA_PLUGIN_PATH: '", entry,
           "' is relative; expected absolute folders, so that plugins "
           "are never taken from the working folder");
    }
    folders.emplace_back(entry);
  }
  return folders;
}

}  // namespace

PluginRegistry::PluginRegistry(const std::vector<fs::path>& extra) {
  const auto add = [this](const fs::path& folder) {
    const fs::path path = normal(folder);
    if (std::find(search_path_.begin(), search_path_.end(), path) == search_path_.end()) search_path_.push_back(path);
  };
  for (const fs::path& folder : extra) {
    std::error_code error;
    if (!fs::is_directory(folder, error)) fail(ExitCode::usage, "--plugin-path ", folder.string(), ": not a folder");
    add(fs::absolute(folder));
  }
  for (const fs::path& folder : environment_folders()) add(folder);
  add(boost::dll::program_location().parent_path() / ".." / "lib" / "pyra" / "plugins");
  add(boost::dll::this_line_location().parent_path() / "pyra" / "plugins");
}

std::vector<std::string> PluginRegistry::names(const std::string& kind) const {
  std::set<std::string> found;
  for (const fs::path& folder : search_path_) {
    std::error_code error;
    for (auto file = fs::directory_iterator(folder, error); !error && file != fs::directory_iterator();
         file.increment(error)) {
      const auto parsed = parse_file_name(file->path());
      if (parsed && parsed->kind == kind) found.insert(parsed->name);
    }
  }
  return {found.begin(), found.end()};
}

fs::path PluginRegistry::find(const std::string& kind, const std::string& name) const {
  for (const fs::path& folder : search_path_) {
    if (!is_word(name)) break;
    const fs::path file = folder / cat(kPrefix, kind, "_", name, kSuffix);
    std::error_code error;
    if (fs::exists(file, error)) return file;
  }
  const std::vector<std::string> found = names(kind);
  std::vector<std::string> folders;
  for (const fs::path& folder : search_path_) folders.push_back(folder.string());
  fail(ExitCode::plugin, "there is no ", kind, " plugin '", name,
       "' (found: ", found.empty() ? std::string("none") : join(found), "; searched: ", join(folders), ")",
       did_you_mean(name, found));
}

PluginInfo PluginRegistry::info(const std::string& kind, const std::string& name) const {
  const fs::path file = find(kind, name);
  return describe(open(file, {kind, name}), file);
}

std::shared_ptr<const sdk::TokenMerger> PluginRegistry::merger(const std::string& name,
                                                               const std::map<std::string, sdk::ParameterValue>& given,
                                                               std::string_view where) const {
  const fs::path file = find("merge", name);
  const PyraPlugin& plugin = open(file, {"merge", name});
  return guarded(create(plugin.create_merger, sdk::Parameters(describe(plugin, file).parameters, given, where), file),
                 name);
}

std::shared_ptr<const sdk::PeftMethod> PluginRegistry::peft(const std::string& name,
                                                            const std::map<std::string, sdk::ParameterValue>& given,
                                                            std::string_view where) const {
  const fs::path file = find("peft", name);
  const PyraPlugin& plugin = open(file, {"peft", name});
  return guarded(create(plugin.create_peft, sdk::Parameters(describe(plugin, file).parameters, given, where), file),
                 name);
}

PluginInfo PluginRegistry::check(const fs::path& file) {
  const auto expected = parse_file_name(file);
  if (!expected) refuse(file, "a plugin's file is called libpyra_merge_<name>.so or libpyra_peft_<name>.so");
  const PyraPlugin& plugin = open(fs::absolute(file), *expected);
  PluginInfo info = describe(plugin, file);
  const sdk::Parameters defaults(info.parameters, {}, file.string());
  if (plugin.create_merger) {
    (void)create(plugin.create_merger, defaults, file);
  } else {
    (void)create(plugin.create_peft, defaults, file);
  }
  return info;
}

}  // namespace pyra::host
