// pyractl plugins: which there are, what one can do, whether a file is one, and the start of a new one.
#include <iomanip>

#include "base/error.h"
#include "command.h"
#include "plugin_facts.h"
#include "tasks/scaffold.h"

namespace pyra::cli {
namespace {

using nlohmann::json;

constexpr const char* kKinds[] = {"merge", "peft"};

json value_json(const sdk::ParameterValue& value) {
  return std::visit([](const auto& held) { return json(held); }, value);
}

int list(Session& session) {
  json plugins = json::array();
  for (const char* kind : kKinds) {
    for (const std::string& name : session.plugins().names(kind)) {
      try {
        plugins.push_back(plugin_json(session.plugins().info(kind, name)));
      } catch (const Error& error) {
        // A broken neighbour must not hide the others; `plugins info NAME` and every use of it do stop.
        plugins.push_back({{"kind", kind}, {"name", name}, {"problem", error.what()}});
      }
    }
  }
  json folders = json::array();
  for (const auto& folder : session.plugins().search_path()) folders.push_back(folder.string());
  session.print({{"plugins", plugins}, {"search_path", folders}}, [&](std::ostream& out) {
    for (const json& plugin : plugins)
      out << std::left << std::setw(6) << plugin["kind"].get<std::string>() << std::setw(14)
          << plugin["name"].get<std::string>()
          << (plugin.contains("problem") ? "DOES NOT LOAD: " + plugin["problem"].get<std::string>()
                                         : plugin["description"].get<std::string>())
          << "\n";
    if (plugins.empty()) out << "no plugin was found\n";
    out << "\nsearched, in order:\n";
    for (const json& folder : folders) out << "  " << folder.get<std::string>() << "\n";
  });
  return 0;
}

int info(Session& session, const std::string& name) {
  std::vector<std::string> found, kinds;
  for (const char* kind : kKinds)
    for (const std::string& known : session.plugins().names(kind)) {
      found.push_back(known);
      if (known == name) kinds.emplace_back(kind);
    }
  if (kinds.empty())
    fail(ExitCode::plugin, "no plugin '", name, "'", did_you_mean(name, found), " (found: ", join(found), ")");
  json document = json::array();
  std::vector<host::PluginInfo> infos;
  infos.reserve(kinds.size());
  for (const std::string& kind : kinds) infos.push_back(session.plugins().info(kind, name));
  for (const host::PluginInfo& plugin : infos) document.push_back(plugin_json(plugin));
  // Two kinds may share a name; one plugin is one object, which is what scripts expect.
  session.print(document.size() == 1 ? document[0] : document, [&](std::ostream& out) {
    for (const host::PluginInfo& plugin : infos) print_plugin(out, plugin);
  });
  return 0;
}

int check(Session& session, const std::filesystem::path& file) {
  const host::PluginInfo plugin = host::PluginRegistry::check(file);
  session.print(plugin_json(plugin), [&](std::ostream& out) {
    print_plugin(out, plugin);
    out << "loads: yes\n";
  });
  return 0;
}

int create(Session& session, const std::string& kind, const std::string& name, const std::filesystem::path& folder) {
  const auto written = tasks::new_plugin(kind, name, folder);
  json files = json::array();
  for (const auto& path : written) files.push_back(path.string());
  session.print({{"written", files}}, [&](std::ostream& out) {
    for (const auto& path : written) out << path.string() << "\n";
    out << "Next: README.md there says how to build and try it.\n";
  });
  return 0;
}

}  // namespace

json plugin_json(const host::PluginInfo& info) {
  json parameters = json::array();
  for (const sdk::Parameter& parameter : info.parameters) {
    json entry{{"name", parameter.name},
               {"type", sdk::type_name(parameter.default_value)},
               {"default", value_json(parameter.default_value)},
               {"help", parameter.help}};
    if (parameter.minimum) entry["minimum"] = *parameter.minimum;
    if (parameter.maximum) entry["maximum"] = *parameter.maximum;
    if (!parameter.choices.empty()) entry["choices"] = parameter.choices;
    parameters.push_back(entry);
  }
  return {{"kind", info.kind},          {"name", info.name},
          {"version", info.version},    {"description", info.description},
          {"path", info.path.string()}, {"parameters", parameters}};
}

void print_plugin(std::ostream& out, const host::PluginInfo& info) {
  out << info.name << " " << info.version << ", a " << info.kind << " plugin\n"
      << info.description << "\n"
      << info.path.string() << "\n";
  if (info.parameters.empty()) out << "no parameters\n";
  for (const sdk::Parameter& parameter : info.parameters) {
    out << "  " << info.kind << "." << parameter.name << " = " << sdk::to_text(parameter.default_value) << "  ("
        << sdk::type_name(parameter.default_value);
    if (parameter.minimum) out << ", at least " << *parameter.minimum;
    if (parameter.maximum) out << ", at most " << *parameter.maximum;
    if (!parameter.choices.empty()) out << ": " << join(parameter.choices);
    out << ")\n      " << parameter.help << "\n";
  }
}

void add_plugins(CLI::App& root, Session& session) {
  CLI::App* command = add_command(root, session, "plugins", "List, describe, check and start plugins");
  // The common options may follow `plugins list` too.
  command->require_subcommand(0, 1);
  command->fallthrough();
  command->footer(R"(
Without a word: list.

Examples:
  pyractl plugins
  pyractl plugins info pyra
  pyractl plugins check build/lib/pyra/plugins/libpyra_merge_mine.so
  pyractl plugins new merge mine --out mine/)");
  command->callback([&session, command] {
    if (command->get_subcommands().empty()) session.action = [&session] { return list(session); };
  });

  command->add_subcommand("list", "All plugins that are found, and where was looked")->callback([&session] {
    session.action = [&session] { return list(session); };
  });

  CLI::App* info_command = command->add_subcommand("info", "What a plugin does and its parameters");
  const auto name = std::make_shared<std::string>();
  info_command->add_option("NAME", *name, "As listed")->required()->type_name("");
  info_command->callback([&session, name] { session.action = [&session, name] { return info(session, *name); }; });

  CLI::App* check_command = command->add_subcommand("check", "Open a file as a plugin would be");
  const auto file = std::make_shared<std::filesystem::path>();
  check_command->add_option("FILE", *file, "libpyra_<kind>_<name>.so")->required()->type_name("");
  check_command->callback([&session, file] { session.action = [&session, file] { return check(session, *file); }; });

  CLI::App* new_command = command->add_subcommand("new", "Write a plugin project that compiles as it is");
  const auto kind = std::make_shared<std::string>(), new_name = std::make_shared<std::string>();
  const auto folder = std::make_shared<std::filesystem::path>();
  new_command->add_option("KIND", *kind, "merge or peft")->required()->type_name("");
  new_command->add_option("NAME", *new_name, "Lower-case letters, digits and _")->required()->type_name("");
  new_command->add_option("--out", *folder, "Folder to write into; default: NAME")->type_name("DIR");
  new_command->callback([&session, kind, new_name, folder] {
    session.action = [&session, kind, new_name, folder] {
      return create(session, *kind, *new_name, folder->empty() ? std::filesystem::path(*new_name) : *folder);
    };
  });
}

}  // namespace pyra::cli
