#include "base/progress.h"

#include <csignal>

namespace pyra {
namespace {

class SilentProgress final : public Progress {
 public:
  void begin(std::string_view, int64_t, std::string_view) override {}
  void update(int64_t, std::string_view) override {}
  void end() override {}
  void note(std::string_view) override {}
};

// Written by a signal handler, so nothing but this type is allowed.
volatile std::sig_atomic_t g_pending_signal = 0;

}  // namespace

Progress& silent_progress() {
  static SilentProgress silent;
  return silent;
}

int pending_signal() {
  return g_pending_signal;
}
void raise_pending_signal(int signal_number) {
  g_pending_signal = signal_number;
}

}  // namespace pyra
