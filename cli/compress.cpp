// pyractl compress: gives a model a token merger and shows, side by side, what that changes.
#include "tasks/compress.h"

#include <iomanip>

#include "base/text.h"
#include "command.h"

namespace pyra::cli {
namespace {

nlohmann::json side_json(const tasks::CompressSide& side, int64_t batch) {
  nlohmann::json document{
      {"label", side.label}, {"tokens", side.tokens}, {"macs", side.macs}, {"params", side.parameters}};
  if (side.seconds) {
    document["batch_seconds"] = *side.seconds;
    document["images_per_second"] = double(batch) / *side.seconds;
  }
  return document;
}

nlohmann::json to_json(const tasks::CompressOptions& options, const tasks::CompressResult& result) {
  nlohmann::json document{{"model", options.run.model.string()},
                          {"out", options.out.string()},
                          {"arch", result.arch},
                          {"image_size", result.image_size},
                          {"device", result.device},
                          {"dtype", result.dtype},
                          {"dense", side_json(result.dense, result.batch)},
                          {"compressed", side_json(result.compressed, result.batch)},
                          {"macs_ratio", double(result.compressed.macs) / double(result.dense.macs)},
                          {"schedule", {{"remove", result.remove}, {"prune", result.prune}, {"merge", result.merge}}},
                          {"proportional_attention", options.proportional_attention}};
  if (result.speedup) {
    document["batch"] = result.batch;
    document["timed_pairs"] = result.runs;
    document["speedup"] = *result.speedup;
    document["speedup_quartiles"] = {*result.speedup_low, *result.speedup_high};
  }
  return document;
}

template <class T>
void row(std::ostream& out, const std::string& name, const T& dense, const T& compressed) {
  out << std::left << std::setw(14) << name << std::right << std::setw(18) << dense << std::setw(18) << compressed
      << "\n";
}

std::string fixed(double value, int digits) {
  return cat(std::fixed, std::setprecision(digits), value);
}

void print_human(std::ostream& out, const tasks::CompressOptions& options, const tasks::CompressResult& result) {
  const auto &dense = result.dense, &compressed = result.compressed;
  out << result.arch << " at " << result.image_size << " px, " << compressed.label << "\n";
  row<std::string>(out, "", "dense", "compressed");
  for (size_t block = 0; block < dense.tokens.size(); ++block)
    row(out, cat("tokens ", block), dense.tokens[block], compressed.tokens[block]);
  row(out, "MACs", grouped(dense.macs), grouped(compressed.macs));
  row<std::string>(out, "", "1.000", fixed(double(compressed.macs) / double(dense.macs), 3));
  row(out, "parameters", grouped(dense.parameters), grouped(compressed.parameters));
  if (result.speedup) {
    row(out, "batch time", fixed(*dense.seconds * 1e3, 2) + " ms", fixed(*compressed.seconds * 1e3, 2) + " ms");
    row(out, "images/s", fixed(double(result.batch) / *dense.seconds, 1),
        fixed(double(result.batch) / *compressed.seconds, 1));
    row<std::string>(out, "speed-up", "1.00", fixed(*result.speedup, 2));
    out << "(" << result.device << ", " << result.dtype << ", batch " << result.batch << ", median of " << result.runs
        << " interleaved runs; half of them between " << fixed(*result.speedup_low, 2) << " and "
        << fixed(*result.speedup_high, 2) << ")\n";
    if (*result.speedup < 1) out << "The compressed model is SLOWER than the dense one on this machine.\n";
  }
  out << "written: " << options.out.string() << "\n";
}

}  // namespace

void add_compress(CLI::App& root, Session& session) {
  CLI::App* command = add_command(root, session, "compress", "Merge tokens in a model, and see what that saves");
  const auto options = std::make_shared<tasks::CompressOptions>();
  const auto speedup = std::make_shared<double>(0);
  const auto plain_attention = std::make_shared<bool>(false), no_measure = std::make_shared<bool>(false);
  command->add_option("MODEL", options->run.model, "Model file (.safetensors)")->required()->type_name("");
  command->add_option("--merge", options->merge, "Merger, as `pyractl plugins` lists them")
      ->required()
      ->type_name("NAME");
  command->add_option("--schedule", options->schedule, "low, high, N, N@INFLECTION, a,b,c,... or file.toml")
      ->type_name("S");
  command->add_option("--target-macs", options->target_macs, "A share of the dense model's (0.5), or a count")
      ->type_name("X");
  CLI::Option* target =
      command->add_option("--target-speedup", *speedup, "Measured on this machine, over the dense model")
          ->type_name("X");
  command->add_option("--out", options->out, "The compressed model")->required()->type_name("MODEL");
  command->add_flag("--no-proportional-attention", *plain_attention, "Let merged tokens weigh as much as single ones");
  command->add_option("--batch", options->batch, "Images at once when timing")
      ->type_name("N")
      ->check(CLI::Range(1, 65536).description(""))
      ->capture_default_str();
  command->add_flag("--no-measure", *no_measure, "Count only, time nothing");
  command->footer(R"(
Exactly one of --schedule, --target-macs and --target-speedup. A merger with trained tensors (pyra) is trained with
`pyractl finetune`, not added here. Exits with 7 when a target speed-up is not reached; no file is written then.

Examples:
  pyractl compress vit.safetensors --merge tome --schedule high --out fast.safetensors
  pyractl compress vit.safetensors --merge tome --target-macs 0.5 --out half.safetensors
  pyractl compress vit.safetensors --merge diffrate --schedule counts.toml --out pruned.safetensors)");
  command->callback([&session, options, speedup, target, plain_attention, no_measure] {
    session.action = [&session, options, speedup, target, plain_attention, no_measure] {
      options->run.device = session.globals.device;
      options->run.dtype = session.globals.dtype;
      options->run.set = session.globals.set;
      options->proportional_attention = !*plain_attention;
      options->measure = !*no_measure;
      if (target->count() > 0) options->target_speedup = *speedup;
      const tasks::CompressResult result = tasks::compress(*options, session.plugins(), session.progress());
      session.print(to_json(*options, result), [&](std::ostream& out) { print_human(out, *options, result); });
      return 0;
    };
  });
}

}  // namespace pyra::cli
