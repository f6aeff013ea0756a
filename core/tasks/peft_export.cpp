// A run's LoRA as a folder that peft loads onto a model of timm or transformers.
#include <algorithm>
#include <array>
#include <set>

#include "base/error.h"
#include "io/atomic_file.h"
#include "io/json.h"
#include "io/peft_config.h"
#include "io/safetensors.h"
#include "nn/vit_parts.h"
#include "tasks/peft_adapter.h"

namespace pyra::tasks {
namespace fs = std::filesystem;
namespace {

/// A layer's term and the modules that it becomes.
struct Site {
  std::vector<std::string> modules;
  sdk::LowRank term;
};

std::vector<std::string> modules_of(const std::string& layer, const PeftTarget& target, bool distilled) {
  const std::string end = ".weight";
  std::vector<std::string> names = io::peft_names(layer + end, target.naming, distilled);
  for (std::string& name : names) name.resize(name.size() - end.size());
  return names;
}

std::vector<Site> sites_of(const Model& model, const PeftTarget& target) {
  const nn::PeftSetup& peft = *model.vit->peft();
  std::vector<Site> sites;
  for (const sdk::LinearSite& site : nn::linear_sites(model.file.config))
    if (auto term = peft.method->low_rank(site, peft.learned))
      sites.push_back({modules_of(site.name(), target, model.file.config.distilled), *term});
  return sites;
}

/// Which of q, k and v were targets: B's rows of the others are zero in every block. All, when none has learned a
/// thing.
std::array<bool, 3> targeted_parts(const std::vector<Site>& sites) {
  std::array<bool, 3> targeted{};
  for (const Site& site : sites) {
    if (site.modules.size() != targeted.size()) continue;
    const std::vector<at::Tensor> rows = site.term.b.chunk(int64_t(targeted.size()));
    for (size_t i = 0; i < rows.size(); ++i) targeted[i] = targeted[i] || rows[i].count_nonzero().item<int64_t>() > 0;
  }
  if (std::ranges::find(targeted, true) == targeted.end()) targeted.fill(true);
  return targeted;
}

/// The end of a module's path that has `parts` parts; 0: all of it.
std::string tail(const std::string& module, size_t parts) {
  size_t at = module.size();
  for (size_t i = 0; i < parts && at != std::string::npos; ++i) at = at == 0 ? at : module.rfind('.', at - 1);
  return parts == 0 || at == std::string::npos ? module : module.substr(at + 1);
}

/// The shortest names that say which modules have a term and name no other: "q_proj", or "attn.proj" because the patch
/// embedding ends in "proj" too, or whole paths.
std::set<std::string> target_names(const std::set<std::string>& targeted, const std::vector<std::string>& all) {
  for (const size_t parts : {1, 2}) {
    io::PeftModules names;
    for (const std::string& module : targeted) names.names.push_back(tail(module, parts));
    const bool exact = std::ranges::all_of(
        all, [&](const std::string& module) { return names.match(module) == targeted.contains(module); });
    if (exact) return {names.names.begin(), names.names.end()};
  }
  return targeted;
}

/// Every layer that an entry of target_modules might hit, by its path in the adapter's model.
std::vector<std::string> all_modules(const Model& model, const PeftTarget& target) {
  std::vector<std::string> modules;
  for (const nn::TensorShape& tensor : nn::tensor_shapes(model.file.config)) {
    if (tensor.shape.size() < 2 || !tensor.name.ends_with(".weight")) continue;
    const std::string layer = tensor.name.substr(0, tensor.name.rfind('.'));
    for (std::string& name : modules_of(layer, target, model.file.config.distilled)) modules.push_back(std::move(name));
  }
  return modules;
}

std::string config_text(const Model& model, const PeftTarget& target, const std::set<std::string>& modules,
                        const std::set<std::string>& saved) {
  nlohmann::json config = io::parse_json(model.vit->peft()->method->adapter_config(model.file.config.shape()),
                                         cat("peft '", model.vit->peft()->name, "': adapter_config"));
  config["peft_type"] = "LORA";
  config["task_type"] = nullptr;
  config["base_model_name_or_path"] = target.base.string();
  config["inference_mode"] = true;
  config["target_modules"] = target_names(modules, all_modules(model, target));
  config["modules_to_save"] = saved;
  return config.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

/// peft would put the term in front of LayerScale, which is folded into the layer that ours was trained beside.
void refuse_scaled_sites(const Model& model) {
  const nn::PeftSetup& peft = *model.vit->peft();
  for (const sdk::LinearSite& site : nn::linear_sites(model.file.config)) {
    const bool scaled = site.kind == sdk::LinearKind::proj || site.kind == sdk::LinearKind::fc2;
    if (model.file.config.layer_scale && scaled && peft.method->low_rank(site, peft.learned))
      fail(ExitCode::usage, "the LoRA of ", site.name(), " was trained beside a layer with LayerScale folded into it, ",
           "which peft keeps apart; --format pyra or timm writes the merged model");
  }
}

}  // namespace

void write_peft_adapter(const fs::path& folder, const Model& model, const PeftTarget& target, const AdapterInfo& info) {
  const nn::PeftSetup* peft = model.vit->peft();
  if (!peft || peft->name != "lora")
    fail(ExitCode::usage, "the PEFT method '", peft ? peft->name : "none",
         "' is no LoRA, which is all that these adapters can hold; --format pyra, timm or hf writes the merged model");
  refuse_scaled_sites(model);
  const std::vector<Site> sites = sites_of(model, target);
  const std::array<bool, 3> targeted = targeted_parts(sites);
  sdk::TensorMap tensors;
  std::set<std::string> modules, saved;
  for (const Site& site : sites) {
    const std::vector<at::Tensor> rows = site.term.b.detach().chunk(int64_t(site.modules.size()));
    for (size_t i = 0; i < rows.size(); ++i) {
      if (rows.size() > 1 && !targeted[i]) continue;
      modules.insert(site.modules[i]);
      tensors[cat(io::kPeftPrefix, site.modules[i], ".lora_A.weight")] = site.term.a.detach();
      tensors[cat(io::kPeftPrefix, site.modules[i], ".lora_B.weight")] = rows[i].contiguous();
    }
  }
  for (const auto& [name, tensor] : model.vit->weights()) {
    if (tensor_group(name) != "head") continue;
    const std::string named = io::peft_names(name, target.naming, model.file.config.distilled)[0];
    saved.insert(named.substr(0, named.rfind('.')));
    tensors[io::kPeftPrefix + named] = tensor.detach();
  }
  std::error_code error;
  if (!fs::create_directory(folder, error))
    fail(ExitCode::output, folder.string(), ": cannot be created: ", error ? error.message() : "it is there already");
  io::write_file(folder / io::kPeftConfig, config_text(model, target, modules, saved));
  io::write_safetensors(folder / io::kPeftWeights, tensors, adapter_metadata(info));
}

}  // namespace pyra::tasks
