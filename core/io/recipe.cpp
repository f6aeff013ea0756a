#include "io/recipe.h"

#include <cctype>
#include <limits>

#include "base/error.h"
#include "base/toml.h"
#include "io/atomic_file.h"
#include "io/toml_value.h"
#include "nn/config.h"

namespace pyra::io {
bool is_utf8(const std::string& text) {
  try {
    return toml::parse("# " + text).empty();
  } catch (const toml::parse_error&) {
    return false;
  }
}

namespace {

constexpr size_t kMaxRecipeBytes = 1 << 20;
constexpr int64_t kMax = std::numeric_limits<int64_t>::max();
constexpr int64_t kMaxEpochs = 1'000'000, kMaxBatch = 65536;
constexpr size_t kMaxRates = 16;

using Setter = std::function<void(Recipe&, const TomlValue&)>;
using Keys = std::map<std::string, Setter, std::less<>>;

double not_negative(const TomlValue& value) {
  return value.number([](double x) { return x >= 0; }, "0 or more");
}

std::vector<double> channels(const TomlValue& value, bool positive) {
  std::vector<double> list =
      value.numbers([=](double x) { return !positive || x > 0; }, positive ? "more than 0" : "finite");
  if (list.size() != 3) value.refuse(cat("has ", list.size(), " numbers, expected 3: red, green, blue"));
  return list;
}

/// One rate, or several of which the best is taken.
std::vector<double> rates(const TomlValue& value) {
  const auto positive = [](double x) { return x > 0; };
  if (!value.node().is_array()) return {value.number(positive, "more than 0")};
  std::vector<double> list = value.numbers(positive, "more than 0");
  if (list.empty() || list.size() > kMaxRates)
    value.refuse(cat("has ", list.size(), " rates, expected 1 to ", kMaxRates));
  return list;
}

/// "high", 13 and [16, 8, 4] are all ways to write a schedule.
std::string schedule_text(const TomlValue& value) {
  if (value.node().is_integer()) return std::to_string(value.integer(0, kMax));
  const toml::array* list = value.node().as_array();
  if (!list) return value.string();
  std::vector<int64_t> counts;
  for (const toml::node& item : *list) {
    if (!item.is_integer()) value.refuse(cat("holds ", toml_type(item), ", expected integers"));
    counts.push_back(item.as_integer()->get());
  }
  return join(counts, ",");
}

const Keys& recipe_keys() {
  static const Keys keys{
      {"model", [](Recipe& r, const TomlValue& v) { r.model = v.string(); }},
      {"data", [](Recipe& r, const TomlValue& v) { r.data = v.string(); }},
      {"out", [](Recipe& r, const TomlValue& v) { r.out = v.string(); }},
      {"seed", [](Recipe& r, const TomlValue& v) { r.seed = v.integer(0, kMax); }},
      {"protocol",
       [](Recipe& r, const TomlValue& v) {
         r.protocol = v.choice({"vtab", "paper"});
       }},
      {"dtype",
       [](Recipe& r, const TomlValue& v) {
         r.dtype = v.choice({"auto", "fp32", "tf32", "bf16"});
       }},
      {"new_head", [](Recipe& r, const TomlValue& v) { r.new_head = v.boolean(); }},
      {"deterministic", [](Recipe& r, const TomlValue& v) { r.deterministic = v.boolean(); }},
      {"train.epochs", [](Recipe& r, const TomlValue& v) { r.train.epochs = v.integer(1, kMaxEpochs); }},
      {"train.max_seconds", [](Recipe& r, const TomlValue& v) { r.train.max_seconds = not_negative(v); }},
      {"train.batch", [](Recipe& r, const TomlValue& v) { r.train.batch = v.integer(1, kMaxBatch); }},
      {"train.lr", [](Recipe& r, const TomlValue& v) { r.train.lr = rates(v); }},
      {"train.merge_lr", [](Recipe& r, const TomlValue& v) { r.train.merge_lr = not_negative(v); }},
      {"train.min_lr", [](Recipe& r, const TomlValue& v) { r.train.min_lr = not_negative(v); }},
      {"train.warmup_lr", [](Recipe& r, const TomlValue& v) { r.train.warmup_lr = not_negative(v); }},
      {"train.warmup_epochs", [](Recipe& r, const TomlValue& v) { r.train.warmup_epochs = v.integer(0, kMaxEpochs); }},
      {"train.weight_decay", [](Recipe& r, const TomlValue& v) { r.train.weight_decay = not_negative(v); }},
      {"train.drop_path",
       [](Recipe& r, const TomlValue& v) {
         r.train.drop_path = v.number([](double x) { return x >= 0 && x < 1; }, "0 or more and less than 1");
       }},
      {"train.hflip", [](Recipe& r, const TomlValue& v) { r.train.hflip = v.boolean(); }},
      {"train.random_resized_crop", [](Recipe& r, const TomlValue& v) { r.train.random_resized_crop = v.boolean(); }},
      {"train.checkpoint_every", [](Recipe& r, const TomlValue& v) { r.train.checkpoint_every = v.integer(0, kMax); }},
      {"train.eval_every", [](Recipe& r, const TomlValue& v) { r.train.eval_every = v.integer(0, kMaxEpochs); }},
      {"train.teacher", [](Recipe& r, const TomlValue& v) { r.train.teacher = v.string(); }},
      {"train.teacher_weight",
       [](Recipe& r, const TomlValue& v) {
         r.train.teacher_weight = v.number([](double x) { return x > 0 && x <= 1; }, "more than 0 and at most 1");
       }},
      {"train.teacher_temperature",
       [](Recipe& r, const TomlValue& v) {
         r.train.teacher_temperature =
             v.number([](double x) { return x > 0 && x <= 1000; }, "more than 0, at most 1000");
       }},
      {"peft.name", [](Recipe& r, const TomlValue& v) { r.peft.name = v.string(); }},
      {"merge.name", [](Recipe& r, const TomlValue& v) { r.merge.name = v.string(); }},
      {"merge.schedule", [](Recipe& r, const TomlValue& v) { r.schedule = schedule_text(v); }},
      {"merge.proportional_attention", [](Recipe& r, const TomlValue& v) { r.proportional_attention = v.boolean(); }},
      {"preprocess.size", [](Recipe& r, const TomlValue& v) { r.image_size = v.integer(1, nn::kMaxImageSize); }},
      {"preprocess.resize",
       [](Recipe& r, const TomlValue& v) {
         r.resize = v.choice({"squash", "crop"});
       }},
      {"preprocess.mean", [](Recipe& r, const TomlValue& v) { r.mean = channels(v, false); }},
      {"preprocess.std", [](Recipe& r, const TomlValue& v) { r.std = channels(v, true); }},
  };
  return keys;
}

const std::vector<std::string>& sections() {
  static const std::vector<std::string> names{"train", "peft", "merge", "preprocess"};
  return names;
}

bool is_section(std::string_view name) {
  return std::find(sections().begin(), sections().end(), name) != sections().end();
}

/// The keys of a section ("" for the top, with the sections' names), without its name.
std::vector<std::string> keys_of(const std::string& section) {
  std::vector<std::string> names;
  const std::string prefix = section.empty() ? "" : section + ".";
  for (const auto& [key, setter] : recipe_keys()) {
    if (key.starts_with(prefix) && key.find('.', prefix.size()) == key.npos) names.push_back(key.substr(prefix.size()));
  }
  if (section.empty()) names.insert(names.end(), sections().begin(), sections().end());
  return names;
}

[[noreturn]] void fail_key(const std::string& where, const std::string& section, const std::string& name) {
  const std::vector<std::string> known = keys_of(section);
  const std::string hint = did_you_mean(name, known);
  fail(ExitCode::usage, where, ": ", section.empty() ? "" : section + ".", printable(name), " is not a key",
       hint.empty() ? cat("; there are: ", join(known)) : hint);
}

PluginChoice* plugin_of(Recipe& recipe, std::string_view section) {
  return section == "peft" ? &recipe.peft : section == "merge" ? &recipe.merge : nullptr;
}

void set_value(Recipe& recipe, const std::string& section, const std::string& name, const TomlValue& value) {
  if (const auto setter = recipe_keys().find(value.key()); setter != recipe_keys().end()) {
    setter->second(recipe, value);
    return;
  }
  // What a plugin calls its parameters is known only when it is loaded.
  PluginChoice* plugin = plugin_of(recipe, section);
  if (!plugin || !sdk::is_parameter_name(name)) fail_key(value.where(), section, name);
  plugin->parameters.insert_or_assign(name, value.parameter());
}

void read_section(Recipe& recipe, const std::string& section, const toml::node& node, const std::string& file) {
  const auto where = [&](uint32_t line) { return cat("recipe ", file, ":", line); };
  const std::string start = where(node.source().begin.line);
  const toml::table* table = node.as_table();
  if (!table)
    fail(ExitCode::usage, start, ": ", section, " is ", toml_type(node), ", expected a table: [", section, "]");
  if (PluginChoice* plugin = plugin_of(recipe, section)) plugin->where = cat(start, ": [", section, "]");
  for (const auto& [key, value] : *table) {
    const std::string name(key.str());
    set_value(recipe, section, name, {value, where(key.source().begin.line), section + "." + name});
  }
}

void read_file_into(Recipe& recipe, const std::filesystem::path& path) {
  const std::string file = path.string();
  std::string text;
  try {
    text = read_file(path, kMaxRecipeBytes);
  } catch (const Error& error) {
    fail(ExitCode::usage, "recipe ", error.what());
  }
  const toml::table root = parse_toml(text, "recipe " + file);
  for (const auto& [key, value] : root) {
    const std::string name(key.str());
    const std::string where = cat("recipe ", file, ":", key.source().begin.line);
    if (is_section(name)) {
      read_section(recipe, name, value, file);
    } else {
      set_value(recipe, "", name, {value, where, name});
    }
  }
}

/// One --set, taken apart: key = section.name (or name), and the value as TOML.
struct Override {
  std::string where, section, name, typed;
  toml::table table;  ///< holds the value under "value"
  [[nodiscard]] std::string key() const { return section.empty() ? name : section + "." + name; }
};

toml::table override_value(const std::string& typed, const std::string& where) {
  try {
    toml::table table = parse_toml("value = " + typed, where);
    if (table.size() == 1) return table;
  } catch (const Error&) {
    // Not TOML: a bare word, unless it set out to be something else.
    if (!typed.empty() && std::string_view("\"'[{").find(typed.front()) != std::string_view::npos) {
      fail(ExitCode::usage, where, ": the value is not valid TOML: ", printable(typed));
    }
  }
  if (typed.find_first_of("\n\r") != typed.npos || !is_utf8(typed)) {
    fail(ExitCode::usage, where, ": the value must be one line of valid UTF-8");
  }
  return toml::table{{"value", typed}};
}

Override parse_override(const std::string& text) {
  Override result;
  result.where = "--set " + printable(text);
  const size_t equals = text.find('=');
  if (equals == text.npos) fail(ExitCode::usage, result.where, ": expected key=value, as train.batch=64");
  const auto trimmed = [](std::string_view piece) {
    const size_t first = piece.find_first_not_of(" \t");
    return first == piece.npos ? std::string{}
                               : std::string(piece.substr(first, piece.find_last_not_of(" \t") - first + 1));
  };
  const std::string key = trimmed(text.substr(0, equals));
  result.typed = trimmed(text.substr(equals + 1));
  const size_t dot = key.find('.');
  result.section = dot == key.npos ? "" : key.substr(0, dot);
  result.name = dot == key.npos ? key : key.substr(dot + 1);
  if (!sdk::is_parameter_name(result.name) || (dot != key.npos && !is_section(result.section))) {
    if (dot == key.npos || !sdk::is_parameter_name(result.section) || !sdk::is_parameter_name(result.name)) {
      fail(ExitCode::usage, result.where, ": '", printable(key),
           "' is no key, expected a word or two joined by a dot, as train.batch");
    }
    fail_key(result.where, "", result.section);
  }
  if (result.section.empty() && is_section(result.name)) {
    fail(ExitCode::usage, result.where, ": ", result.name, " is a table; set one of its keys, as ", result.name, ".",
         keys_of(result.name).front(), "=…");
  }
  result.table = override_value(result.typed, result.where);
  return result;
}

void apply(Recipe& recipe, const Override& change) {
  if (PluginChoice* plugin = plugin_of(recipe, change.section)) {
    const std::string before = plugin->name;
    set_value(recipe, change.section, change.name,
              {*change.table.get("value"), change.where, change.key(), &change.typed});
    if (change.name == "name" && plugin->name != before) plugin->parameters.clear();
    // The message about a parameter cannot tell which of them it was, so it names all.
    plugin->where += (plugin->where.empty() ? "" : ", ") + change.where;
    return;
  }
  set_value(recipe, change.section, change.name,
            {*change.table.get("value"), change.where, change.key(), &change.typed});
}

}  // namespace

Recipe read_recipe(const std::filesystem::path& file, const std::vector<std::string>& overrides) {
  Recipe recipe;
  recipe.file = file;
  if (!file.empty()) read_file_into(recipe, file);
  std::vector<Override> changes;
  changes.reserve(overrides.size());
  for (const std::string& text : overrides) changes.push_back(parse_override(text));
  // Another plugin takes the file's parameters with it, but not those that --set gives, before or after.
  for (const bool names : {true, false}) {
    for (const Override& change : changes) {
      if ((change.name == "name") == names) apply(recipe, change);
    }
  }
  return recipe;
}

}  // namespace pyra::io
