// A merge plugin with as many bad manners as it has names: libpyra_merge_<manner>.so.
#include <dlfcn.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "base/error.h"
#include "sdk/plugin.h"

namespace {

using namespace pyra::sdk;

/// The manner: what this file was copied to.
std::string manner() {
  Dl_info info{};
  dladdr(reinterpret_cast<void*>(&manner), &info);
  const std::string path = info.dli_fname;
  const std::string file = path.substr(path.rfind('/') + 1);
  const size_t kind_end = file.find('_', file.find('_') + 1);
  return file.substr(kind_end + 1, file.size() - kind_end - 1 - std::string(".so").size());
}

class Idle final : public TokenMerger {
 public:
  static std::vector<Parameter> parameters() {
    if (manner() == "wrong_tag") std::abort();  // must never run
    if (manner() == "throws_in_parameters") throw std::runtime_error("no list today");
    const Parameter strength{.name = "strength", .default_value = 1.0, .help = "", .minimum = 0.0};
    if (manner() == "asks_twice") return {strength, strength};
    return {strength};
  }

  explicit Idle(const Parameters& parameters) {
    if (manner() == "wrong_tag") std::abort();  // must never run
    if (manner() == "throws") throw std::runtime_error("my tables are gone");
    if (manner() == "throws_int") throw 7;
    if (manner() == "throws_error") pyra::fail(pyra::ExitCode::input, "tables.bin is missing");
    if (manner() == "refuses") pyra::fail(pyra::ExitCode::usage, "strength ", parameters.number("strength"), " is odd");
  }

  [[nodiscard]] Needs needs() const override {
    if (manner() == "needs_int") throw 7;
    return {};
  }
  [[nodiscard]] Schedule resolve(const Schedule& schedule, const ModelShape& shape) const override {
    if (manner() == "resolve_throws") throw std::out_of_range("no block 13");
    if (manner() == "resolve_refuses") pyra::fail(pyra::ExitCode::usage, "'high' is too much");
    Schedule resolved = TokenMerger::resolve(schedule, shape);
    if (manner() == "resolve_halves") resolved.remove[0] = (resolved.remove[0] + 1) / 2;
    return resolved;
  }
  [[nodiscard]] bool acts(int64_t tokens_in, int64_t tokens_out) const override {
    return manner() != "never_acts" && TokenMerger::acts(tokens_in, tokens_out);
  }
  [[nodiscard]] std::vector<TensorDecl> declare(const ModelShape&, const Schedule&) const override {
    if (manner() == "declares_twice") return {{.name = "scale", .shape = {1}}, {.name = "scale", .shape = {1}}};
    if (manner() == "declares_much") return {{.name = "scale", .shape = {int64_t{1} << 40, int64_t{1} << 40}}};
    return {};
  }

  [[nodiscard]] MergePlan plan(const MergeInputs& in, const Schedule&) const override {
    if (manner() == "plan_says_ok") pyra::fail(pyra::ExitCode::ok, "all fine");
    throw std::runtime_error("no plan for block " + std::to_string(in.block));
  }
};

TokenMerger* create(const Parameters& parameters) {
  return manner() == "creates_nothing" ? nullptr : new Idle(parameters);
}

}  // namespace

extern "C" PYRA_EXPORT const PyraPlugin* pyra_plugin_entry() {
  static const std::string name = manner();
  static PyraPlugin plugin{PYRA_ABI_TAG,    "merge",           name.c_str(), "0.1",
                           "behaves badly", &Idle::parameters, &create,      nullptr};
  if (name == "wrong_tag") plugin.abi_tag = "pyra-sdk 0 libtorch 1.13.0";
  if (name == "wrong_name") plugin.name = "another";
  if (name == "wrong_kind") plugin.kind = "peft";
  if (name == "no_tag") plugin.abi_tag = nullptr;
  if (name == "no_factory") plugin.create_merger = nullptr;
  if (name == "throws_in_entry") throw std::logic_error("not even that");
  return name == "returns_nothing" ? nullptr : &plugin;
}
