// What a run says of itself, as JSON, and that read back.
#include <cmath>

#include "base/error.h"
#include "io/json.h"
#include "io/json_fields.h"
#include "tasks/finetune.h"

namespace pyra::tasks {
namespace {

constexpr size_t kMaxReport = size_t{1} << 20;

/// A count of something.
int64_t count_of(const io::JsonFields& fields, const char* key) {
  const int64_t value = fields.integer(key);
  if (value < 0) fields.refuse(key, cat("is ", value, ", expected a count"));
  return value;
}

double share_of(const io::JsonFields& fields, const char* key) {
  const double value = fields.number(key);
  if (!(value >= 0 && value <= 1)) fields.refuse(key, cat("is ", value, ", expected 0 to 1"));
  return value;
}

/// Seconds, rates: finite and not negative.
double amount_of(const io::JsonFields& fields, const char* key) {
  const double value = fields.number(key);
  if (!(value >= 0 && std::isfinite(value))) fields.refuse(key, cat("is ", value, ", expected 0 or more"));
  return value;
}

}  // namespace

std::string to_json(const FinetuneReport& r) {
  nlohmann::json choices = nlohmann::json::array();
  for (const Choice& choice : r.choices) choices.push_back({{"lr", choice.lr}, {"accuracy", choice.accuracy}});
  return nlohmann::json{{"run", r.out.string()},
                        {"arch", r.arch},
                        {"merge", r.merge},
                        {"peft", r.peft},
                        {"device", r.device},
                        {"dtype", r.dtype},
                        {"protocol", r.protocol},
                        {"test_selected", r.test_selected},
                        {"accuracy", r.accuracy},
                        {"correct", r.correct},
                        {"test_images", r.test_images},
                        {"train_split", r.train_split},
                        {"test_split", r.test_split},
                        {"lr", r.lr},
                        {"merge_lr", r.merge_lr},
                        {"choices", choices},
                        {"selected_epoch", r.selected_epoch},
                        {"params", r.parameters},
                        {"trained_params", r.trained_parameters},
                        {"macs", r.macs},
                        {"epochs", r.epochs},
                        {"steps", r.steps},
                        {"train_seconds", r.train_seconds},
                        {"images_per_second", r.images_per_second},
                        {"eval_images_per_second", r.eval_images_per_second},
                        {"total_seconds", r.total_seconds},
                        {"skipped_images", r.skipped_images},
                        {"seed", r.seed},
                        {"threads", r.threads},
                        {"device_memory_bytes", r.device_memory_bytes},
                        {"peak_memory_bytes", r.peak_memory_bytes},
                        {"resumed", r.resumed},
                        {"processor", r.processor},
                        {"versions", {{"pyractl", r.pyractl_version}, {"libtorch", r.libtorch_version}}}}
      .dump(2);
}

// Reports written before training knew GPUs name no device; those before the processor was kept, no processor.
FinetuneReport read_finetune_report(const std::filesystem::path& path) {
  const nlohmann::json document = io::read_json(path, kMaxReport);
  const io::JsonFields fields(document, path.string());
  const io::JsonFields versions = fields.object("versions");
  const std::string device = fields.has("device") ? fields.string("device") : "cpu";
  const int64_t device_bytes = fields.has("device_memory_bytes") ? count_of(fields, "device_memory_bytes") : 0;
  const int64_t peak_bytes = fields.has("peak_memory_bytes") ? count_of(fields, "peak_memory_bytes") : 0;
  FinetuneReport r{.out = fields.string("run"),
                   .arch = fields.string("arch"),
                   .merge = fields.string("merge"),
                   .peft = fields.string("peft"),
                   .device = device,
                   .dtype = fields.string("dtype"),
                   .protocol = fields.string("protocol"),
                   .test_selected = fields.boolean("test_selected"),
                   .accuracy = share_of(fields, "accuracy"),
                   .correct = count_of(fields, "correct"),
                   .test_images = count_of(fields, "test_images"),
                   .train_split = fields.string("train_split"),
                   .test_split = fields.string("test_split"),
                   .lr = amount_of(fields, "lr"),
                   .merge_lr = amount_of(fields, "merge_lr"),
                   .choices = {},
                   .selected_epoch = count_of(fields, "selected_epoch"),
                   .parameters = count_of(fields, "params"),
                   .trained_parameters = count_of(fields, "trained_params"),
                   .macs = count_of(fields, "macs"),
                   .epochs = count_of(fields, "epochs"),
                   .steps = count_of(fields, "steps"),
                   .train_seconds = amount_of(fields, "train_seconds"),
                   .images_per_second = amount_of(fields, "images_per_second"),
                   .eval_images_per_second = amount_of(fields, "eval_images_per_second"),
                   .total_seconds = amount_of(fields, "total_seconds"),
                   .skipped_images = count_of(fields, "skipped_images"),
                   .seed = fields.integer("seed"),
                   .threads = int(std::min<int64_t>(count_of(fields, "threads"), 1 << 20)),
                   .device_memory_bytes = device_bytes,
                   .peak_memory_bytes = peak_bytes,
                   .resumed = fields.boolean("resumed"),
                   .processor = fields.has("processor") ? fields.string("processor") : "",
                   .pyractl_version = versions.string("pyractl"),
                   .libtorch_version = versions.string("libtorch")};
  for (const nlohmann::json& item : fields.value("choices")) {
    const io::JsonFields choice(item, path.string(), "choices.");
    r.choices.push_back({.lr = amount_of(choice, "lr"), .accuracy = share_of(choice, "accuracy")});
  }
  if (r.test_images == 0 || r.correct > r.test_images) {
    fields.refuse("correct", cat("is ", r.correct, " of ", r.test_images, " images"));
  }
  return r;
}

std::string to_json(const DryRunReport& r) {
  nlohmann::json trained = nlohmann::json::object();
  for (const auto& [group, count] : r.trained) trained[group] = count;
  return nlohmann::json{{"dry_run", true},
                        {"arch", r.arch},
                        {"merge", r.merge},
                        {"peft", r.peft},
                        {"device", r.device},
                        {"dtype", r.dtype},
                        {"protocol", r.protocol},
                        {"image_size", r.image_size},
                        {"tokens", r.tokens},
                        {"train_images", r.train_images},
                        {"test_images", r.test_images},
                        {"classes", r.classes},
                        {"batch", r.batch},
                        {"steps_per_epoch", r.steps_per_epoch},
                        {"steps", r.steps},
                        {"params", r.parameters},
                        {"macs", r.macs},
                        {"trained_params", trained},
                        {"step_seconds", r.step_seconds},
                        {"estimated_seconds", r.estimated_seconds},
                        {"peak_memory_bytes", r.peak_memory_bytes},
                        {"device_memory_bytes", r.device_memory_bytes}}
      .dump(2);
}

}  // namespace pyra::tasks
