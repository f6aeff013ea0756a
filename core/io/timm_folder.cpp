#include "io/timm_folder.h"

#include "base/error.h"
#include "io/hf_model.h"
#include "io/json.h"
#include "io/json_fields.h"
#include "io/named_tensors.h"

namespace pyra::io {
namespace fs = std::filesystem;
namespace {

/// The entries that a timm file may carry in its own metadata (timm_model.h).
Metadata metadata_of(const JsonFields& config) {
  Metadata metadata{{"architecture", config.string("architecture")}};
  // Folders of 2022 and before have all keys side by side.
  const JsonFields trained = config.has("pretrained_cfg") ? config.object("pretrained_cfg") : config;
  for (const char* key : {"mean", "std"})
    if (trained.has(key)) metadata[key] = nlohmann::json(trained.numbers(key)).dump();
  if (config.has("model_args") && config.object("model_args").has("num_heads"))
    metadata["num_heads"] = std::to_string(config.object("model_args").integer("num_heads"));
  if (config.has("label_names")) metadata["class_names"] = nlohmann::json(config.strings("label_names")).dump();
  return metadata;
}

[[noreturn]] void fail_without_weights(const fs::path& folder) {
  std::error_code error;
  const fs::path pickled = folder / "pytorch_model.bin";
  fail(ExitCode::input, folder.string(), ": has timm's config.json and no ", kHfWeights,
       fs::exists(pickled, error) ? cat("; `pyractl convert ", pickled.string(),
                                        " --out MODEL.safetensors` makes one of ", pickled.filename().string())
                                  : "");
}

}  // namespace

bool is_timm_folder(const fs::path& folder) {
  if (!is_hf_folder(folder)) return false;
  const nlohmann::json config = read_json(folder / "config.json", kMaxHubJson);
  return config.is_object() && config.contains("architecture");
}

ModelFile read_timm_folder(const fs::path& folder, const ReadModelOptions& options) {
  const std::string where = (folder / "config.json").string();
  const nlohmann::json document = read_json(where, kMaxHubJson);
  const Metadata said = metadata_of(JsonFields(document, where));
  std::error_code error;
  if (!fs::exists(folder / kHfWeights, error)) fail_without_weights(folder);
  const SafetensorsFile file(folder / kHfWeights);
  NamedTensors named = named_tensors(file);
  for (const auto& [key, value] : said) named.metadata[key] = value;
  return timm_model(named, options);
}

}  // namespace pyra::io
