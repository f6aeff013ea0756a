// metrics.jsonl: one JSON object a line, flushed as it is written, cut back to a checkpoint on resume.
#pragma once
#include <cstdint>
#include <filesystem>
#include <string_view>

namespace pyra::train {

class MetricsLog {
 public:
  /// Opens for appending after the first `keep` bytes; what stood behind them is cut off: lines of steps that will be
  /// done again. Error(output).
  MetricsLog(std::filesystem::path path, int64_t keep);
  ~MetricsLog();
  MetricsLog(const MetricsLog&) = delete;
  MetricsLog& operator=(const MetricsLog&) = delete;

  /// A line; `json` holds no line break. Error(output).
  void append(std::string_view json);
  /// Bytes written so far: what a checkpoint remembers. On disk before this returns.
  [[nodiscard]] int64_t synced_size();

 private:
  std::filesystem::path path_;
  int descriptor_ = -1;
  int64_t size_ = 0;
};

}  // namespace pyra::train
