// What surrounds a measurement: the machine, its memory peak, and a fixed piece of work that tells how fast it is.
#pragma once
#include <cstdint>
#include <memory>
#include <string>

#include "tasks/bench_report.h"

namespace pyra::tasks {

/// Everything but device, dtype and threads, which the measurement decides.
[[nodiscard]] BenchMachine describe_bench_machine();

/// Fills in what names the device: "cpu", or the GPU's name, driver, clock and memory.
void describe_device(const std::string& device, BenchMachine& machine);

/// Peak resident memory of this process since reset(), in bytes (VmHWM; /proc/self/clear_refs resets it).
class PeakMemory {
 public:
  PeakMemory();
  /// Starts a new peak where the kernel allows it; elsewhere the peak counts from the start of the process.
  void reset() const;
  [[nodiscard]] static int64_t bytes();
  /// What bytes() means here, for the report.
  [[nodiscard]] std::string meaning() const;

 private:
  bool resettable_ = false;
};

/// The control work: multiply-adds in cache and one pass over memory on every thread, code that no change of a model
/// or a kernel touches. Only the machine (clock, neighbours, temperature) changes how long it takes.
class ControlWork {
 public:
  ControlWork();
  ~ControlWork();
  /// Does it for at least `seconds`; milliseconds of one unit.
  [[nodiscard]] double measure_ms(double seconds);

 private:
  void unit();
  struct Buffers;
  std::unique_ptr<Buffers> buffers_;
};

}  // namespace pyra::tasks
