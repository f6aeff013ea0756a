#include "tasks/machine.h"

#include <sched.h>
#include <sys/utsname.h>

#include <charconv>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <optional>
#include <set>
#include <string_view>
#include <thread>
#include <utility>

#include "base/error.h"
#include "engine/cuda_library.h"
#include "kernels/linear.h"
#include "sdk/plugin.h"
#include "tasks/assemble.h"

namespace pyra::tasks {
namespace {

template <class T>
std::optional<T> number(std::string_view text) {
  T value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size()) return std::nullopt;
  return value;
}

/// The value of the first line "key<spaces>: value" of /proc/cpuinfo and its like.
std::string field(const std::string& path, std::string_view key) {
  std::ifstream in(path);
  for (std::string line; std::getline(in, line);) {
    if (!line.starts_with(key)) continue;
    const size_t colon = line.find_first_of(":=");
    if (colon == std::string::npos) continue;
    const size_t begin = line.find_first_not_of(" \t\"", colon + 1);
    if (begin == std::string::npos) return {};
    return line.substr(begin, line.find_last_not_of(" \t\"") + 1 - begin);
  }
  return {};
}

std::vector<int> allowed_cpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  std::vector<int> cpus;
  if (sched_getaffinity(0, sizeof set, &set) == 0)
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
      if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
  if (cpus.empty())
    for (unsigned cpu = 0; cpu < std::max(1u, std::thread::hardware_concurrency()); ++cpu) cpus.push_back(int(cpu));
  return cpus;
}

int physical_cores(const std::vector<int>& cpus) {
  std::set<std::pair<std::string, std::string>> cores;
  for (const int cpu : cpus) {
    const std::string topology = cat("/sys/devices/system/cpu/cpu", cpu, "/topology/");
    const std::string core = first_line(topology + "core_id");
    if (core.empty()) return int(cpus.size());
    cores.emplace(first_line(topology + "physical_package_id"), core);
  }
  return int(cores.size());
}

/// Processors that the control group grants (version 2, then 1); 0 without a limit.
double cpu_quota() {
  const std::vector<std::string> v2 = split(first_line("/sys/fs/cgroup/cpu.max"), ' ');
  std::optional<double> quota, period;
  if (v2.size() == 2) {
    quota = number<double>(v2[0]);
    period = number<double>(v2[1]);
  } else {
    quota = number<double>(first_line("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"));
    period = number<double>(first_line("/sys/fs/cgroup/cpu/cpu.cfs_period_us"));
  }
  return quota && period && *quota > 0 && *period > 0 ? *quota / *period : 0;
}

uint64_t kilobytes(const char* key) {
  const std::string text = field("/proc/meminfo", key);
  return number<uint64_t>(std::string_view(text).substr(0, text.find(' '))).value_or(0) * 1024;
}

/// The control group's limit on memory, or the largest number there is.
uint64_t memory_limit() {
  for (const char* path : {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"})
    if (const auto limit = number<uint64_t>(first_line(path))) return *limit;
  return UINT64_MAX;
}

std::vector<std::string> instruction_sets() {
  const std::vector<std::string> has = split(field("/proc/cpuinfo", "flags"), ' ');
  std::vector<std::string> found;
  for (const char* name : {"avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16"})
    if (std::find(has.begin(), has.end(), name) != has.end()) found.emplace_back(name);
  return found;
}

std::string nvidia_driver() {
  // "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue ...": the first word that starts with a digit.
  for (const std::string& word : split(field("/proc/driver/nvidia/version", "NVRM version"), ' '))
    if (!word.empty() && word[0] >= '0' && word[0] <= '9') return word;
  // Without the kernel's file (WSL, some containers) the driver's library may still be there.
  for (const char* folder : {"/usr/lib/wsl/lib", "/usr/lib/x86_64-linux-gnu", "/usr/lib64"})
    if (std::filesystem::exists(cat(folder, "/libcuda.so.1")))
      return cat("of unknown version (", folder, "/libcuda.so.1)");
  return {};
}

std::string gpu_text() {
  const engine::CudaLibrary& cuda = engine::cuda_library();
  if (!cuda.available()) return cat("none: ", cuda.absent_because(), "; everything runs on the CPU");
  std::vector<std::string> names;
  for (const engine::CudaDevice& gpu : cuda.devices())
    names.push_back(cat(gpu.name, " (compute capability ", gpu.major, ".", gpu.minor, ", ", gpu.free_bytes >> 20,
                        " of ", gpu.memory_bytes >> 20, " MB free)"));
  return cat(join(names), ": inference and training run there");
}

int default_threads() {
  const int cores = physical_cores(allowed_cpus());
  const double quota = cpu_quota();
  return quota > 0 ? std::clamp(int(std::ceil(quota)), 1, cores) : cores;
}

}  // namespace

std::string first_line(const std::string& path) {
  std::ifstream in(path);
  std::string line;
  std::getline(in, line);
  return line;
}

Machine describe_machine() {
  const std::vector<int> cpus = allowed_cpus();
  utsname kernel{};
  uname(&kernel);
  Machine machine{
      .system =
          cat(field("/etc/os-release", "PRETTY_NAME"), ", ", kernel.sysname, " ", kernel.release, " ", kernel.machine),
      .cpu = field("/proc/cpuinfo", "model name"),
      .logical_cpus = int(cpus.size()),
      .physical_cores = physical_cores(cpus),
      .cpu_quota = cpu_quota(),
      .isa = instruction_sets(),
      .micro_kernel = kernels::cpu_micro_kernel(),
      .bf16 = compute_dtype("auto") == at::kBFloat16,
      .threads = at::get_num_threads(),
      .memory_bytes = std::min(kilobytes("MemTotal"), memory_limit()),
      .memory_available_bytes = kilobytes("MemAvailable"),
      .nvidia_driver = nvidia_driver(),
      .gpu = gpu_text(),
  };
  machine.memory_available_bytes = std::min(machine.memory_available_bytes, machine.memory_bytes);
  return machine;
}

std::string processor_name(const std::string& device) {
  if (device == "cpu") return field("/proc/cpuinfo", "model name");
  const size_t number = size_t(std::atoi(device.c_str() + device.find(':') + 1));
  return engine::cuda_library().devices().at(number).name;
}

std::string version() {
  return PYRA_VERSION;
}

std::string libtorch_version() {
  return TORCH_VERSION;
}

std::string version_text() {
  return cat("pyractl ", version(), "\nplugins: ", PYRA_ABI_TAG, "\nLibTorch ", libtorch_version());
}

void set_threads(int threads) {
  if (threads <= 0) {
    threads = default_threads();
    for (const char* variable : {"PYRA_THREADS", "OMP_NUM_THREADS"}) {
      const char* text = std::getenv(variable);
      if (!text || !*text) continue;
      // OMP_NUM_THREADS may be a list, one number for each level of nesting.
      const auto given = number<int>(std::string_view(text).substr(0, std::string_view(text).find(',')));
      if (!given || *given < 1 || *given > 4096)
        fail(ExitCode::usage, variable, " is '", text, "', expected a number of threads from 1 to 4096");
      threads = *given;
      break;
    }
  }
  at::set_num_threads(threads);
}

}  // namespace pyra::tasks
