// What long-running work tells whoever watches. The cli draws bars from it; tests and libraries pass nothing.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>

namespace pyra {

class Progress {
 public:
  virtual ~Progress() = default;
  /// A stretch of `total` items begins ("train", "image"); total 0: unknown.
  virtual void begin(std::string_view label, int64_t total, std::string_view unit) = 0;
  /// `done` items of the current stretch are done; `note` is short: "loss 0.412  lr 3.1e-04".
  virtual void update(int64_t done, std::string_view note = {}) = 0;
  virtual void end() = 0;
  /// A line for the log: what was decided, a warning.
  virtual void note(std::string_view line) = 0;
};

/// Ignores everything.
[[nodiscard]] Progress& silent_progress();

/// Set by the signal handlers that the cli installs (SIGINT, SIGTERM); long loops look at it between steps.
/// 0 while none came, else the signal's number.
[[nodiscard]] int pending_signal();
void raise_pending_signal(int signal_number);

}  // namespace pyra
