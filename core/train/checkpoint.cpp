#include "train/checkpoint.h"

#include <unistd.h>

#include "io/json.h"
#include "io/safetensors.h"

namespace pyra::train {
namespace fs = std::filesystem;
namespace {

constexpr int kVersion = 1;
constexpr const char* kEntry = "pyra.checkpoint";

std::string to_json(const Checkpoint& c) {
  const Position& p = c.position;
  return nlohmann::json{{"version", kVersion},  {"step", p.step},       {"epoch", p.epoch},
                        {"batch", p.batch},     {"seconds", p.seconds}, {"loss_sum", p.loss_sum},
                        {"correct", p.correct}, {"images", p.images},   {"epoch_seconds", p.epoch_seconds},
                        {"task", c.task}}
      .dump();
}

int64_t count(const nlohmann::json& json, const char* key) {
  const int64_t value = json.at(key).get<int64_t>();
  if (value < 0) throw std::out_of_range(cat("'", key, "' is ", value));
  return value;
}

Checkpoint read_one(const fs::path& path) {
  const io::SafetensorsFile file(path);
  const auto entry = file.metadata().find(kEntry);
  if (entry == file.metadata().end()) fail(ExitCode::input, path.string(), ": is no checkpoint of a training run");
  const nlohmann::json json = io::parse_json(entry->second, cat(path.string(), ": metadata '", kEntry, "'"));
  Checkpoint checkpoint;
  try {
    if (const int version = json.at("version").get<int>(); version != kVersion) {
      fail(ExitCode::input, path.string(), ": checkpoint version ", version, ", this program reads ", kVersion);
    }
    checkpoint.position = {.step = count(json, "step"),
                           .epoch = count(json, "epoch"),
                           .batch = count(json, "batch"),
                           .seconds = json.at("seconds").get<double>(),
                           .loss_sum = json.at("loss_sum").get<double>(),
                           .correct = count(json, "correct"),
                           .images = count(json, "images"),
                           .epoch_seconds = json.at("epoch_seconds").get<double>()};
    checkpoint.task = json.at("task").get<std::string>();
  } catch (const nlohmann::json::exception& error) {
    fail(ExitCode::input, path.string(), ": metadata '", kEntry, "': ", io::json_reason(error));
  } catch (const std::out_of_range& error) {
    fail(ExitCode::input, path.string(), ": metadata '", kEntry, "': ", error.what());
  }
  checkpoint.tensors = file.tensors();
  return checkpoint;
}

/// A second name for the last checkpoint, so that it stays when the next one takes its name.
void keep_as_previous(const fs::path& last, const fs::path& previous) {
  const fs::path temporary = previous.string() + cat(".", getpid(), ".tmp");
  std::error_code error;
  fs::create_hard_link(last, temporary, error);
  // Filesystems without hard links (FAT, some network mounts) get a copy.
  if (error) fs::copy_file(last, temporary, fs::copy_options::overwrite_existing, error);
  if (!error) fs::rename(temporary, previous, error);
  if (error) fail(ExitCode::output, previous.string(), ": cannot be written: ", error.message());
}

}  // namespace

void write_checkpoint(const fs::path& folder, const Checkpoint& checkpoint) {
  std::error_code error;
  fs::create_directories(folder, error);
  if (error) fail(ExitCode::output, folder.string(), ": cannot be created: ", error.message());
  const fs::path last = folder / "last.safetensors";
  if (fs::exists(last)) keep_as_previous(last, folder / "previous.safetensors");
  io::write_safetensors(last, checkpoint.tensors, {{kEntry, to_json(checkpoint)}});
}

std::optional<Checkpoint> read_checkpoint(const fs::path& folder, Progress& progress) {
  const fs::path last = folder / "last.safetensors", previous = folder / "previous.safetensors";
  if (!fs::exists(last) && !fs::exists(previous)) return std::nullopt;
  try {
    return read_one(last);
  } catch (const Error& error) {
    if (!fs::exists(previous)) throw;
    progress.note(cat("the last checkpoint cannot be read (", error.what(), "); going on from the one before"));
    return read_one(previous);
  }
}

}  // namespace pyra::train
