#include "tasks/run_folder.h"

#include "base/error.h"
#include "io/atomic_file.h"
#include "io/json.h"
#include "io/peft_config.h"
#include "io/safetensors.h"

namespace pyra::tasks {
namespace fs = std::filesystem;
namespace {

using io::kPeftPrefix;
constexpr const char* kEntry = "pyra";

fs::path adapter_file(const RunFolder& run) {
  return run.adapter() / io::kPeftWeights;
}

/// The tensors of adapter_model.safetensors, by the names they have there; they share the model's storage.
sdk::TensorMap adapter_tensors(const Model& model) {
  sdk::TensorMap tensors;
  const nn::PeftSetup* peft = model.vit->peft();
  for (const auto& [name, tensor] : model.vit->weights()) {
    const bool trained = tensor_group(name) == "head" || (peft && peft->method->trains(name));
    if (trained) tensors.emplace(kPeftPrefix + name, tensor.detach());
  }
  if (peft) {
    for (const auto& [name, tensor] : peft->learned) tensors.emplace(kPeftPrefix + name, tensor.detach());
  }
  return tensors;
}

sdk::TensorMap merge_tensors(const Model& model) {
  sdk::TensorMap tensors;
  if (const nn::MergeSetup* merge = model.vit->merge()) {
    for (const auto& [name, tensor] : merge->learned) tensors.emplace(name, tensor.detach());
  }
  return tensors;
}

std::string config_json(const Model& model, const io::Recipe& recipe) {
  std::string type = recipe.peft.name;
  for (char& c : type) c = c >= 'a' && c <= 'z' ? char(c - 'a' + 'A') : c;
  nlohmann::json modules = {"head"};
  if (model.file.config.distilled) modules.push_back("head_dist");
  nlohmann::json config{{"peft_type", type},
                        {"task_type", nullptr},
                        {"base_model_name_or_path", recipe.model.string()},
                        {"inference_mode", true},
                        {"modules_to_save", modules}};
  if (const nn::PeftSetup* peft = model.vit->peft()) {
    const std::string where = cat("peft '", peft->name, "': adapter_config");
    try {
      config.update(io::parse_json(peft->method->adapter_config(model.file.config.shape()), where));
    } catch (const nlohmann::json::exception& error) {
      fail(ExitCode::plugin, where, ": ", io::json_reason(error));
    }
  }
  return config.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

/// Every tensor of `target` from the file, all checked before the first is copied.
void load_tensors(const fs::path& path, const sdk::TensorMap& target) {
  const io::SafetensorsFile file(path);
  for (const auto& [name, entry] : file.entries()) {
    if (!target.contains(name)) fail(ExitCode::input, path.string(), ": tensor '", name, "' is none of this model's");
  }
  std::vector<at::Tensor> loaded;
  for (const auto& [name, tensor] : target) {
    const at::Tensor value = file.tensor(name);
    if (value.sizes() != tensor.sizes() || !value.is_floating_point()) {
      fail(ExitCode::input, path.string(), ": tensor '", name, "' is ", value.scalar_type(), " ", value.sizes(),
           ", expected fp32 ", tensor.sizes());
    }
    if (!value.isfinite().all().item<bool>()) {
      fail(ExitCode::input, path.string(), ": tensor '", name, "' holds values that are not finite");
    }
    loaded.push_back(value);
  }
  auto value = loaded.begin();
  for (const auto& [name, tensor] : target) at::Tensor(tensor).copy_(*value++);
}

}  // namespace

void write_adapter(const RunFolder& run, const Model& model, const io::Recipe& recipe, const AdapterInfo& info) {
  std::error_code error;
  fs::create_directories(run.adapter(), error);
  if (error) fail(ExitCode::output, run.adapter().string(), ": cannot be created: ", error.message());
  io::write_file(run.adapter() / io::kPeftConfig, config_json(model, recipe));
  io::write_safetensors(adapter_file(run), adapter_tensors(model), adapter_metadata(info));
  if (const sdk::TensorMap tensors = merge_tensors(model); !tensors.empty()) {
    io::write_safetensors(run.merge_tensors(), tensors, {{"merge", model.vit->merge()->name}});
  }
}

std::vector<fs::path> RunFolder::contents() const {
  return {recipe(), metrics(), report(), checkpoint(), adapter(), path / io::kPeftWeights, path / io::kPeftConfig};
}

io::Metadata adapter_metadata(const AdapterInfo& info) {
  const nlohmann::json about{{"classes", info.classes.names}, {"base", info.base_fingerprint}};
  return {{kEntry, about.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace)}};
}

std::optional<AdapterInfo> parse_adapter_info(const io::Metadata& metadata, const std::string& file) {
  const auto entry = metadata.find(kEntry);
  if (entry == metadata.end()) return std::nullopt;
  const std::string where = cat(file, ": metadata '", kEntry, "'");
  const nlohmann::json about = io::parse_json(entry->second, where);
  try {
    AdapterInfo info;  // member by member: GCC 12 frees them twice when an initialiser throws
    about.at("classes").get_to(info.classes.names);
    about.at("base").get_to(info.base_fingerprint);
    return info;
  } catch (const nlohmann::json::exception& error) {
    fail(ExitCode::input, where, ": ", io::json_reason(error));
  }
}

AdapterInfo read_adapter_info(const RunFolder& run) {
  const fs::path path = adapter_file(run);
  std::error_code error;
  if (!fs::exists(path, error)) {
    fail(ExitCode::input, run.path.string(), ": holds no adapter (", path.string(),
         " is missing): expected a run folder that `pyractl finetune` has finished");
  }
  if (auto info = parse_adapter_info(io::SafetensorsFile(path).metadata(), path.string())) return *std::move(info);
  fail(ExitCode::input, path.string(), ": metadata '", kEntry, "' is missing: it was not written by pyractl");
}

void load_adapter(const RunFolder& run, Model& model, const AdapterInfo& info) {
  if (const std::string base = base_fingerprint(model); base != info.base_fingerprint) {
    fail(ExitCode::input, run.path.string(), ": was trained on another base model (fingerprint ", info.base_fingerprint,
         ") than the one its run.toml names now (", base, "): restore that file");
  }
  const sdk::TensorMap merge = merge_tensors(model);
  load_tensors(adapter_file(run), adapter_tensors(model));
  if (!merge.empty()) load_tensors(run.merge_tensors(), merge);
  model.vit->weights_changed();
  model.vit->eval_mode();
}

std::string base_fingerprint(const Model& model) {
  sdk::TensorMap base;
  for (const auto& [name, tensor] : model.vit->weights()) {
    if (tensor_group(name) != "head") base.emplace(name, tensor);
  }
  return fingerprint(base);
}

}  // namespace pyra::tasks
