// What stands where in a run folder, and the adapter in it: PEFT's layout, with the merger's tensors beside it.
#pragma once
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "io/safetensors.h"
#include "tasks/assemble.h"
#include "tasks/tuned_model.h"

namespace pyra::tasks {

inline constexpr const char* kMergeTensors = "merge.safetensors";

struct RunFolder {
  std::filesystem::path path;
  [[nodiscard]] std::filesystem::path recipe() const { return path / "run.toml"; }
  [[nodiscard]] std::filesystem::path metrics() const { return path / "metrics.jsonl"; }
  [[nodiscard]] std::filesystem::path checkpoint() const { return path / "checkpoint"; }
  [[nodiscard]] std::filesystem::path adapter() const { return path / "adapter"; }
  /// The merger's trained tensors, beside the adapter's file.
  [[nodiscard]] std::filesystem::path merge_tensors() const { return adapter() / kMergeTensors; }
  [[nodiscard]] std::filesystem::path report() const { return path / "report.json"; }
  /// All that a run leaves, and what an adapter's folder of other programs holds: no result goes there.
  [[nodiscard]] std::vector<std::filesystem::path> contents() const;
};

/// What an adapter says of itself, in the metadata of adapter_model.safetensors.
struct AdapterInfo {
  Classes classes;
  std::string base_fingerprint;  ///< of the model it was trained on
};

/// As metadata of a tensor file, and back: nothing where another program wrote it, Error(input) for a damaged entry.
[[nodiscard]] io::Metadata adapter_metadata(const AdapterInfo& info);
[[nodiscard]] std::optional<AdapterInfo> parse_adapter_info(const io::Metadata& metadata, const std::string& file);

/// adapter_config.json and adapter_model.safetensors (trained tensors and head, as peft names them), and
/// merge.safetensors when the merger has tensors of its own. Equal tensors give equal bytes. Error(output).
void write_adapter(const RunFolder& run, const Model& model, const io::Recipe& recipe, const AdapterInfo& info);

/// Error(input) when the folder holds no adapter of ours.
[[nodiscard]] AdapterInfo read_adapter_info(const RunFolder& run);

/// Copies the adapter's tensors into a model made by make_tuned_model from the run's recipe. Error(input) naming file
/// and tensor when one is missing, unexpected, of another shape or not finite, or when the base model is not the one
/// that was trained on.
void load_adapter(const RunFolder& run, Model& model, const AdapterInfo& info);

/// Tells base models apart: every tensor but the head, which may be new.
[[nodiscard]] std::string base_fingerprint(const Model& model);

}  // namespace pyra::tasks
