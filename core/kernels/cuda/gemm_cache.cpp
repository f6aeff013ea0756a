#include "kernels/cuda/gemm_cache.h"

#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <sstream>

#include "base/text.h"

namespace pyra::kernels::cuda {
namespace {

namespace fs = std::filesystem;

constexpr uintmax_t kMaxFile = 4 << 20;
constexpr size_t kMaxEntries = 16384;

/// A line is `version TAB shape TAB eight hexadecimal words`.
std::optional<AlgorithmWords> parse_words(const std::string& text) {
  std::istringstream in(text);
  AlgorithmWords words{};
  for (uint64_t& word : words)
    if (!(in >> std::hex >> word)) return std::nullopt;
  return words;
}

std::string hex_words(const AlgorithmWords& words) {
  std::ostringstream out;
  for (const uint64_t word : words) out << std::hex << word << ' ';
  return out.str();
}

}  // namespace

GemmCache::GemmCache(fs::path file, std::string version) : file_(std::move(file)), version_(std::move(version)) {
  if (!file_.empty()) entries_ = read(file_);
}

GemmCache::Entries GemmCache::read(const fs::path& file) {
  Entries entries;
  std::error_code error;
  if (fs::file_size(file, error) > kMaxFile || error) return entries;
  std::ifstream in(file);
  for (std::string line; std::getline(in, line) && entries.size() < kMaxEntries;) {
    const std::vector<std::string> fields = split(line, '\t');
    if (fields.size() != 3 || fields[0].empty() || fields[1].empty()) continue;
    if (const auto words = parse_words(fields[2])) entries[{fields[0], fields[1]}] = *words;
  }
  return entries;
}

std::shared_ptr<GemmCache> GemmCache::shared(const fs::path& file, const std::string& version) {
  static std::mutex mutex;
  static std::map<std::pair<std::string, std::string>, std::shared_ptr<GemmCache>> caches;
  const std::lock_guard lock(mutex);
  auto& cache = caches[{file.string(), version}];
  if (!cache) cache = std::make_shared<GemmCache>(file, version);
  return cache;
}

std::optional<AlgorithmWords> GemmCache::find(const std::string& shape) const {
  const std::lock_guard lock(mutex_);
  const auto found = entries_.find({version_, shape});
  if (found == entries_.end()) return std::nullopt;
  return found->second;
}

void GemmCache::add(const std::string& shape, const AlgorithmWords& words) {
  const std::lock_guard lock(mutex_);
  entries_[{version_, shape}] = words;
  changed_ = true;
}

void GemmCache::save() {
  const std::lock_guard lock(mutex_);
  if (file_.empty() || !changed_) return;
  Entries all = read(file_);
  all.insert(entries_.begin(), entries_.end());
  std::error_code error;
  fs::create_directories(file_.parent_path(), error);
  const fs::path fresh = cat(file_.string(), ".tmp-", getpid());
  {
    std::ofstream out(fresh);
    for (const auto& [key, words] : all) out << key.first << '\t' << key.second << '\t' << hex_words(words) << '\n';
    if (!out.flush()) return void(fs::remove(fresh, error));
  }
  fs::rename(fresh, file_, error);
  if (error) fs::remove(fresh, error);
  changed_ = false;
}

fs::path GemmCache::default_file() {
  const char* own = std::getenv("PYRA_CACHE_DIR");
  if (own) return *own ? fs::path(own) / "gemm.tsv" : fs::path();
  if (const char* xdg = std::getenv("XDG_CACHE_HOME"); xdg && *xdg) return fs::path(xdg) / "pyra" / "gemm.tsv";
  if (const char* home = std::getenv("HOME"); home && *home) return fs::path(home) / ".cache" / "pyra" / "gemm.tsv";
  return {};
}

}  // namespace pyra::kernels::cuda
