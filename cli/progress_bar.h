// Progress for people: a bar that redraws itself on a terminal, a plain line every few seconds elsewhere.
#pragma once
#include <chrono>
#include <cstdint>
#include <mutex>
#include <string>
#include <string_view>

#include "base/progress.h"

namespace pyra::cli {

/// Thread-safe. Writes to `descriptor`; errors of writing are ignored, progress is never worth failing for.
///
///   eval  [########--------]  512/1000 images  123.4 images/s  4 s left  loss 0.31
class ProgressBar final : public Progress {
 public:
  explicit ProgressBar(int descriptor);
  /// Leaves the terminal on a line of its own, also when an error cut the work short.
  ~ProgressBar() override;

  void begin(std::string_view label, int64_t total, std::string_view unit) override;
  void update(int64_t done, std::string_view note) override;
  void end() override;
  void note(std::string_view line) override;

 private:
  using Clock = std::chrono::steady_clock;

  [[nodiscard]] std::string status() const;
  [[nodiscard]] std::string line(size_t columns) const;
  [[nodiscard]] double rate() const;
  void draw();
  void write(std::string_view text) const;

  const int descriptor_;
  const bool terminal_;
  std::mutex mutex_;
  bool active_ = false;
  std::string label_, unit_, note_;
  int64_t total_ = 0, done_ = 0;
  // The rate counts from the first report on: a resumed run starts in the middle, and the first step warms up.
  int64_t base_done_ = 0;
  bool has_base_ = false;
  Clock::time_point begun_, base_time_, updated_, drawn_;
};

}  // namespace pyra::cli
