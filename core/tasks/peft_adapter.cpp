#include "tasks/peft_adapter.h"

#include <ATen/Functions.h>

#include "base/error.h"
#include "io/hf_model.h"
#include "io/json.h"
#include "io/peft_adapter.h"

namespace pyra::tasks {
namespace fs = std::filesystem;
namespace {

/// Low-rank terms of blocks' layers as a PEFT method; those of q, k and v are one term of the fused layer.
class ForeignLora final : public sdk::PeftMethod {
 public:
  struct Shape {
    int64_t rank = 0, in = 0, out = 0;
    double scale = 1;
  };
  explicit ForeignLora(std::map<std::string, Shape> sites) : sites_(std::move(sites)) {}

  [[nodiscard]] std::vector<sdk::TensorDecl> declare(const sdk::ModelShape&) const override {
    std::vector<sdk::TensorDecl> tensors;
    for (const auto& [name, shape] : sites_) {
      tensors.push_back({.name = name + kA, .shape = {shape.rank, shape.in}});
      tensors.push_back({.name = name + kB, .shape = {shape.out, shape.rank}});
    }
    return tensors;
  }
  [[nodiscard]] std::optional<sdk::LowRank> low_rank(const sdk::LinearSite& site,
                                                     const sdk::TensorMap& learned) const override {
    const std::string name = site.name();
    const auto found = sites_.find(name);
    if (found == sites_.end()) return std::nullopt;
    return sdk::LowRank{.a = learned.at(name + kA), .b = learned.at(name + kB), .scale = found->second.scale};
  }
  [[nodiscard]] bool mergeable() const override { return true; }

  static constexpr const char* kA = ".lora_A.weight";
  static constexpr const char* kB = ".lora_B.weight";

 private:
  std::map<std::string, Shape> sites_;
};

struct Term {
  at::Tensor a, b;
  double scale = 1;
};

/// Separate terms of q, k and v as one of the fused layer: A's rows one below the other, B block by block. Each has a
/// scale of its own, so B holds them.
Term fused(const std::vector<io::PeftTerm>& parts) {
  if (parts[0].parts == 1) return {parts[0].a, parts[0].b, parts[0].scale};
  std::vector<at::Tensor> rows;
  int64_t rank = 0;
  for (const io::PeftTerm& part : parts) {
    rows.push_back(part.a);
    rank += part.a.size(0);
  }
  const int64_t out = parts[0].b.size(0);
  Term term{at::cat(rows), at::zeros({out * parts[0].parts, rank})};
  int64_t column = 0;
  for (const io::PeftTerm& part : parts) {
    const int64_t width = part.b.size(1);
    term.b.narrow(0, part.part * out, out).narrow(1, column, width).copy_(part.b * part.scale);
    column += width;
  }
  return term;
}

std::unique_ptr<nn::PeftSetup> make_setup(const io::PeftAdapter& adapter) {
  auto setup = std::make_unique<nn::PeftSetup>();
  std::map<std::string, ForeignLora::Shape> sites;
  for (const auto& [layer, parts] : adapter.terms) {
    if (!layer.starts_with("blocks.")) continue;
    const Term term = fused(parts);
    sites[layer] = {term.a.size(0), term.a.size(1), term.b.size(0), term.scale};
    setup->learned[layer + ForeignLora::kA] = term.a;
    setup->learned[layer + ForeignLora::kB] = term.b;
  }
  setup->name = "lora";
  setup->method = std::make_shared<ForeignLora>(std::move(sites));
  return setup;
}

/// The core has no place for a term beside the patch embedding or the head.
void add_outer_terms(const io::PeftAdapter& adapter, sdk::TensorMap& weights) {
  for (const auto& [layer, parts] : adapter.terms) {
    if (layer.starts_with("blocks.")) continue;
    const Term term = fused(parts);
    at::Tensor& weight = weights.at(layer + ".weight");
    weight = weight + (at::matmul(term.b, term.a) * term.scale).view(weight.sizes());
  }
}

void check_ours(const fs::path& folder, const fs::path& base, const AdapterInfo& info, const Model& model) {
  if (const std::string found = base_fingerprint(model); found != info.base_fingerprint)
    fail(ExitCode::input, folder.string(), ": was trained on another base model (fingerprint ", info.base_fingerprint,
         ") than ", base.string(), " (", found,
         "): give the one its run.toml names; a run at another image size is merged as a whole, by `pyractl "
         "merge-lora RUN`");
}

/// Class names: the adapter's own if it says them, the base's if they may still hold.
void name_classes(io::ModelFile& file, const io::PeftAdapter& adapter, const AdapterInfo* info, int64_t base_classes,
                  Progress& progress) {
  if (!adapter.brings_head) return;
  if (info && int64_t(info->classes.names.size()) == adapter.num_classes && !are_numbered(info->classes.names)) {
    file.class_names = info->classes.names;
    return;
  }
  if (base_classes != adapter.num_classes) file.class_names.clear();
  progress.note(cat("head: the adapter's, ", adapter.num_classes, " classes, ",
                    file.class_names.empty() ? "without names" : "with the base model's names"));
}

}  // namespace

Model open_peft_adapter(const fs::path& folder, const fs::path& base, const host::PluginRegistry& plugins,
                        Progress& progress, const io::ReadModelOptions& options) {
  Model model = load_model(base, plugins, options);
  io::PeftAdapter adapter = io::read_peft_adapter(folder, model.file);
  const std::optional<AdapterInfo> info = parse_adapter_info(adapter.metadata, (folder / io::kPeftWeights).string());
  if (info) check_ours(folder, base, *info, model);
  name_classes(model.file, adapter, info ? &*info : nullptr, model.file.config.num_classes, progress);
  add_outer_terms(adapter, adapter.weights);
  auto merge = model.vit->merge() ? std::make_unique<nn::MergeSetup>(*model.vit->merge()) : nullptr;
  model.file.config.num_classes = adapter.num_classes;
  model.file.weights = std::move(adapter.weights);
  model.vit = std::make_unique<nn::Vit>(model.file.config, model.file.weights);
  model.vit->set_merge(std::move(merge));
  model.vit->set_peft(make_setup(adapter));
  io::begin_provenance(model.file, "base", base);
  model.file.provenance["peft"] = cat("lora, of ", library_of(adapter.naming.names), "'s names");
  return model;
}

std::string hf_model_type(const fs::path& base, const nn::VitConfig& config) {
  if (config.distilled) return "deit";
  if (!io::is_hf_folder(base)) return "vit";
  const nlohmann::json document = io::read_json(base / "config.json");
  return document.is_object() && document.value("model_type", nlohmann::json()) == "deit" ? "deit" : "vit";
}

}  // namespace pyra::tasks
