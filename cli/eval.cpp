// pyractl eval: accuracy and speed of a model on a data set.
#include "tasks/eval.h"

#include <iomanip>

#include "base/text.h"
#include "command.h"
#include "tasks/visualize.h"

namespace pyra::cli {
namespace {

nlohmann::json to_json(const tasks::EvalOptions& options, const tasks::EvalResult& result) {
  const auto share = [&](int64_t correct) { return double(correct) / double(result.images); };
  nlohmann::json document{{"model", options.run.model.string()},
                          {"data", options.data.string()},
                          {"split", options.split},
                          {"arch", result.arch},
                          {"merge", result.merge},
                          {"device", result.device},
                          {"dtype", result.dtype},
                          {"images", result.images},
                          {"correct", result.correct},
                          {"top1", share(result.correct)},
                          {"loss", result.loss},
                          {"batch", options.batch},
                          {"forward_images_per_second", result.forward_images_per_second},
                          {"images_per_second", result.images_per_second},
                          {"macs", result.macs},
                          {"params", result.parameters},
                          {"skipped", cli::to_json(result.skipped)},
                          {"provenance", result.provenance}};
  if (result.correct_top5) document["top5"] = share(*result.correct_top5);
  return document;
}

void print_human(std::ostream& out, const tasks::EvalOptions& options, const tasks::EvalResult& result) {
  const auto percent = [&](int64_t correct) {
    return cat(std::fixed, std::setprecision(2), 100.0 * double(correct) / double(result.images), "% (", correct,
               " of ", result.images, ")");
  };
  out << "model   " << options.run.model.string() << " (" << result.arch << ", " << result.merge << ", "
      << result.device << ", " << result.dtype << ")\n"
      << "data    " << options.data.string() << ", split " << options.split << "\n";
  out << "top-1   " << percent(result.correct) << "\n";
  if (result.correct_top5) out << "top-5   " << percent(*result.correct_top5) << "\n";
  out << std::fixed << std::setprecision(4) << "loss    " << result.loss << "\n"
      << std::setprecision(1) << "speed   " << result.forward_images_per_second << " images/s forward, "
      << result.images_per_second << " images/s with decoding, batch " << options.batch << "\n"
      << "cost    " << grouped(result.macs) << " MACs an image, " << grouped(result.parameters) << " parameters\n";
  print_skipped(out, result.skipped, ", left out of every figure above");
  if (!result.provenance.empty()) {
    out << "the file says of itself\n";
    for (const auto& [key, value] : result.provenance) out << "        " << key << ": " << value << "\n";
  }
}

/// The first images' pages: before the figures, so that a model that merges nothing costs no evaluation.
tasks::VisualizeReport write_pages(const tasks::EvalOptions& options, int64_t images, std::filesystem::path out,
                                   Session& session) {
  if (out.empty()) out = options.run.model.stem().string() + "_tokens";
  return tasks::visualize({.run = options.run,
                           .data = options.data,
                           .split = options.split,
                           .images = images,
                           .out = out,
                           .bad_images = options.bad_images},
                          session.plugins(), session.progress());
}

nlohmann::json to_json(const tasks::VisualizeReport& report) {
  nlohmann::json pages = nlohmann::json::array();
  for (const auto& page : report.pages) pages.push_back(page.string());
  return {{"index", report.index.string()}, {"pages", pages}};
}

/// What --visualize was given.
struct Visualization {
  int64_t images = 0;  ///< 0: none
  std::filesystem::path out;
};

void add_visualize_options(CLI::App& command, Visualization& visualization) {
  CLI::Option* count =
      command
          .add_option("--visualize", visualization.images,
                      "Draw the merged tokens of the split's first N images, a page each (computed on the CPU in fp32)")
          ->type_name("N")
          ->check(CLI::Range(int64_t{1}, tasks::kMaxVisualized).description(""));
  command.add_option("--visualize-out", visualization.out, "Folder for these pages; default: MODEL_tokens here")
      ->type_name("DIR")
      ->needs(count);
}

}  // namespace

void add_eval(CLI::App& root, Session& session) {
  CLI::App* command = add_command(root, session, "eval", "Accuracy and speed of a model on a data set");
  const auto options = std::make_shared<tasks::EvalOptions>();
  const auto visualization = std::make_shared<Visualization>();
  command->add_option("MODEL", options->run.model, "Model file (.safetensors, ours or timm's)")
      ->required()
      ->type_name("");
  command->add_option("--data", options->data, "Folder or .tar: list files, or an image folder")
      ->required()
      ->type_name("PATH");
  command->add_option("--split", options->split, "Which images")->type_name("NAME")->capture_default_str();
  command->add_option("--batch", options->batch, "Images at once")
      ->type_name("N")
      ->check(CLI::Range(1, 65536).description(""))
      ->capture_default_str();
  command->add_option("--predictions", options->predictions, "Write path,label,predicted,probability as CSV")
      ->type_name("FILE");
  add_bad_images_option(*command, options->bad_images);
  add_visualize_options(*command, *visualization);
  command->add_flag("--exact-gelu", options->run.exact_gelu,
                    "On a GPU in bf16 or fp16: GELU by erf, not its tanh form");
  command->footer(R"(
Examples:
  pyractl eval vit.safetensors --data task.tar
  pyractl eval vit.safetensors --data task.tar --set merge.name=tome --set merge.schedule=high
  pyractl eval vit.safetensors --data photos/ --split val --predictions wrong.csv --json
  pyractl eval merged.safetensors --data task.tar --visualize 16)");
  command->callback([&session, options, visualization] {
    session.action = [&session, options, visualization] {
      options->run.device = session.globals.device;
      options->run.dtype = session.globals.dtype;
      options->run.set = session.globals.set;
      std::optional<tasks::VisualizeReport> pages;
      if (visualization->images > 0) pages = write_pages(*options, visualization->images, visualization->out, session);
      const tasks::EvalResult result = tasks::evaluate(*options, session.plugins(), session.progress());
      nlohmann::json document = to_json(*options, result);
      if (pages) document["visualization"] = to_json(*pages);
      session.print(document, [&](std::ostream& out) {
        print_human(out, *options, result);
        if (pages) out << "tokens  " << pages->pages.size() << " pages, see " << pages->index.string() << "\n";
      });
      return 0;
    };
  });
}

}  // namespace pyra::cli
