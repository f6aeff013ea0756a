// What this machine is and offers: for `doctor`, the context of benchmarks, and the number of threads.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace pyra::tasks {

struct Machine {
  std::string system;            ///< distribution and kernel
  std::string cpu;               ///< the processor's own name
  int logical_cpus = 0;          ///< that this process may run on
  int physical_cores = 0;        ///< behind them
  double cpu_quota = 0;          ///< processors that the control group allows; 0: no limit
  std::vector<std::string> isa;  ///< of "avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16"; those the kernels may use
  std::string micro_kernel;      ///< kernels::cpu_micro_kernel()
  bool bf16 = false;             ///< faster than fp32 here: what --dtype auto asks for
  int threads = 0;               ///< in use now
  uint64_t memory_bytes = 0;     ///< of the machine or its control group, whichever is less
  uint64_t memory_available_bytes = 0;
  std::string nvidia_driver;  ///< its version, or "" where no driver answers
  std::string gpu;            ///< the GPUs that can be used, or why there is none
};

[[nodiscard]] Machine describe_machine();
/// The name of what computes on a resolved device ("cpu", "cuda:0"): the CPU's or the GPU's own.
[[nodiscard]] std::string processor_name(const std::string& device);

/// What this build is: "pyractl 0.1.0" and, a line each, the SDK's tag and LibTorch's version.
[[nodiscard]] std::string version_text();
[[nodiscard]] std::string version();
[[nodiscard]] std::string libtorch_version();

/// Threads for LibTorch and the kernels: `threads` when positive, else $PYRA_THREADS, else $OMP_NUM_THREADS, else
/// the physical cores this process may use, as far as its control group lets it. Error(usage) when the variable is no
/// number from 1 to 4096.
void set_threads(int threads);

/// Of a file of /proc or /sys; "" where there is none.
[[nodiscard]] std::string first_line(const std::string& path);

}  // namespace pyra::tasks
