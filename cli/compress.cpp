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

nlohmann::json accuracy_json(const tasks::SampledAccuracy& accuracy) {
  return {{"images", accuracy.images},
          {"correct", accuracy.correct},
          {"accuracy", accuracy.share()},
          {"interval95", {accuracy.low, accuracy.high}}};
}

nlohmann::json found_json(const tasks::FoundSchedule& found) {
  nlohmann::json document{{"tries", found.tries}, {"uniform", {{"remove", found.uniform}}}};
  if (found.predicted) {
    document["predicted_speedup"] = *found.predicted;
    document["latency_model_error"] = found.model_error;
  }
  if (found.likeness) {
    document["likeness"] = *found.likeness;
    document["uniform"]["likeness"] = *found.uniform_likeness;
  }
  if (found.accuracy) {
    document["split"] = found.accuracy_split;
    document["accuracy"] = accuracy_json(*found.accuracy);
    document["dense_accuracy"] = accuracy_json(*found.dense_accuracy);
    document["uniform"]["accuracy"] = accuracy_json(*found.uniform_accuracy);
  }
  return document;
}

nlohmann::json counts_json(const train::KeptCounts& counts) {
  return {{"prune", counts.prune}, {"merge", counts.merge}};
}

nlohmann::json search_json(const tasks::CompressOptions& options, const tasks::RateSearchReport& report) {
  const tasks::RateSearchOptions& asked = *options.search;
  nlohmann::json document{{"data", asked.data.string()},
                          {"split", report.train_split},
                          {"images", report.images},
                          {"epochs", asked.epochs},
                          {"steps", report.steps},
                          {"batch", asked.batch},
                          {"lr", asked.lr},
                          {"seed", asked.seed},
                          {"seconds", report.seconds},
                          {"resumed", report.resumed},
                          {"target_macs", report.target},
                          {"macs", report.macs},
                          {"macs_before_fit", report.searched_macs},
                          {"counts_before_fit", counts_json(report.searched)}};
  if (!asked.schedule_out.empty()) document["schedule_out"] = asked.schedule_out.string();
  if (report.judged_split.empty()) return document;
  nlohmann::json models = nlohmann::json::array();
  for (const tasks::JudgedCounts& judged : report.judged) {
    nlohmann::json entry = counts_json(judged.counts);
    entry["label"] = judged.label;
    entry["macs"] = judged.macs;
    entry["correct"] = judged.correct;
    entry["accuracy"] = double(judged.correct) / double(report.judged_images);
    models.push_back(entry);
  }
  document["judged"] = {{"split", report.judged_split}, {"images", report.judged_images}, {"models", models}};
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
  if (result.found) document["found"] = found_json(*result.found);
  if (result.search) document["search"] = search_json(options, *result.search);
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

void print_found(std::ostream& out, const tasks::FoundSchedule& found, const std::vector<int64_t>& remove) {
  if (!remove.empty()) out << "removes       " << join(remove, " ") << "\n";
  if (found.predicted)
    out << "predicted     " << fixed(*found.predicted, 2) << "x by the latency model (off by at most "
        << fixed(100 * found.model_error, 1) << "% where it was fitted)\n";
  if (found.likeness)
    out << "likeness      " << fixed(*found.likeness, 4) << " of the dense model's features; uniform at the same cost "
        << fixed(*found.uniform_likeness, 4) << " (" << found.tries << " schedules judged)\n";
  const auto line = [&](const char* name, const tasks::SampledAccuracy& accuracy) {
    out << std::left << std::setw(14) << name << fixed(100 * accuracy.share(), 2)
        << "% (95%: " << fixed(100 * accuracy.low, 1) << " to " << fixed(100 * accuracy.high, 1) << ") of "
        << accuracy.images << " images of " << found.accuracy_split << "\n";
  };
  if (!found.accuracy) return;
  line("accuracy", *found.accuracy);
  line("uniform", *found.uniform_accuracy);
  line("dense", *found.dense_accuracy);
}

void print_search(std::ostream& out, const tasks::RateSearchReport& report) {
  out << "searched on " << report.train_split << ", " << report.steps << " steps in " << fixed(report.seconds, 0)
      << " s\n  prune  " << join(report.counts.prune) << "\n  merge  " << join(report.counts.merge) << "\n";
  if (report.judged_split.empty()) return;
  out << "accuracy on " << report.judged_split << ", " << report.judged_images << " images\n";
  for (const tasks::JudgedCounts& judged : report.judged)
    out << "  " << std::left << std::setw(12) << judged.label << std::right << std::setw(7)
        << fixed(100.0 * double(judged.correct) / double(report.judged_images), 1) << " %" << std::setw(18)
        << grouped(judged.macs) << " MACs\n";
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
  if (result.found) print_found(out, *result.found, result.remove);
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
  if (result.search) print_search(out, *result.search);
  out << "written: " << options.out.string() << "\n";
}

struct CompressCommand {
  tasks::CompressOptions compress;
  tasks::RateSearchOptions search;
  std::filesystem::path data;
  double speedup = 0;
  bool plain_attention = false, no_measure = false, searches = false;
};

/// How a target is met.
void add_target_options(CLI::App& command, CompressCommand& options) {
  tasks::CompressOptions& compress = options.compress;
  command.add_option("--data", options.data, "Images to find a target's schedule on (folder or .tar)")->type_name("D");
  command.add_option("--images", compress.images, "How many of them")->type_name("N")->capture_default_str();
  command.add_option("--tries", compress.tries, "Schedules to judge; 0: the shape of high, scaled")
      ->type_name("N")
      ->capture_default_str();
  command
      .add_option("--latency-table", compress.latency_table, "Rows of `bench --json` that tell times, of any machine")
      ->type_name("FILE");
}

void add_search_options(CLI::App& command, CompressCommand& options) {
  CLI::Option* search =
      command.add_flag("--search", options.searches, "Train DiffRate's counts on --data instead, on --device");
  const auto add_number = [&](const char* name, auto& value, const char* help, const char* type) {
    command.add_option(name, value, help)->type_name(type)->capture_default_str()->needs(search);
  };
  add_number("--search-epochs", options.search.epochs, "Passes over its training images", "N");
  add_number("--search-lr", options.search.lr, "Learning rate of the counts' logits", "X");
  add_number("--search-batch", options.search.batch, "Images a step", "N");
  add_number("--seed", options.search.seed, "Of the order of images", "N");
  command.add_option("--schedule-out", options.search.schedule_out, "The counts as a file for --schedule")
      ->type_name("FILE.toml")
      ->needs(search);
  command.add_flag("--resume", options.search.resume, "Go on with a search that was stopped")->needs(search);
}

int run(const CompressCommand& o, bool wants_speedup, Session& session) {
  tasks::CompressOptions options = o.compress;
  options.run.device = session.globals.device;
  options.run.dtype = session.globals.dtype;
  options.run.set = session.globals.set;
  options.proportional_attention = !o.plain_attention;
  options.measure = !o.no_measure;
  if (wants_speedup) options.target_speedup = o.speedup;
  if (o.searches) {
    options.search = o.search;
    options.search->data = o.data;
  } else {
    options.data = o.data;
  }
  const tasks::CompressResult result = tasks::compress(options, session.plugins(), session.progress());
  session.print(to_json(options, result), [&](std::ostream& out) { print_human(out, options, result); });
  return 0;
}

}  // namespace

void add_compress(CLI::App& root, Session& session) {
  CLI::App* command = add_command(root, session, "compress", "Merge tokens in a model, and see what that saves");
  const auto options = std::make_shared<CompressCommand>();
  tasks::CompressOptions& compress = options->compress;
  command->add_option("MODEL", compress.run.model, "Model file (.safetensors)")->required()->type_name("");
  command->add_option("--merge", compress.merge, "Merger, as `pyractl plugins` lists them")
      ->required()
      ->type_name("NAME");
  command->add_option("--schedule", compress.schedule, "low, high, N, N@INFLECTION, a,b,c,... or file.toml")
      ->type_name("S");
  command->add_option("--target-macs", compress.target_macs, "A share of the dense model's (0.5), or a count")
      ->type_name("X");
  CLI::Option* target =
      command->add_option("--target-speedup", options->speedup, "Measured on this machine, over the dense model")
          ->type_name("X");
  command->add_option("--out", compress.out, "The compressed model")->required()->type_name("MODEL");
  command->add_flag("--no-proportional-attention", options->plain_attention,
                    "Let merged tokens weigh as much as single ones");
  command->add_option("--batch", compress.batch, "Images at once when timing")
      ->type_name("N")
      ->check(CLI::Range(1, 65536).description(""))
      ->capture_default_str();
  command->add_flag("--no-measure", options->no_measure, "Count only, time nothing");
  command->add_flag("--allow-slower", compress.allow_slower, "Write a model that is slower than dense here, too");
  add_target_options(*command, *options);
  add_search_options(*command, *options);
  command->footer(R"(
Exactly one of --schedule, --target-macs and --target-speedup. For a target, schedules are tried on images of --data
(without it on noise, which tells less), and the one that keeps most of the dense model's features is taken. A merger
with trained tensors (pyra) is trained with `pyractl finetune`, not added here. Exits with 7 when a target speed-up is
not reached or the model is slower than dense on this device; no file is written then.

--search trains how many tokens each block prunes and merges, on train800 (or train) of --data, the weights as they are;
the counts reach --target-macs and stand beside unsearched ones of equal cost on val200. Ctrl-C saves to OUT.search and
exits with 130; the same command with --resume goes on, and ends the same to the last bit.

Examples:
  pyractl compress vit.safetensors --merge tome --schedule high --out fast.safetensors
  pyractl compress vit.safetensors --merge tome --target-macs 0.5 --out half.safetensors
  pyractl compress vit.safetensors --merge diffrate --schedule counts.toml --out pruned.safetensors
  pyractl compress vit.safetensors --merge diffrate --search --data task.tar --target-macs 0.3 --out fast.safetensors
  pyractl compress vit.safetensors --merge tome --target-speedup 2 --data task.tar --out twice.safetensors)");
  command->callback([&session, options, target] {
    session.action = [&session, options, target] { return run(*options, target->count() > 0, session); };
  });
}

}  // namespace pyra::cli
