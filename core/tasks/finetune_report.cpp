// What a run says of itself, as JSON.
#include "io/json.h"
#include "tasks/finetune.h"

namespace pyra::tasks {

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
                        {"resumed", r.resumed},
                        {"versions", {{"pyractl", PYRA_VERSION}, {"libtorch", TORCH_VERSION}}}}
      .dump(2);
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
