// pyractl inspect: what a file or folder is.
#include "tasks/inspect.h"

#include <iomanip>
#include <numeric>

#include "base/error.h"
#include "base/text.h"
#include "command.h"
#include "io/json.h"
#include "plugin_facts.h"

namespace pyra::cli {
namespace {

using nlohmann::json;

std::string shape_text(const std::vector<int64_t>& shape) {
  return "[" + join(shape, ",") + "]";
}

/// null for a file that is not there; Error(input) for what is no JSON: whoever sends a folder may have changed it.
json parsed(const std::string& text, const std::string& where) {
  return text.empty() ? json(nullptr) : io::parse_json(text, where);
}

// --- as JSON

json to_json(const tasks::TensorFile& file) {
  json tensors = json::array();
  for (const tasks::TensorFacts& tensor : file.tensors)
    tensors.push_back(
        {{"name", tensor.name}, {"dtype", tensor.dtype}, {"shape", tensor.shape}, {"bytes", tensor.bytes}});
  return {{"kind", "safetensors"}, {"metadata", file.metadata}, {"elements", file.elements}, {"tensors", tensors}};
}

json to_json(const tasks::MergeFacts& merge) {
  json document{{"name", merge.name},
                {"schedule", merge.schedule},
                {"remove", merge.remove},
                {"prune", merge.prune},
                {"merge", merge.merge},
                {"parameters", merge.parameters},
                {"proportional_attention", merge.proportional_attention},
                {"trained_elements", merge.trained_elements},
                {"tokens", merge.tokens}};
  if (!merge.problem.empty()) document["problem"] = merge.problem;
  return document;
}

json to_json(const tasks::ModelFacts& model) {
  json document{{"kind", "model"},
                {"arch", model.arch},
                {"image_size", model.image_size},
                {"patch_size", model.patch_size},
                {"embed_dim", model.embed_dim},
                {"depth", model.depth},
                {"num_heads", model.num_heads},
                {"mlp_dim", model.mlp_dim},
                {"num_classes", model.num_classes},
                {"tokens", model.tokens},
                {"pool", model.pool},
                {"distilled", model.distilled},
                {"registers", model.registers},
                {"preprocess", {{"resize", model.resize}, {"mean", model.mean}, {"std", model.std}}},
                {"class_names", model.class_names},
                {"params", model.parameters},
                {"dense_macs", model.dense_macs},
                {"macs", model.macs ? json(*model.macs) : json(nullptr)},
                {"merge", model.merge ? to_json(*model.merge) : json(nullptr)},
                {"provenance", model.provenance}};
  if (!model.peft.empty()) document["peft"] = {{"name", model.peft}, {"trained_elements", model.peft_elements}};
  document["tensors"] = to_json(model.file)["tensors"];
  return document;
}

json to_json(const tasks::RunFacts& run) {
  return {{"kind", "run"},
          {"model", run.model},
          {"data", run.data},
          {"protocol", run.protocol},
          {"peft", run.peft},
          {"merge", run.merge},
          {"schedule", run.schedule},
          {"files", run.files},
          {"report", parsed(run.report, "report.json")},
          {"last_metrics", parsed(run.last_metrics, "metrics.jsonl")}};
}

json to_json(const tasks::AdapterFacts& adapter) {
  json document = to_json(adapter.file);
  document["kind"] = "adapter";
  document["config"] = json::parse(adapter.config);
  document["merger"] = adapter.merger ? to_json(*adapter.merger) : json(nullptr);
  return document;
}

json to_json(const tasks::DatasetFacts& dataset) {
  json splits = json::object();
  for (const tasks::SplitFacts& split : dataset.splits) splits[split.name] = split.images_by_class;
  return {{"kind", "dataset"}, {"class_names", dataset.class_names}, {"images_by_class", splits}};
}

json to_json(const host::PluginInfo& plugin) {
  json document = plugin_json(plugin);
  document["plugin_kind"] = document["kind"];
  document["kind"] = "plugin";
  return document;
}

json to_json(const tasks::ImageFacts& image) {
  return {{"kind", "image"}, {"width", image.width}, {"height", image.height}};
}

json to_json(const tasks::RecipeFacts& recipe) {
  return {{"kind", "recipe"}, {"resolved", recipe.resolved}};
}

// --- for people

void print(std::ostream& out, const tasks::TensorFile& file) {
  out << "safetensors with " << file.tensors.size() << " tensors, " << grouped(file.elements) << " elements\n";
  for (const auto& [key, value] : file.metadata) out << "metadata " << key << " = " << value << "\n";
  size_t longest = 4;
  for (const tasks::TensorFacts& tensor : file.tensors)
    longest = std::max(longest, std::min<size_t>(tensor.name.size(), 60));
  for (const tasks::TensorFacts& tensor : file.tensors)
    out << "  " << std::left << std::setw(int(longest) + 2) << tensor.name << std::setw(5) << tensor.dtype << " "
        << shape_text(tensor.shape) << "\n";
}

void print(std::ostream& out, const tasks::MergeFacts& merge) {
  out << "merge       " << merge.name << ", schedule " << merge.schedule << ", proportional attention "
      << (merge.proportional_attention ? "on" : "off") << "\n";
  for (const auto& [key, value] : merge.parameters) out << "            " << key << " = " << value << "\n";
  if (!merge.remove.empty()) out << "            removes " << join(merge.remove, " ") << "\n";
  if (!merge.prune.empty()) out << "            keeps, pruned " << join(merge.prune, " ") << "\n";
  if (!merge.merge.empty()) out << "            keeps, merged " << join(merge.merge, " ") << "\n";
  if (!merge.tokens.empty()) out << "            tokens leaving each block " << join(merge.tokens, " ") << "\n";
  if (merge.trained_elements)
    out << "            " << grouped(merge.trained_elements) << " trained parameters of its own\n";
  if (!merge.problem.empty()) out << "            cannot run here: " << merge.problem << "\n";
}

void print(std::ostream& out, const tasks::ModelFacts& model) {
  out << "model       " << (model.arch.empty() ? "vision transformer" : model.arch)
      << (model.distilled ? ", distilled" : "");
  if (model.registers) out << ", " << model.registers << " register tokens";
  out << "\n"
      << "input       " << model.image_size << " px (" << model.resize << "), patches of " << model.patch_size << ", "
      << model.tokens << " tokens; mean " << model.mean[0] << " " << model.mean[1] << " " << model.mean[2] << ", std "
      << model.std[0] << " " << model.std[1] << " " << model.std[2] << "\n"
      << "network     " << model.depth << " blocks of width " << model.embed_dim << ", " << model.num_heads
      << " heads, MLP " << model.mlp_dim << ", pooled by " << model.pool << "\n"
      << "classes     " << model.num_classes;
  const size_t shown = std::min<size_t>(model.class_names.size(), 20);
  for (size_t i = 0; i < shown; ++i) out << (i ? ", " : ": ") << model.class_names[i];
  out << (shown < model.class_names.size() ? ", ..." : "") << "\n"
      << "parameters  " << grouped(model.parameters) << " in " << model.file.tensors.size() << " tensors\n"
      << "MACs        " << (model.macs ? grouped(*model.macs) : "unknown") << " an image";
  if (model.merge) out << " (dense " << grouped(model.dense_macs) << ")";
  out << "\n";
  if (model.merge) print(out, *model.merge);
  if (!model.peft.empty())
    out << "peft        " << model.peft << ", " << grouped(model.peft_elements) << " trained parameters\n";
  for (const auto& [key, value] : model.provenance) out << std::left << std::setw(12) << key << value << "\n";
  out << "(--json lists every tensor)\n";
}

void print(std::ostream& out, const tasks::RunFacts& run) {
  out << "run folder  " << (run.report.empty() ? "without a report: not ended, or still going" : "complete") << "\n"
      << "model       " << run.model << "\n"
      << "data        " << run.data << "\n"
      << "protocol    " << run.protocol << "\n"
      << "peft        " << run.peft << "\n"
      << "merge       " << (run.merge.empty() ? "none" : cat(run.merge, ", schedule ", run.schedule)) << "\n"
      << "files       " << join(run.files) << "\n";
  if (!run.last_metrics.empty()) out << "last line   " << run.last_metrics << "\n";
  const json report = parsed(run.report, "report.json");
  if (!report.is_object()) return;
  for (const auto& [key, value] : report.items())
    if (value.is_primitive()) out << std::left << std::setw(11) << key << " " << dump(value) << "\n";
}

void print(std::ostream& out, const tasks::AdapterFacts& adapter) {
  out << "adapter in peft's layout\n"
      << "parameters  " << grouped(adapter.file.elements) << " in " << adapter.file.tensors.size() << " tensors\n";
  if (adapter.merger) out << "merger      " << grouped(adapter.merger->elements) << " parameters beside it\n";
  const json config = json::parse(adapter.config);
  for (const auto& [key, value] : config.items())
    if (!value.is_null() && !value.empty()) out << std::left << std::setw(24) << key << " " << dump(value) << "\n";
}

void print(std::ostream& out, const tasks::DatasetFacts& dataset) {
  out << "data set with " << dataset.class_names.size() << " classes: ";
  const size_t shown = std::min<size_t>(dataset.class_names.size(), 20);
  for (size_t i = 0; i < shown; ++i) out << (i ? ", " : "") << dataset.class_names[i];
  out << (shown < dataset.class_names.size() ? ", ..." : "") << "\n";
  for (const tasks::SplitFacts& split : dataset.splits) {
    const auto& counts = split.images_by_class;
    const auto [least, most] = std::minmax_element(counts.begin(), counts.end());
    out << "  " << std::left << std::setw(18) << split.name << std::right << std::setw(9)
        << std::accumulate(counts.begin(), counts.end(), int64_t{0}) << " images";
    if (!counts.empty()) out << ", " << *least << (*least == *most ? "" : cat(" to ", *most)) << " a class";
    out << "\n";
  }
}

void print(std::ostream& out, const host::PluginInfo& plugin) {
  print_plugin(out, plugin);
}

void print(std::ostream& out, const tasks::ImageFacts& image) {
  out << "image, " << image.width << " x " << image.height << "\n";
}

void print(std::ostream& out, const tasks::RecipeFacts& recipe) {
  out << "recipe; resolved:\n\n" << recipe.resolved;
}

}  // namespace

void add_inspect(CLI::App& root, Session& session) {
  CLI::App* command =
      add_command(root, session, "inspect", "Say what a file is: model, run folder, data set, plugin ...");
  const auto path = std::make_shared<std::filesystem::path>();
  const auto question = std::make_shared<tasks::ArchQuestion>();
  CLI::Option* file =
      command
          ->add_option("FILE", *path,
                       "Model or any .safetensors, run or adapter folder, data set, recipe, image, plugin")
          ->type_name("");
  CLI::Option* arch = command->add_option("--arch", question->arch, "An architecture by timm's name, instead of a file")
                          ->type_name("NAME");
  file->excludes(arch);
  CLI::Option* schedule =
      command->add_option("--schedule", question->schedule, "As compress takes it")->type_name("S")->needs(arch);
  command->add_option("--merge", question->merge, "With this merger")->type_name("NAME")->needs(arch)->needs(schedule);
  command->add_option("--peft", question->peft, "With this PEFT method")->type_name("NAME")->needs(arch);
  command->footer(R"(
Examples:
  pyractl inspect vit.safetensors
  pyractl inspect runs/first --json
  pyractl inspect task.tar
  pyractl inspect --arch vit_base_patch16_224 --merge pyra --schedule high --peft lora)");
  command->callback([&session, path, question] {
    session.action = [&session, path, question] {
      if (path->empty() && question->arch.empty()) fail(ExitCode::usage, "a file or --arch NAME is expected");
      question->set = session.globals.set;
      const tasks::Inspection facts =
          path->empty() ? tasks::inspect_arch(*question, session.plugins()) : tasks::inspect(*path, session.plugins());
      json document = std::visit([](const auto& known) { return to_json(known); }, facts);
      if (!path->empty()) document["path"] = path->string();
      session.print(document, [&](std::ostream& out) {
        if (!path->empty()) out << path->string() << "\n";
        std::visit([&](const auto& known) { print(out, known); }, facts);
      });
      return 0;
    };
  });
}

}  // namespace pyra::cli
