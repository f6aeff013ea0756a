#include "io/torch_file.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <set>

#include "base/descriptor.h"
#include "base/error.h"
#include "io/npz.h"
#include "io/pickle.h"
#include "io/torch_state.h"
#include "io/zip_reader.h"

namespace pyra::io {
namespace {

namespace fs = std::filesystem;

constexpr size_t kMaxEntries = 100'000;
// torch.serialization.MAGIC_NUMBER and PROTOCOL_VERSION, little-endian.
constexpr std::string_view kLegacyMagic("\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19", 10);
constexpr int64_t kLegacyProtocol = 1001;
constexpr size_t kLegacyPrefixBytes = 14;  // PROTO, version, LONG1, 10, and the magic number

using Storages = std::map<std::string, at::Tensor, std::less<>>;

/// A file's tensors cannot have many more elements than the file has bytes: only sharing brings them there.
void check_amount(const TorchState& state, uint64_t file_bytes, const std::string& where) {
  if (uint64_t(state.elements) > file_bytes)
    fail(ExitCode::input, where, ": its tensors have ", state.elements,
         " elements together, more than the file has bytes (", file_bytes,
         "): they share their storages over and over");
}

std::set<std::string> used_storages(const TorchState& state) {
  std::set<std::string> used;
  for (const auto& [name, tensor] : state.tensors) used.insert(tensor.storage);
  return used;
}

sdk::TensorMap views(const TorchState& state, const Storages& storages) {
  sdk::TensorMap tensors;
  for (const auto& [name, tensor] : state.tensors) {
    const at::Tensor& storage = storages.find(tensor.storage)->second;
    tensors.emplace(name, at::as_strided(storage, tensor.shape, tensor.strides, tensor.offset));
  }
  return tensors;
}

std::span<char> bytes_of(const at::Tensor& tensor) {
  return {static_cast<char*>(tensor.data_ptr()), tensor.nbytes()};
}

// The zip archives ---------------------------------------------------------------------------------------------------

/// The archive's folder, its pickle, and the sizes of what lies in data/.
struct ZipIndex {
  std::string folder, pickle;
  std::map<std::string, uint64_t, std::less<>> sizes;
};

ZipReader open_zip(const fs::path& path, uint64_t file_bytes) {
  // torch.save compresses nothing, so all entries together are smaller than the file.
  return {path, {.entries = kMaxEntries, .bytes = file_bytes}};
}

ZipIndex read_index(const fs::path& path, uint64_t file_bytes) {
  constexpr std::string_view kPickle = "/data.pkl", kOrder = "/byteorder";
  ZipIndex index;
  ZipReader zip = open_zip(path, file_bytes);
  while (const auto entry = zip.next()) {
    const size_t slash = entry->name.find('/');
    if (slash == entry->name.npos) continue;
    const std::string_view rest = std::string_view(entry->name).substr(slash);
    if (rest == kPickle) {
      if (!index.folder.empty()) fail(ExitCode::input, path.string(), ": holds two pickles, expected one data.pkl");
      if (entry->size > kMaxPickleBytes)
        fail(ExitCode::input, zip.where(), ": ", entry->size, " bytes, the limit is ", kMaxPickleBytes);
      index.folder = entry->name.substr(0, slash);
      index.pickle = zip.read_all();
    } else if (rest == kOrder) {
      if (entry->size > 16 || zip.read_all() != "little")
        fail(ExitCode::input, zip.where(), ": the file's numbers are not little-endian");
    } else {
      index.sizes.emplace(entry->name, entry->size);
    }
  }
  if (index.folder.empty())
    fail(ExitCode::input, path.string(), ": a zip archive without a data.pkl: torch.save has not written it");
  return index;
}

TorchCheckpoint read_zip(const fs::path& path, uint64_t file_bytes) {
  const ZipIndex index = read_index(path, file_bytes);
  const std::string where = cat(path.string(), ": ", printable(index.folder), "/data.pkl");
  const TorchState state = read_torch_state(parse_pickle(index.pickle, where, allowed_torch_global), where);
  check_amount(state, file_bytes, path.string());
  const std::string data = index.folder + "/data/";
  for (const auto& [key, storage] : state.storages) {
    const auto found = index.sizes.find(data + key);
    if (found == index.sizes.end())
      fail(ExitCode::input, path.string(), ": has no entry '", printable(data + key), "' for a storage of ",
           storage.bytes(), " bytes");
    if (found->second != storage.bytes())
      fail(ExitCode::input, path.string(), ": entry '", printable(data + key), "' has ", found->second,
           " bytes, but its storage is declared as ", storage.elements, " x ", c10::elementSize(storage.dtype), " = ",
           storage.bytes());
  }
  const std::set<std::string> used = used_storages(state);
  Storages storages;
  ZipReader zip = open_zip(path, file_bytes);
  while (const auto entry = zip.next()) {
    if (!entry->name.starts_with(data)) continue;
    const std::string key = entry->name.substr(data.size());
    if (!used.contains(key)) continue;
    const TorchStorage& declared = state.storages.find(key)->second;
    const at::Tensor storage = at::empty({declared.elements}, declared.dtype);
    zip.read(bytes_of(storage));
    zip.finish();
    storages.emplace(key, storage);
  }
  for (const std::string& key : used)
    if (!storages.contains(key)) fail(ExitCode::input, path.string(), ": changed while it was read");
  return {.tensors = views(state, storages), .key = state.key, .arch = state.arch, .container = "zip"};
}

// Before torch 1.6: five pickles one after another, then the storages ----------------------------------------------

struct LegacyFile {
  TorchState state;
  std::vector<std::string> keys;  ///< of the storages, as they follow
  uint64_t data = 0;              ///< where the first begins
};

LegacyFile read_legacy_head(const std::string& text, const std::string& where) {
  size_t at = 0;
  const auto next = [&](const char* what) {
    Pickle pickle = parse_pickle(std::string_view(text).substr(at), cat(where, ": ", what), allowed_torch_global);
    at += pickle.bytes;
    return pickle;
  };
  const Pickle magic = next("magic number");
  if (magic.at(magic.root).text != kLegacyMagic)
    fail(ExitCode::input, where,
         ": a pickle, but not one that torch.save wrote: it does not open with its magic number");
  const Pickle protocol = next("protocol version");
  if (protocol.at(protocol.root).integer != kLegacyProtocol)
    fail(ExitCode::input, where, ": protocol version ", protocol.at(protocol.root).integer, " of torch.save, expected ",
         kLegacyProtocol);
  const Pickle system = next("system");
  const Pickle::Value* little = system.find(system.at(system.root), "little_endian");
  if (!little || little->kind != Pickle::Kind::boolean || little->integer != 1)
    fail(ExitCode::input, where, ": the file's numbers are not little-endian");
  LegacyFile file;
  file.state = read_torch_state(next("pickle"), where);
  const Pickle keys = next("list of storages");
  const Pickle::Value& list = keys.at(keys.root);
  std::set<std::string> seen;
  for (const Pickle::Ref item : list.items) {
    const std::string& key = keys.at(item).text;
    if (list.kind != Pickle::Kind::list || !file.state.storages.contains(key) || !seen.insert(key).second)
      fail(ExitCode::input, where, ": its list of storages names '", printable(key),
           "', which no tensor has, or twice");
    file.keys.push_back(key);
  }
  if (file.keys.size() != file.state.storages.size())
    fail(ExitCode::input, where, ": lists ", file.keys.size(), " storages, but its tensors have ",
         file.state.storages.size());
  file.data = at;
  return file;
}

TorchCheckpoint read_legacy(const fs::path& path, uint64_t file_bytes) {
  const Descriptor input = open_for_reading(path);
  const std::string where = path.string();
  std::string text(std::min<uint64_t>(file_bytes, kMaxPickleBytes), '\0');
  read_at(input, path, 0, text);
  const LegacyFile file = read_legacy_head(text, where);
  check_amount(file.state, file_bytes, where);
  const std::set<std::string> used = used_storages(file.state);
  Storages storages;
  uint64_t at = file.data;
  for (const std::string& key : file.keys) {
    const TorchStorage& declared = file.state.storages.find(key)->second;
    int64_t elements = 0;
    if (file_bytes - at < sizeof elements || declared.bytes() > file_bytes - at - sizeof elements)
      fail(ExitCode::input, where, ": storage '", printable(key), "' of ", declared.bytes(),
           " bytes goes beyond the end of the file; was a download interrupted?");
    read_at(input, path, at, {reinterpret_cast<char*>(&elements), sizeof elements});
    if (elements != declared.elements)
      fail(ExitCode::input, where, ": storage '", printable(key), "' has ", elements, " elements, declared are ",
           declared.elements);
    at += sizeof elements;
    if (used.contains(key)) {
      const at::Tensor storage = at::empty({declared.elements}, declared.dtype);
      read_at(input, path, at, bytes_of(storage));
      storages.emplace(key, storage);
    }
    at += declared.bytes();
  }
  return {
      .tensors = views(file.state, storages), .key = file.state.key, .arch = file.state.arch, .container = "legacy"};
}

bool is_legacy(const fs::path& path) {
  std::error_code error;
  if (!fs::is_regular_file(path, error) || fs::file_size(path, error) < kLegacyPrefixBytes) return false;
  char first[kLegacyPrefixBytes] = {};
  read_at(open_for_reading(path), path, 0, first);
  return first[0] == '\x80' && std::string_view(first, sizeof first).ends_with(kLegacyMagic);
}

}  // namespace

bool is_torch_file(const fs::path& path) {
  std::error_code error;
  if (!fs::is_regular_file(path, error)) return false;
  return (is_zip(path) && !is_npz(path)) || is_legacy(path);
}

TorchCheckpoint read_torch_file(const fs::path& path) {
  const uint64_t file_bytes = regular_size(open_for_reading(path), path);
  return is_legacy(path) ? read_legacy(path, file_bytes) : read_zip(path, file_bytes);
}

}  // namespace pyra::io
