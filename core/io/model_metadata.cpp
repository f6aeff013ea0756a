#include "io/model_metadata.h"

#include <charconv>
#include <cmath>

#include "base/error.h"
#include "io/json.h"
#include "io/json_fields.h"

namespace pyra::io {
namespace {

using nlohmann::json;

json numbers(const std::array<float, 3>& values) {
  return {shortest(values[0]), shortest(values[1]), shortest(values[2])};
}

json config_json(const nn::VitConfig& config) {
  return {{"arch", config.arch},
          {"image_size", config.image_size},
          {"patch_size", config.patch_size},
          {"embed_dim", config.embed_dim},
          {"depth", config.depth},
          {"num_heads", config.num_heads},
          {"mlp_dim", config.mlp_dim},
          {"num_classes", config.num_classes},
          {"pool", config.pool == nn::Pool::avg ? "avg" : "token"},
          {"distilled", config.distilled},
          {"registers", config.registers},
          {"no_embed_class", config.no_embed_class},
          {"layer_scale", config.layer_scale},
          {"norm_eps", config.norm_eps}};
}

json preprocess_json(const nn::Preprocess& preprocess) {
  return {{"size", preprocess.size},
          {"resize", preprocess.mode == nn::ResizeMode::crop ? "crop" : "squash"},
          {"shorter", preprocess.shorter},
          {"mean", numbers(preprocess.mean)},
          {"std", numbers(preprocess.std)}};
}

json merge_json(const MergeSpec& merge) {
  json parameters = json::object();
  for (const auto& [name, value] : merge.parameters) {
    std::visit([&, key = name](const auto& held) { parameters[key] = held; }, value);
  }
  const sdk::Schedule& schedule = merge.schedule;
  return {
      {"name", merge.name},
      {"schedule",
       {{"text", schedule.text}, {"remove", schedule.remove}, {"prune", schedule.prune}, {"merge", schedule.merge}}},
      {"parameters", parameters},
      {"proportional_attention", merge.proportional_attention}};
}

/// One of two words.
bool choose(const JsonFields& fields, const char* key, const char* no, const char* yes) {
  const std::string word = fields.string(key);
  if (word != no && word != yes)
    fields.refuse(key, cat("is '", printable(word), "', expected '", no, "' or '", yes, "'"));
  return word == yes;
}

/// registers, no_embed_class and layer_scale came later; files without them have none of it.
nn::VitConfig parse_config(const JsonFields& arch, const std::string& where) {
  nn::VitConfig config{.arch = arch.string("arch"),
                       .image_size = arch.integer("image_size"),
                       .patch_size = arch.integer("patch_size"),
                       .embed_dim = arch.integer("embed_dim"),
                       .depth = arch.integer("depth"),
                       .num_heads = arch.integer("num_heads"),
                       .mlp_dim = arch.integer("mlp_dim"),
                       .num_classes = arch.integer("num_classes"),
                       .pool = choose(arch, "pool", "token", "avg") ? nn::Pool::avg : nn::Pool::token,
                       .distilled = arch.boolean("distilled"),
                       .registers = arch.has("registers") ? arch.integer("registers") : 0,
                       .no_embed_class = arch.has("no_embed_class") && arch.boolean("no_embed_class"),
                       .layer_scale = arch.has("layer_scale") && arch.boolean("layer_scale"),
                       .norm_eps = arch.number("norm_eps")};
  nn::check_config(config, where + ": arch");
  return config;
}

std::array<float, 3> parse_channels(const JsonFields& fields, const char* key, bool positive) {
  const std::vector<double> values = fields.numbers(key);
  if (values.size() != 3) fields.refuse(key, cat("has ", values.size(), " numbers, expected 3"));
  std::array<float, 3> channels{};
  for (size_t i = 0; i < 3; ++i) {
    channels[i] = float(values[i]);
    if (!std::isfinite(channels[i]) || (positive && channels[i] <= 0)) {
      fields.refuse(key, cat("holds ", values[i], ", expected ", positive ? "more than 0" : "a finite number"));
    }
  }
  return channels;
}

nn::Preprocess parse_preprocess(const JsonFields& fields, const nn::VitConfig& config) {
  const nn::Preprocess preprocess{
      .size = fields.integer("size"),
      .mode = choose(fields, "resize", "squash", "crop") ? nn::ResizeMode::crop : nn::ResizeMode::squash,
      .shorter = fields.integer("shorter"),
      .mean = parse_channels(fields, "mean", false),
      .std = parse_channels(fields, "std", true)};
  if (preprocess.size != config.image_size) {
    fields.refuse("size", cat("is ", preprocess.size, ", expected arch.image_size, ", config.image_size));
  }
  if (preprocess.mode == nn::ResizeMode::crop &&
      (preprocess.shorter < preprocess.size || preprocess.shorter > 4 * nn::kMaxImageSize)) {
    fields.refuse("shorter",
                  cat("is ", preprocess.shorter, ", expected ", preprocess.size, " to ", 4 * nn::kMaxImageSize));
  }
  return preprocess;
}

std::vector<int64_t> parse_counts(const JsonFields& schedule, const char* key, const nn::VitConfig& config) {
  std::vector<int64_t> counts = schedule.integers(key);
  if (!counts.empty() && int64_t(counts.size()) != config.depth) {
    schedule.refuse(key, cat("has ", counts.size(), " entries, expected one for each of ", config.depth, " blocks"));
  }
  for (const int64_t count : counts) {
    if (count < 0 || count > config.tokens()) {
      schedule.refuse(key, cat("holds ", count, ", expected 0 to ", config.tokens(), ", the number of tokens"));
    }
  }
  return counts;
}

sdk::ParameterValue parse_parameter(const JsonFields& parameters, const std::string& name) {
  const json& value = parameters.value(name.c_str());
  if (value.is_boolean()) return value.get<bool>();
  if (value.is_number_integer()) return parameters.integer(name.c_str());
  if (value.is_number()) return value.get<double>();
  if (value.is_string()) return value.get<std::string>();
  return parameters.strings(name.c_str());
}

MergeSpec parse_merge(const JsonFields& fields, const nn::VitConfig& config) {
  MergeSpec merge;
  merge.name = fields.string("name");
  if (merge.name.empty() || merge.name.find('.') != std::string::npos) {
    fields.refuse("name", cat("is '", printable(merge.name), "', expected a merger's name"));
  }
  const JsonFields schedule = fields.object("schedule");
  merge.schedule = {.text = schedule.string("text"),
                    .remove = parse_counts(schedule, "remove", config),
                    .prune = parse_counts(schedule, "prune", config),
                    .merge = parse_counts(schedule, "merge", config)};
  const JsonFields parameters = fields.object("parameters");
  for (const auto& item : parameters.whole().items()) {
    merge.parameters.emplace(item.key(), parse_parameter(parameters, item.key()));
  }
  merge.proportional_attention = fields.boolean("proportional_attention");
  return merge;
}

}  // namespace

double shortest(float value) {
  char text[32];
  const auto end = std::to_chars(text, text + sizeof text, value).ptr;
  double result = value;
  std::from_chars(text, end, result);
  return result;
}

std::string model_metadata(const ModelFile& model) {
  json root{{"format", kModelFormat},
            {"arch", config_json(model.config)},
            {"preprocess", preprocess_json(model.preprocess)},
            {"class_names", model.class_names},
            {"provenance", model.provenance}};
  if (model.merge) root["merge"] = merge_json(*model.merge);
  return root.dump(-1, ' ', false, json::error_handler_t::replace);
}

ModelFile parse_model_metadata(std::string_view text, const std::string& where) {
  const json document = parse_json(text, where);
  const JsonFields root(document, where);
  if (const int64_t format = root.integer("format"); format != kModelFormat) {
    root.refuse("format", cat("is ", format, ", but this version reads format ", kModelFormat, "; update the program"));
  }
  ModelFile model;
  model.config = parse_config(root.object("arch"), where);
  model.preprocess = parse_preprocess(root.object("preprocess"), model.config);
  model.class_names = root.strings("class_names");
  if (!model.class_names.empty() && int64_t(model.class_names.size()) != model.config.num_classes) {
    root.refuse("class_names",
                cat("has ", model.class_names.size(), " names, expected arch.num_classes, ", model.config.num_classes));
  }
  if (root.has("merge")) model.merge = parse_merge(root.object("merge"), model.config);
  if (root.has("provenance")) {
    const JsonFields provenance = root.object("provenance");
    for (const auto& item : provenance.whole().items()) {
      model.provenance.emplace(item.key(), provenance.string(item.key().c_str()));
    }
  }
  return model;
}

}  // namespace pyra::io
