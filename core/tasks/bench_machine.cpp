#include "tasks/bench_machine.h"

#include <ATen/Parallel.h>
#include <malloc.h>
#include <unistd.h>

#include <charconv>
#include <chrono>
#include <cstdlib>
#include <ctime>
#include <filesystem>
#include <fstream>

#include "base/text.h"
#include "engine/cuda_library.h"
#include "tasks/machine.h"

namespace pyra::tasks {
namespace {

namespace fs = std::filesystem;

// The number after "key<spaces>:" of a /proc file, 0 when there is none.
double proc_number(const char* path, std::string_view key) {
  std::ifstream in(path);
  for (std::string line; std::getline(in, line);)
    if (line.starts_with(key)) return std::strtod(line.c_str() + line.find(':') + 1, nullptr);
  return 0;
}

// RFC 3339, as Google Benchmark writes it: strftime's +0100 gets its colon.
std::string now_text() {
  const std::time_t now = std::time(nullptr);
  std::tm local{};
  localtime_r(&now, &local);
  char text[40];
  std::string date(text, std::strftime(text, sizeof text, "%FT%T%z", &local));
  if (date.size() > 2) date.insert(date.size() - 2, ":");
  return date;
}

std::string host_name() {
  char name[256] = {};
  return gethostname(name, sizeof name - 1) == 0 ? name : "";
}

bool cpu_scaling_enabled(int64_t cpus) {
  for (int64_t cpu = 0; cpu < cpus; ++cpu) {
    const std::string governor = first_line(cat("/sys/devices/system/cpu/cpu", cpu, "/cpufreq/scaling_governor"));
    if (!governor.empty() && governor != "performance") return true;
  }
  return false;
}

// "0-3,8" names five processors.
int64_t count_list(const std::string& text) {
  int64_t count = 0;
  for (const std::string& range : split(text, ',')) {
    const size_t dash = range.find('-');
    const int64_t first = std::atoll(range.c_str());
    count += dash == std::string::npos ? 1 : std::atoll(range.c_str() + dash + 1) - first + 1;
  }
  return count;
}

std::vector<CpuCache> cpu_caches() {
  std::vector<CpuCache> caches;
  for (int index = 0;; ++index) {
    const fs::path folder = cat("/sys/devices/system/cpu/cpu0/cache/index", index);
    const std::string size = first_line((folder / "size").string());  // "32K", "8M"
    if (size.empty()) return caches;
    const int64_t unit = size.back() == 'K' ? 1 << 10 : size.back() == 'M' ? 1 << 20 : 1;
    caches.push_back({.type = first_line((folder / "type").string()),
                      .level = std::atoll(first_line((folder / "level").string()).c_str()),
                      .size = std::atoll(size.c_str()) * unit,
                      .num_sharing = count_list(first_line((folder / "shared_cpu_list").string()))});
  }
}

std::vector<double> load_average() {
  double load[3] = {};
  const int found = getloadavg(load, 3);
  return {load, load + std::max(found, 0)};
}

}  // namespace

BenchMachine describe_bench_machine() {
  const Machine machine = describe_machine();
  BenchMachine m;
  m.date = now_text();
  m.host_name = host_name();
  std::error_code unknown;
  m.executable = fs::read_symlink("/proc/self/exe", unknown).string();
  m.num_cpus = machine.logical_cpus;
  m.mhz_per_cpu = proc_number("/proc/cpuinfo", "cpu MHz");
  m.cpu_scaling_enabled = cpu_scaling_enabled(sysconf(_SC_NPROCESSORS_CONF));
  m.caches = cpu_caches();
  m.load_avg = load_average();
#ifdef NDEBUG
  m.library_build_type = "release";
#else
  m.library_build_type = "debug";
#endif
  m.cpu_model = machine.cpu;
  m.micro_kernel = machine.micro_kernel;
  m.commit = PYRA_COMMIT;
  m.libtorch_version = libtorch_version();
  m.pyractl_version = version();
  return m;
}

void describe_device(const std::string& device, BenchMachine& machine) {
  if (device == "cpu") return;
  const auto devices = engine::cuda_library().devices();
  const engine::CudaDevice& gpu = devices.at(size_t(std::atoi(device.c_str() + device.find(':') + 1)));
  machine.device = gpu.name;
  machine.driver = cat(describe_machine().nvidia_driver, ", CUDA ", gpu.driver);
  machine.gpu_clock_mhz = gpu.clock_mhz;
  machine.gpu_memory_bytes = gpu.memory_bytes;
}

PeakMemory::PeakMemory() {
  std::ofstream file("/proc/self/clear_refs");
  resettable_ = bool(file << "5" << std::flush);
}

void PeakMemory::reset() const {
  // Freed memory that the heap keeps would count as the next peak.
  malloc_trim(0);
  if (resettable_) std::ofstream("/proc/self/clear_refs") << "5";
}

int64_t PeakMemory::bytes() {
  return int64_t(proc_number("/proc/self/status", "VmHWM")) * 1024;
}

std::string PeakMemory::meaning() const {
  return resettable_ ? "peak resident memory of the process (VmHWM) while the row warms up, all models loaded"
                     : "peak resident memory of the process (VmHWM) since its start, all models loaded";
}

struct ControlWork::Buffers {
  static constexpr int64_t kInCache = 1 << 12;   // floats: 16 KiB, within any first-level cache
  static constexpr int64_t kInMemory = 1 << 21;  // floats: 8 MiB, beyond a core's own caches
  std::vector<std::vector<float>> cache, memory;
};

ControlWork::ControlWork() : buffers_(std::make_unique<Buffers>()) {
  const size_t threads = size_t(at::get_num_threads());
  buffers_->cache.assign(threads, std::vector<float>(Buffers::kInCache, 0.5f));
  buffers_->memory.assign(threads, std::vector<float>(Buffers::kInMemory, 0.5f));
}

ControlWork::~ControlWork() = default;

void ControlWork::unit() {
  constexpr int kPasses = 1024;
  at::parallel_for(0, int64_t(buffers_->cache.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      // Values tend to 1 and stay there, so neither overflow nor denormals change the speed.
      for (int pass = 0; pass < kPasses; ++pass)
        for (float& x : buffers_->cache[size_t(thread)]) x = x * 0.75f + 0.25f;
      for (float& x : buffers_->memory[size_t(thread)]) x = x * 0.75f + 0.25f;
    }
  });
}

double ControlWork::measure_ms(double seconds) {
  using Clock = std::chrono::steady_clock;
  unit();  // brings the buffers and the clock back after whatever ran before
  const auto start = Clock::now();
  int64_t units = 0;
  std::chrono::duration<double> passed{};
  do {
    unit();
    ++units;
    passed = Clock::now() - start;
  } while (passed.count() < seconds);
  return passed.count() * 1e3 / double(units);
}

}  // namespace pyra::tasks
