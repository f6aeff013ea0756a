#include "tasks/inspect.h"

#include <cstring>
#include <fstream>
#include <numeric>

#include "base/error.h"
#include "data/dataset.h"
#include "data/image.h"
#include "io/atomic_file.h"
#include "io/hf_model.h"
#include "io/json.h"
#include "io/model_file.h"
#include "io/npz.h"
#include "io/peft_adapter.h"
#include "io/recipe.h"
#include "io/safetensors.h"
#include "nn/config.h"
#include "tasks/run_folder.h"

namespace pyra::tasks {
namespace {

constexpr size_t kMaxRunReportBytes = 64 << 20;
constexpr size_t kMaxListedFiles = 1000;

/// The first bytes of a file, enough for every magic number below.
std::string head_of(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) fail(ExitCode::input, path.string(), ": cannot be opened: ", std::strerror(errno));
  std::string head(512, '\0');
  in.read(head.data(), std::streamsize(head.size()));
  head.resize(size_t(in.gcount()));
  return head;
}

bool is_tar(std::string_view head) {
  return head.size() >= 262 && head.substr(257, 5) == "ustar";
}

bool is_image(std::string_view head) {
  return head.starts_with("\xff\xd8\xff") || head.starts_with("\x89PNG\r\n") || head.starts_with("BM") ||
         (head.size() > 2 && head[0] == 'P' && head[1] >= '1' && head[1] <= '6' && std::isspace(head[2]));
}

TensorFile tensor_facts(const io::SafetensorsFile& file) {
  TensorFile facts{.metadata = file.metadata(), .tensors = {}, .elements = 0};
  for (const auto& [name, entry] : file.entries()) {
    facts.tensors.push_back({name, entry.dtype, entry.shape, entry.end - entry.begin});
    int64_t elements = 1;  // the product was checked against the file's size when it was opened
    for (const int64_t extent : entry.shape) elements *= extent;
    facts.elements += elements;
  }
  return facts;
}

MergeFacts merge_facts(const io::ModelFile& model, const host::PluginRegistry& plugins, const std::string& where) {
  const io::MergeSpec& spec = *model.merge;
  MergeFacts facts{.name = spec.name,
                   .schedule = spec.schedule.text,
                   .remove = spec.schedule.remove,
                   .prune = spec.schedule.prune,
                   .merge = spec.schedule.merge,
                   .parameters = {},
                   .proportional_attention = spec.proportional_attention,
                   .trained_elements = 0,
                   .tokens = {},
                   .problem = {}};
  for (const auto& [name, value] : spec.parameters) facts.parameters.emplace(name, sdk::to_text(value));
  for (const auto& [name, tensor] : spec.learned) facts.trained_elements += tensor.numel();
  try {
    const auto merger = plugins.merger(spec.name, spec.parameters, where);
    const sdk::ModelShape shape = model.config.shape();
    facts.tokens = merger->tokens_after(merger->resolve(spec.schedule, shape), shape);
  } catch (const Error& error) {
    // The file can be told about without the plugin that runs it.
    facts.problem = error.what();
  }
  return facts;
}

ModelFacts config_facts(const nn::VitConfig& config) {
  ModelFacts facts;
  facts.arch = config.arch;
  facts.pool = config.pool == nn::Pool::avg ? "avg" : "token";
  facts.image_size = config.image_size;
  facts.patch_size = config.patch_size;
  facts.embed_dim = config.embed_dim;
  facts.depth = config.depth;
  facts.num_heads = config.num_heads;
  facts.mlp_dim = config.mlp_dim;
  facts.num_classes = config.num_classes;
  facts.tokens = config.tokens();
  facts.distilled = config.distilled;
  facts.registers = config.registers;
  facts.dense_macs = nn::count_macs(config);
  return facts;
}

ModelFacts model_facts(const std::filesystem::path& path, TensorFile file, const host::PluginRegistry& plugins) {
  const io::ModelFile model = io::read_model(path);
  const nn::VitConfig& config = model.config;
  ModelFacts facts = config_facts(config);
  facts.resize = model.preprocess.mode == nn::ResizeMode::crop ? "crop" : "squash";
  facts.mean.assign(model.preprocess.mean.begin(), model.preprocess.mean.end());
  facts.std.assign(model.preprocess.std.begin(), model.preprocess.std.end());
  facts.class_names = model.class_names;
  for (const auto& [name, tensor] : model.weights) facts.parameters += tensor.numel();
  if (model.merge) {
    facts.merge = merge_facts(model, plugins, path.string() + ": merge");
    facts.parameters += facts.merge->trained_elements;
    if (facts.merge->problem.empty()) facts.macs = nn::count_macs(config, facts.merge->tokens);
  } else {
    facts.macs = facts.dense_macs;
  }
  facts.provenance = model.provenance;
  facts.file = std::move(file);
  return facts;
}

Inspection safetensors_facts(const std::filesystem::path& path, const host::PluginRegistry& plugins) {
  const io::SafetensorsFile file(path);
  TensorFile tensors = tensor_facts(file);
  // A file of ours says so; one with the first tensors of a ViT by timm's names is read as such. An adapter's is
  // neither, though ours say whose it is.
  const bool adapter =
      std::ranges::any_of(file.entries(), [](const auto& entry) { return entry.first.starts_with(io::kPeftPrefix); });
  if ((file.metadata().contains("pyra") && !adapter) ||
      (file.contains("cls_token") && file.contains("patch_embed.proj.weight")))
    return model_facts(path, std::move(tensors), plugins);
  return tensors;
}

/// Google's .npz, whose arrays are listed as they stand in it.
ModelFacts npz_facts(const std::filesystem::path& path, const host::PluginRegistry& plugins) {
  TensorFile arrays;
  const io::NpzFile file(path);
  for (const auto& [name, header] : file.arrays()) {
    arrays.tensors.push_back({name, header.descr, header.shape, header.bytes});
    int64_t elements = 1;  // the product was checked against the file's size when it was opened
    for (const int64_t extent : header.shape) elements *= extent;
    arrays.elements += elements;
  }
  return model_facts(path, std::move(arrays), plugins);
}

/// A Hugging Face folder; of one in shards the tensors are not listed.
ModelFacts hf_facts(const std::filesystem::path& folder, const host::PluginRegistry& plugins) {
  TensorFile tensors;
  if (std::filesystem::exists(folder / io::kHfWeights))
    tensors = tensor_facts(io::SafetensorsFile(folder / io::kHfWeights));
  return model_facts(folder, std::move(tensors), plugins);
}

std::string last_line(const std::filesystem::path& path) {
  std::ifstream in(path);
  std::string last;
  for (std::string line; std::getline(in, line) && !in.eof();) last = line;  // a line cut short has no newline yet
  return last;
}

RunFacts run_facts(const std::filesystem::path& folder) {
  const io::Recipe recipe = io::read_recipe(folder / "run.toml", {});
  RunFacts facts{.model = recipe.model.string(),
                 .data = recipe.data.string(),
                 .protocol = recipe.protocol,
                 .peft = recipe.peft.name,
                 .merge = recipe.merge.name,
                 .schedule = recipe.schedule,
                 .files = {},
                 .report = {},
                 .last_metrics = last_line(folder / "metrics.jsonl")};
  for (const auto& entry : std::filesystem::recursive_directory_iterator(folder))
    if (entry.is_regular_file() && facts.files.size() < kMaxListedFiles)
      facts.files.push_back(std::filesystem::relative(entry.path(), folder).string());
  std::sort(facts.files.begin(), facts.files.end());
  if (std::filesystem::exists(folder / "report.json"))
    facts.report = io::read_file(folder / "report.json", kMaxRunReportBytes);
  return facts;
}

AdapterFacts adapter_facts(const std::filesystem::path& folder) {
  io::check_peft_folder(folder);
  AdapterFacts facts{.file = tensor_facts(io::SafetensorsFile(folder / io::kPeftWeights)),
                     .merger = {},
                     .config = io::read_json(folder / io::kPeftConfig, io::kMaxPeftConfigBytes).dump()};
  if (std::filesystem::exists(folder / kMergeTensors))
    facts.merger = tensor_facts(io::SafetensorsFile(folder / kMergeTensors));
  return facts;
}

DatasetFacts dataset_facts(const std::filesystem::path& path) {
  const data::Dataset dataset = data::Dataset::open(path);
  DatasetFacts facts{.class_names = dataset.class_names(), .splits = {}};
  for (const std::string& name : dataset.splits()) {
    SplitFacts split{name, std::vector<int64_t>(size_t(dataset.num_classes()), 0)};
    for (const data::Sample& sample : dataset.split(name)) ++split.images_by_class.at(size_t(sample.label));
    facts.splits.push_back(std::move(split));
  }
  return facts;
}

ImageFacts image_facts(const std::filesystem::path& path) {
  const std::string bytes = io::read_file(path, data::kMaxImageBytes);
  const data::Image image = data::decode({reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size()}, path.string());
  return {image.width, image.height};
}

}  // namespace

ModelFacts inspect_arch(const ArchQuestion& question, const host::PluginRegistry& plugins) {
  const nn::VitConfig config = nn::arch_config(question.arch);
  const sdk::ModelShape shape = config.shape();
  const io::Recipe asked = io::read_recipe({}, question.set);
  ModelFacts facts = config_facts(config);
  facts.resize = "squash";
  const nn::Preprocess preprocess;
  facts.mean.assign(preprocess.mean.begin(), preprocess.mean.end());
  facts.std.assign(preprocess.std.begin(), preprocess.std.end());
  const auto elements = [](const std::vector<int64_t>& extents) {
    return std::accumulate(extents.begin(), extents.end(), int64_t{1}, std::multiplies<>());
  };
  for (const nn::TensorShape& tensor : nn::tensor_shapes(config)) {
    facts.parameters += elements(tensor.shape);
    facts.file.tensors.push_back({tensor.name, "F32", tensor.shape, uint64_t(4 * elements(tensor.shape))});
  }
  facts.file.elements = facts.parameters;
  facts.macs = facts.dense_macs;
  if (!question.merge.empty()) {
    io::ModelFile model;
    model.config = config;
    const auto merger = plugins.merger(question.merge, asked.merge.parameters, "--merge");
    model.merge = io::MergeSpec{.name = question.merge,
                                .schedule = merger->resolve(nn::parse_schedule(question.schedule, config), shape),
                                .parameters = asked.merge.parameters,
                                .learned = {}};
    facts.merge = merge_facts(model, plugins, "--merge");
    if (!facts.merge->problem.empty()) fail(ExitCode::usage, facts.merge->problem);
    for (const sdk::TensorDecl& decl : merger->declare(shape, model.merge->schedule))
      facts.merge->trained_elements += elements(decl.shape);
    facts.parameters += facts.merge->trained_elements;
    facts.macs = nn::count_macs(config, facts.merge->tokens);
  }
  if (!question.peft.empty()) {
    facts.peft = question.peft;
    const auto method = plugins.peft(question.peft, asked.peft.parameters, "--peft");
    for (const sdk::TensorDecl& decl : method->declare(shape)) facts.peft_elements += elements(decl.shape);
  }
  return facts;
}

Inspection inspect(const std::filesystem::path& path, const host::PluginRegistry& plugins) {
  std::error_code error;
  const auto status = std::filesystem::status(path, error);
  if (!std::filesystem::exists(status)) fail(ExitCode::input, path.string(), ": no such file or folder");
  if (std::filesystem::is_directory(status)) {
    if (std::filesystem::exists(path / "run.toml")) return run_facts(path);
    if (io::is_peft_folder(path)) return adapter_facts(path);
    if (io::is_hf_folder(path)) return hf_facts(path, plugins);
    return dataset_facts(path);
  }
  const std::string head = head_of(path);
  if (head.starts_with("\x7f"
                       "ELF"))
    return host::PluginRegistry::check(path);
  if (is_tar(head)) return dataset_facts(path);
  if (is_image(head)) return image_facts(path);
  if (io::is_npz(path)) return npz_facts(path, plugins);
  if (path.extension() == ".toml") return RecipeFacts{io::to_toml(io::read_recipe(path, {}))};
  return safetensors_facts(path, plugins);
}

}  // namespace pyra::tasks
