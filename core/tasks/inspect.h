// What a file or folder is, found from its contents.
#pragma once
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "host/plugin_registry.h"

namespace pyra::tasks {

struct TensorFacts {
  std::string name, dtype;
  std::vector<int64_t> shape;
  uint64_t bytes = 0;
};

/// Any safetensors file.
struct TensorFile {
  std::map<std::string, std::string> metadata;
  std::vector<TensorFacts> tensors;  ///< sorted by name
  int64_t elements = 0;
};

struct MergeFacts {
  std::string name, schedule;
  std::vector<int64_t> remove, prune, merge;
  std::map<std::string, std::string> parameters;  ///< as a recipe would write them
  bool proportional_attention = true;
  int64_t trained_elements = 0;
  std::vector<int64_t> tokens;  ///< leaving each block; empty when the plugin is not here
  std::string problem;          ///< why tokens and macs are not known
};

/// A model that eval, predict and compress can run.
struct ModelFacts {
  TensorFile file;
  std::string arch, pool, resize;
  int64_t image_size = 0, patch_size = 0, embed_dim = 0, depth = 0, num_heads = 0, mlp_dim = 0, num_classes = 0,
          tokens = 0;
  bool distilled = false;
  int64_t registers = 0;
  std::vector<double> mean, std;
  std::vector<std::string> class_names;
  int64_t parameters = 0;
  int64_t dense_macs = 0;
  std::optional<int64_t> macs;  ///< as it merges; equal to dense_macs for a dense model
  std::optional<MergeFacts> merge;
  std::string peft;           ///< of an architecture asked for with a PEFT method
  int64_t peft_elements = 0;  ///< that it trains of its own
  std::map<std::string, std::string> provenance;
};

/// A folder that finetune wrote.
struct RunFacts {
  std::string model, data, protocol, peft, merge, schedule;
  std::vector<std::string> files;  ///< relative, sorted
  std::string report;              ///< report.json as it stands, "" without one: the run has not ended
  std::string last_metrics;        ///< the last whole line of metrics.jsonl
};

/// A folder in peft's layout, of ours or of another's making; LoRA or not.
struct AdapterFacts {
  TensorFile file;
  std::optional<TensorFile> merger;  ///< what a run of ours has beside it
  std::string config;                ///< adapter_config.json
};

struct SplitFacts {
  std::string name;
  std::vector<int64_t> images_by_class;
};

struct DatasetFacts {
  std::vector<std::string> class_names;
  std::vector<SplitFacts> splits;
};

struct ImageFacts {
  int64_t width = 0, height = 0;
};

struct RecipeFacts {
  std::string resolved;  ///< as TOML, defaults filled in
};

using Inspection = std::variant<ModelFacts, TensorFile, RunFacts, AdapterFacts, DatasetFacts, host::PluginInfo,
                                ImageFacts, RecipeFacts>;

/// What `inspect --arch` is asked: an architecture by timm's name, nothing of which is made or read.
struct ArchQuestion {
  std::string arch;
  std::string merge, schedule;   ///< maybe with a merger, by its name
  std::string peft;              ///< and a PEFT method
  std::vector<std::string> set;  ///< parameters of both
};
[[nodiscard]] ModelFacts inspect_arch(const ArchQuestion& question, const host::PluginRegistry& plugins);

/// Error(input) naming what the file really is when it is none of these, or what is broken in it.
[[nodiscard]] Inspection inspect(const std::filesystem::path& path, const host::PluginRegistry& plugins);

}  // namespace pyra::tasks
