// pyractl doctor: what this machine and this installation offer, and what stands in the way.
#include <iomanip>

#include "base/error.h"
#include "base/temporary.h"
#include "command.h"
#include "sdk/plugin.h"
#include "tasks/machine.h"

namespace pyra::cli {
namespace {

struct PluginState {
  std::string kind, name, version, path, problem;
};

std::vector<PluginState> plugin_states(const host::PluginRegistry& registry) {
  std::vector<PluginState> states;
  for (const char* kind : {"merge", "peft"}) {
    for (const std::string& name : registry.names(kind)) {
      try {
        const host::PluginInfo info = registry.info(kind, name);
        states.push_back({kind, name, info.version, info.path.string(), ""});
      } catch (const Error& error) {
        states.push_back({kind, name, "", "", error.what()});
      }
    }
  }
  return states;
}

/// "" when files can be made there, else why not.
std::string temporary_folder_problem(const std::filesystem::path& folder) {
  try {
    (void)unnamed_file(folder);
    return "";
  } catch (const Error& error) {
    return error.what();
  }
}

std::string gibibytes(uint64_t bytes) {
  std::ostringstream text;
  text << std::fixed << std::setprecision(1) << double(bytes) / double(1ull << 30) << " GiB";
  return text.str();
}

int run_doctor(Session& session) {
  const tasks::Machine machine = tasks::describe_machine();
  const host::PluginRegistry& registry = session.plugins();
  const std::vector<PluginState> plugins = plugin_states(registry);
  const std::string temporary = temporary_folder();
  const std::string temporary_problem = temporary_folder_problem(temporary);
  const std::string gpu = machine.gpu;
  std::vector<std::string> problems;
  ExitCode code = ExitCode::ok;
  if (!temporary_problem.empty()) {
    problems.push_back(temporary_problem);
    code = ExitCode::output;
  }
  if (plugins.empty()) problems.push_back("no plugin was found");
  for (const PluginState& plugin : plugins)
    if (!plugin.problem.empty()) problems.push_back(plugin.problem);
  if (problems.size() > (temporary_problem.empty() ? 0u : 1u)) code = ExitCode::plugin;

  nlohmann::json plugin_list = nlohmann::json::array(), search = nlohmann::json::array();
  for (const PluginState& plugin : plugins)
    plugin_list.push_back({{"kind", plugin.kind},
                           {"name", plugin.name},
                           {"version", plugin.version},
                           {"path", plugin.path},
                           {"loads", plugin.problem.empty()},
                           {"problem", plugin.problem}});
  for (const auto& folder : registry.search_path()) search.push_back(folder.string());
  const nlohmann::json document{{"version", tasks::version()},
                                {"sdk_tag", PYRA_ABI_TAG},
                                {"libtorch", tasks::libtorch_version()},
                                {"system", machine.system},
                                {"cpu", machine.cpu},
                                {"logical_cpus", machine.logical_cpus},
                                {"physical_cores", machine.physical_cores},
                                {"cpu_quota", machine.cpu_quota},
                                {"isa", machine.isa},
                                {"micro_kernel", machine.micro_kernel},
                                {"bf16", machine.bf16},
                                {"threads", machine.threads},
                                {"memory_bytes", machine.memory_bytes},
                                {"memory_available_bytes", machine.memory_available_bytes},
                                {"nvidia_driver", machine.nvidia_driver},
                                {"gpu", gpu},
                                {"temporary_folder", temporary},
                                {"plugin_search_path", search},
                                {"plugins", plugin_list},
                                {"problems", problems},
                                {"usable", problems.empty()}};
  session.print(document, [&](std::ostream& out) {
    out << "pyractl    " << tasks::version() << ", LibTorch " << tasks::libtorch_version() << "\n"
        << "plugins    built for " << PYRA_ABI_TAG << "\n"
        << "system     " << machine.system << "\n"
        << "processor  " << machine.cpu << ", " << machine.physical_cores << " cores, " << machine.logical_cpus
        << " logical";
    if (machine.cpu_quota > 0) out << ", limited to " << machine.cpu_quota << " by its control group";
    out << "\n"
        << "kernels    " << machine.micro_kernel << " (" << join(machine.isa) << "); bf16 "
        << (machine.bf16 ? "is the default type" : "has no fast kernel here, fp32 is the default type") << "\n"
        << "threads    " << machine.threads << "\n"
        << "memory     " << gibibytes(machine.memory_bytes) << ", " << gibibytes(machine.memory_available_bytes)
        << " available\n"
        << "gpu        " << gpu << "\n"
        << "temporary  " << temporary << (temporary_problem.empty() ? "" : " (not writable)") << "\n";
    for (const PluginState& plugin : plugins)
      out << "plugin     " << plugin.kind << " " << plugin.name << " " << plugin.version
          << (plugin.problem.empty() ? "  " + plugin.path : "  does not load") << "\n";
    if (plugins.empty()) {
      out << "plugin     none found in:\n";
      for (const auto& folder : registry.search_path()) out << "           " << folder.string() << "\n";
    }
    for (const std::string& problem : problems) out << "PROBLEM    " << problem << "\n";
    out << (problems.empty() ? "All is well.\n" : "");
  });
  return int(code);
}

}  // namespace

void add_doctor(CLI::App& root, Session& session) {
  CLI::App* command = add_command(root, session, "doctor", "Say what this machine and installation offer");
  command->footer(
      "\nExits with 0 when pyractl is usable, 4 when a plugin cannot load, 9 when the folder for temporary files "
      "($TMPDIR) cannot be "
      "written.");
  command->callback([&session] { session.action = [&session] { return run_doctor(session); }; });
}

}  // namespace pyra::cli
