#include "io/pyra_checkpoint.h"

#include <ATen/ATen.h>

#include <set>

#include "base/error.h"
#include "io/timm_model.h"
#include "sdk/token_merger.h"

namespace pyra::io {
namespace {

/// "blocks.3.attn.LoRA_a.weight", "blocks.3.pyra_norm.bias": of a method, not of the backbone.
bool of_method(std::string_view name) {
  return name.find(".LoRA_") != name.npos || name.find(".pyra_") != name.npos;
}

class CheckpointReader {
 public:
  CheckpointReader(const NamedTensors& named, const ReadModelOptions& options)
      : named_(named), options_(options), prefix_(wrapper_prefix(named)) {
    for (const auto& [name, shape] : named.shapes) (of_method(name) ? method_ : backbone_).insert(name);
  }

  ModelFile read(const ModelFile* base) {
    const bool whole = backbone_.contains(prefix_ + "patch_embed.proj.weight");
    if (!whole && !base)
      fail(
          ExitCode::usage, named_.where,
          ": holds LoRA's and PYRA's tensors but no backbone: name the model that it was trained on with --base MODEL");
    model_ = base ? on_base(*base) : own_backbone();
    for (int64_t block = 0; block < model_.config.depth; ++block) merge_lora(block);
    take_pyra();
    for (const std::string& name : method_)
      if (!used_.contains(name))
        fail(ExitCode::input, named_.where, ": tensor '", printable(name), "' belongs to none of the ",
             model_.config.depth, " blocks, or is none of LoRA's or PYRA's");
    model_.preprocess.mean = kImageNetMean;
    model_.preprocess.std = kImageNetStd;
    return std::move(model_);
  }

 private:
  ModelFile own_backbone() const {
    NamedTensors rest{.where = named_.where, .metadata = named_.metadata, .shapes = {}, .fp32 = named_.fp32};
    for (const std::string& name : backbone_) rest.shapes.emplace(name, named_.shapes.find(name)->second);
    return timm_model(rest, options_);
  }
  ModelFile on_base(const ModelFile& base) const;

  /// Of this shape, -1 being any size from 1; undefined when there is none.
  at::Tensor take(const std::string& name, const std::vector<int64_t>& expected);
  void merge_lora(int64_t block);
  void take_pyra();
  void check_schedule(const sdk::Schedule& schedule) const;

  const NamedTensors& named_;
  const ReadModelOptions& options_;
  std::string prefix_;
  std::set<std::string> method_, backbone_, used_;
  ModelFile model_;
};

ModelFile CheckpointReader::on_base(const ModelFile& base) const {
  if (base.merge)
    fail(ExitCode::usage, named_.where, ": its --base merges tokens by '", base.merge->name,
         "' already; give the dense model that it was trained on");
  ModelFile model = base;
  for (const std::string& full : backbone_) {
    const std::string name = full.substr(prefix_.size());
    model.weights.insert_or_assign(name, named_.fp32(full));
  }
  if (backbone_.contains(prefix_ + "head.weight")) {
    const at::Tensor& head = model.weights.at("head.weight");
    model.config.num_classes = head.dim() == 2 ? head.size(0) : 0;
    model.class_names.clear();
  }
  const std::vector<nn::TensorShape> expected = nn::tensor_shapes(model.config);
  std::set<std::string> known;
  for (const auto& [name, shape] : expected) {
    known.insert(name);
    const auto found = model.weights.find(name);
    if (found == model.weights.end() || found->second.sizes() != at::IntArrayRef(shape))
      fail(ExitCode::input, named_.where, ": with --base, tensor '", name, "' ",
           found == model.weights.end() ? std::string("is missing") : cat("has shape ", found->second.sizes()),
           ", expected [", join(shape), "]: another model than it was trained on?");
  }
  for (const auto& [name, tensor] : model.weights)
    if (!known.contains(name))
      fail(ExitCode::input, named_.where, ": tensor '", printable(name), "' is none of the --base model's");
  return model;
}

at::Tensor CheckpointReader::take(const std::string& name, const std::vector<int64_t>& expected) {
  const auto found = named_.shapes.find(prefix_ + name);
  if (found == named_.shapes.end()) return {};
  const std::vector<int64_t>& shape = found->second;
  bool fits = shape.size() == expected.size();
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = expected[i] == -1 ? shape[i] > 0 : shape[i] == expected[i];
  if (!fits)
    fail(ExitCode::input, named_.where, ": tensor '", name, "' has shape [", join(shape), "], expected [",
         join(expected), "] (-1: any size)");
  used_.insert(found->first);
  return named_.fp32(found->first);
}

void CheckpointReader::merge_lora(int64_t block) {
  const std::string attention = cat("blocks.", block, ".attn."), a_name = attention + "LoRA_a.weight";
  const int64_t dim = model_.config.embed_dim;
  const at::Tensor a = take(a_name, {-1, dim}), b = take(attention + "LoRA_b.weight", {3 * dim, -1});
  if (!a.defined() && !b.defined()) return;
  if (!a.defined() || !b.defined() || a.size(0) != b.size(1))
    fail(ExitCode::input, named_.where, ": '", a_name, "' and '", attention, "LoRA_b.weight' do not make a pair: ",
         a.defined() && b.defined() ? cat("ranks ", a.size(0), " and ", b.size(1)) : "one is missing");
  at::Tensor& weight = model_.weights.at(attention + "qkv.weight");
  weight = weight + at::mm(b, a);
}

void CheckpointReader::take_pyra() {
  MergeSpec merge{.name = "pyra", .schedule = {}, .parameters = {}, .learned = {}};
  const int64_t dim = model_.config.embed_dim;
  for (int64_t block = 0; block < model_.config.depth; ++block) {
    const std::string from = cat("blocks.", block, ".pyra_"), to = cat("blocks.", block, ".");
    const sdk::TensorMap found{{"a", take(from + "a", {-1, 1})},
                               {"b", take(from + "b", {1, dim})},
                               {"norm.weight", take(from + "norm.weight", {dim})},
                               {"norm.bias", take(from + "norm.bias", {dim})}};
    const at::Tensor& rows = found.at("a");
    for (const auto& [name, tensor] : found) {
      if (tensor.defined() != rows.defined())
        fail(ExitCode::input, named_.where, ": of PYRA's tensors a, b, norm.weight and norm.bias, '", from,
             rows.defined() ? name : "a", "' is missing");
      if (tensor.defined()) merge.learned.emplace(to + name, tensor);
    }
    merge.schedule.remove.push_back(rows.defined() ? rows.size(0) : 0);
  }
  if (merge.learned.empty()) return;
  check_schedule(merge.schedule);
  merge.schedule.text = join(merge.schedule.remove, ",");
  for (const char* name : {"low", "high"}) {
    const sdk::Schedule published = nn::parse_schedule(name, model_.config);
    if (sdk::cut_to_half(published, model_.config.shape()).remove == merge.schedule.remove) merge.schedule.text = name;
  }
  model_.merge = std::move(merge);
}

/// The rows of a are the tokens that leave: no more than a bipartite merge can take from what is left.
void CheckpointReader::check_schedule(const sdk::Schedule& schedule) const {
  const sdk::Schedule cut = sdk::cut_to_half(schedule, model_.config.shape());
  for (size_t block = 0; block < cut.remove.size(); ++block)
    if (cut.remove[block] != schedule.remove[block])
      fail(ExitCode::input, named_.where, ": tensor 'blocks.", block, ".pyra_a' has ", schedule.remove[block],
           " rows, but at most ", cut.remove[block], " tokens can merge there (", model_.config.tokens(),
           " enter the model): it was trained at another resolution");
}

}  // namespace

bool is_pyra_checkpoint(const NamedTensors& named) {
  for (const auto& [name, shape] : named.shapes)
    if (of_method(name)) return true;
  return false;
}

ModelFile pyra_checkpoint_model(const NamedTensors& named, const ModelFile* base, const ReadModelOptions& options) {
  return CheckpointReader(named, options).read(base);
}

}  // namespace pyra::io
