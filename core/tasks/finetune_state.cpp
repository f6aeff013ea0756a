#include "tasks/finetune_state.h"

#include <toml++/toml.h>

#include <set>

#include "base/error.h"
#include "io/json.h"

namespace pyra::tasks {
namespace {

void flatten(const toml::table& table, const std::string& prefix, std::map<std::string, std::string>& out) {
  for (const auto& [key, node] : table) {
    const std::string name = prefix.empty() ? std::string(key.str()) : cat(prefix, ".", key.str());
    if (const toml::table* inner = node.as_table()) {
      flatten(*inner, name, out);
      continue;
    }
    std::ostringstream value;
    node.visit([&](const auto& leaf) { value << leaf; });
    out[name] = value.str();
  }
}

/// Keys that may differ: where things lie, and how often a run is saved.
bool is_free(const std::string& key) {
  static const std::set<std::string> free{"model", "data", "out", "train.checkpoint_every", "train.teacher"};
  return free.contains(key);
}

std::string value_or_unset(const std::map<std::string, std::string>& values, const std::string& key) {
  const auto found = values.find(key);
  return found == values.end() ? "not set" : found->second;
}

void check_same_recipe(const std::string& saved, const std::string& mine, const std::string& where) {
  const auto before = flatten_toml(saved), now = flatten_toml(mine);
  std::set<std::string> keys;
  for (const auto& [key, value] : before) keys.insert(key);
  for (const auto& [key, value] : now) keys.insert(key);
  for (const std::string& key : keys) {
    const std::string was = value_or_unset(before, key), is = value_or_unset(now, key);
    if (was == is || is_free(key)) continue;
    fail(ExitCode::usage, where, ": cannot go on with another recipe: ", key, " was ", was, ", now it is ", is,
         "; give it back its value, or start a new run in another --out");
  }
}

nlohmann::json to_node(const Evaluation& e) {
  return {{"accuracy", e.accuracy}, {"correct", e.correct}, {"images", e.images},
          {"epoch", e.epoch},       {"step", e.step},       {"images_per_second", e.images_per_second}};
}

Evaluation to_evaluation(const nlohmann::json& node) {
  return {.accuracy = node.at("accuracy").get<double>(),
          .correct = node.at("correct").get<int64_t>(),
          .images = node.at("images").get<int64_t>(),
          .epoch = node.at("epoch").get<int64_t>(),
          .step = node.at("step").get<int64_t>(),
          .images_per_second = node.at("images_per_second").get<double>()};
}

}  // namespace

std::map<std::string, std::string> flatten_toml(const std::string& text) {
  std::map<std::string, std::string> values;
  flatten(toml::parse(text), "", values);
  return values;
}

std::string to_json(const FinetuneState& state) {
  nlohmann::json choices = nlohmann::json::array();
  for (const Choice& choice : state.choices) choices.push_back({{"lr", choice.lr}, {"accuracy", choice.accuracy}});
  return nlohmann::json{{"recipe", state.identity.recipe},
                        {"model", state.identity.model},
                        {"data", state.identity.data},
                        {"plugins", state.identity.plugins},
                        {"threads", state.identity.threads},
                        {"device", state.identity.device},
                        {"training", state.training},
                        {"choices", choices},
                        {"best", state.best ? to_node(*state.best) : nlohmann::json(nullptr)},
                        {"evaluated_step", state.evaluated_step},
                        {"metrics_bytes", state.metrics_bytes}}
      .dump();
}

FinetuneState parse_state(const std::string& json, const std::string& where) {
  const nlohmann::json root = io::parse_json(json, where);
  FinetuneState state;
  try {
    state.identity = {.recipe = root.at("recipe").get<std::string>(),
                      .model = root.at("model").get<std::string>(),
                      .data = root.at("data").get<std::string>(),
                      .plugins = root.at("plugins").get<std::map<std::string, std::string>>(),
                      .threads = root.at("threads").get<int>(),
                      .device = root.value("device", "cpu")};
    state.training = root.at("training").get<int64_t>();
    for (const auto& node : root.at("choices")) {
      state.choices.push_back({.lr = node.at("lr").get<double>(), .accuracy = node.at("accuracy").get<double>()});
    }
    if (!root.at("best").is_null()) state.best = to_evaluation(root.at("best"));
    state.evaluated_step = root.at("evaluated_step").get<int64_t>();
    state.metrics_bytes = root.at("metrics_bytes").get<int64_t>();
  } catch (const nlohmann::json::exception& error) {
    fail(ExitCode::input, where, ": ", io::json_reason(error));
  }
  if (state.training < 0 || state.metrics_bytes < 0) fail(ExitCode::input, where, ": holds a negative count");
  return state;
}

void check_same_run(const RunIdentity& saved, const RunIdentity& mine, const std::string& where, Progress& progress) {
  check_same_recipe(saved.recipe, mine.recipe, where);
  if (saved.model != mine.model) {
    fail(ExitCode::usage, where, ": cannot go on with another base model (fingerprint was ", saved.model,
         ", now it is ", mine.model, ")");
  }
  if (saved.data != mine.data) {
    fail(ExitCode::usage, where, ": cannot go on with other training images or labels (fingerprint was ", saved.data,
         ", now it is ", mine.data, ")");
  }
  for (const auto& [name, version] : saved.plugins) {
    const std::string now = value_or_unset(mine.plugins, name);
    if (now != version) {
      fail(ExitCode::usage, where, ": cannot go on with another version of plugin '", name, "': was ", version,
           ", now it is ", now);
    }
  }
  if (saved.device != mine.device)
    progress.note(cat("the run began on ", saved.device, " and goes on on ", mine.device, ": last bits may differ"));
  if (mine.device == "cpu" && saved.threads != mine.threads) {
    progress.note(cat("the run began with ", saved.threads, " threads and goes on with ", mine.threads,
                      ": its last bits may differ from those of an unbroken run"));
  }
}

}  // namespace pyra::tasks
