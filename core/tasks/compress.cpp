#include "tasks/compress.h"

#include <cstdio>

#include "base/error.h"
#include "io/output_path.h"
#include "tasks/assemble.h"

namespace pyra::tasks {
namespace {

io::PluginChoice choice_of(const CompressOptions& options) {
  check_keys(options.run.set, {"merge.*"});
  const io::Recipe asked = io::read_recipe({}, options.run.set);
  if (!asked.schedule.empty() || !asked.merge.name.empty() || !asked.proportional_attention)
    fail(ExitCode::usage,
         "--set takes the merger's own parameters here; use --merge, --schedule and "
         "--no-proportional-attention for the rest");
  return {.name = options.merge, .parameters = asked.merge.parameters};
}

/// A merge that costs accuracy and time is no compression: refused with the figures unless it is wanted.
void check_faster(const Timing& timing, const CompressOptions& options) {
  if (timing.high >= 1 || options.allow_slower) return;
  char text[256];
  std::snprintf(text, sizeof text,
                "%s with this schedule runs %.2fx as fast as dense on this device (quartiles %.2f to %.2f, batch of "
                "%lld in %.2f ms against %.2f ms): slower; no file was written. Take another schedule or batch, or "
                "--allow-slower to write it all the same",
                options.merge.c_str(), timing.speedup, timing.low, timing.high, static_cast<long long>(options.batch),
                timing.compressed * 1e3, timing.dense * 1e3);
  fail(ExitCode::untrusted, text);
}

void check_search(const CompressOptions& options) {
  if (!options.search) return;
  if (options.merge != "diffrate")
    fail(ExitCode::usage, "--search finds DiffRate's counts: expected --merge diffrate, got --merge ", options.merge);
  if (options.target_macs.empty())
    fail(ExitCode::usage, "--search needs --target-macs: the multiply-adds that the counts may cost");
  check_rate_search(*options.search);
}

void check_options(const CompressOptions& options) {
  const int ways =
      int(!options.schedule.empty()) + int(!options.target_macs.empty()) + int(options.target_speedup.has_value());
  if (ways != 1)
    fail(ExitCode::usage, "exactly one of --schedule, --target-macs and --target-speedup is expected, got ", ways);
  if (options.merge.empty() || options.out.empty()) fail(ExitCode::usage, "--merge and --out are needed");
  if (options.target_speedup && !(*options.target_speedup > 1 && *options.target_speedup <= 100))
    fail(ExitCode::usage, "--target-speedup is ", *options.target_speedup, ", expected more than 1 and at most 100");
  if (!options.schedule.empty() && (!options.data.empty() || !options.latency_table.empty()))
    fail(ExitCode::usage,
         "--data and --latency-table belong to a search: give --target-speedup or --target-macs with "
         "them, not --schedule");
  if (!options.latency_table.empty() && !options.target_speedup)
    fail(ExitCode::usage, "--latency-table tells times: it goes with --target-speedup");
  if (options.batch < 1) fail(ExitCode::usage, "--batch is ", options.batch, ", expected at least 1");
  check_search(options);
  io::keep_inputs(options.out, {options.run.model, options.data});
  // Known now rather than after minutes of measuring.
  const std::filesystem::path folder = options.out.has_parent_path() ? options.out.parent_path() : ".";
  if (!std::filesystem::is_directory(folder))
    fail(ExitCode::output, options.out.string(), ": there is no folder ", folder.string(), " to write into");
}

Model load_dense(const CompressOptions& options, const host::PluginRegistry& plugins) {
  Model model = load_model(options.run.model, plugins);
  check_finite(model, options.run.model);
  if (!model.file.merge) return model;
  const io::MergeSpec& has = *model.file.merge;
  if (!has.learned.empty())
    fail(ExitCode::usage, options.run.model.string(), " already merges by ", has.name, " trained for schedule '",
         has.schedule.text, "', which cannot be replaced; compress the model it was made from, or train another");
  detach_merge(model);
  return model;
}

void put_timing(const Timing& timing, CompressResult& result) {
  result.runs = timing.pairs;
  result.dense.seconds = timing.dense;
  result.compressed.seconds = timing.compressed;
  result.speedup = timing.speedup;
  result.speedup_low = timing.low;
  result.speedup_high = timing.high;
}

CompressSide side(const Model& model) {
  CompressSide side{.label = merge_label(model),
                    .tokens = tokens_after(model),
                    .macs = nn::count_macs(model.file.config, tokens_after(model)),
                    .parameters = parameter_count(model),
                    .seconds = {}};
  if (side.tokens.empty()) side.tokens.assign(size_t(model.file.config.depth), model.file.config.tokens());
  return side;
}

}  // namespace

CompressResult compress(const CompressOptions& options, const host::PluginRegistry& plugins, Progress& progress) {
  check_options(options);
  const std::string device = resolve_device(options.run.device);
  const engine::Precision precision = resolve_precision(options.run.dtype, device);
  Model model = load_dense(options, plugins);
  CompressResult result;
  result.dense = side(model);
  const SearchContext context{.plugins = plugins,
                              .choice = choice_of(options),
                              .proportional_attention = options.proportional_attention,
                              .fresh_seed = {},
                              .engine = {.device = device, .precision = precision},
                              .batch = options.batch};
  // Before InferenceMode, whose tensors have no gradients.
  if (options.search)
    result.search = search_rates(model,
                                 {.options = *options.search,
                                  .model_path = options.run.model,
                                  .out = options.out,
                                  .target = wanted_macs(options.target_macs, result.dense.macs),
                                  .device = device,
                                  .precision = precision,
                                  .proportional_attention = options.proportional_attention},
                                 plugins, progress);
  const at::InferenceMode no_gradients;
  std::optional<Timing> timing;
  const auto attach = [&](const auto& schedule) {
    attach_merge(model, plugins, context.choice, schedule, options.proportional_attention, std::nullopt);
  };
  if (result.search) {
    attach(searched_schedule(*result.search));
  } else if (!options.schedule.empty()) {
    attach(options.schedule);
  } else {
    result.found = find_schedule(model,
                                 {.speedup = options.target_speedup,
                                  .macs = options.target_macs,
                                  .data = options.data,
                                  .latency_table = options.latency_table,
                                  .images = options.images,
                                  .tries = options.tries},
                                 context, progress);
    timing = result.found->timing;
  }
  if (options.measure && !timing) {
    const nn::Vit dense(model.file.config, model.file.weights);
    const Stopwatch stopwatch(dense, model.file.preprocess, context.engine, options.batch);
    timing = stopwatch.time(*model.vit, 5, 10.0);
  }
  // A latency table speaks of another machine.
  if (timing && options.latency_table.empty()) check_faster(*timing, options);

  result.compressed = side(model);
  result.arch = model.file.config.arch;
  result.device = device;
  result.dtype = engine::precision_name(precision);
  result.image_size = model.file.config.image_size;
  result.batch = options.batch;
  const sdk::Schedule& schedule = model.file.merge->schedule;
  result.remove = schedule.remove, result.prune = schedule.prune, result.merge = schedule.merge;
  if (timing) put_timing(*timing, result);
  stop_if_asked("compress");
  io::begin_provenance(model.file, "compressed_from", options.run.model);
  if (result.search) {
    model.file.provenance["searched_on"] = options.search->data.filename().string();
    if (!options.search->schedule_out.empty()) write_counts(options.search->schedule_out, *result.search);
  }
  io::write_model(options.out, model.file);
  if (result.search) drop_search_checkpoint(options.out);
  return result;
}

}  // namespace pyra::tasks
