#include "io/safetensors.h"

#include <bit>
#include <cstring>

#include "base/descriptor.h"
#include "base/error.h"
#include "io/atomic_file.h"
#include "io/file_kind.h"
#include "io/json.h"
#include "io/safetensors_header.h"

namespace pyra::io {
namespace {

static_assert(std::endian::native == std::endian::little, "safetensors data are little-endian and read as they are");
constexpr uint64_t kLengthBytes = 8;

[[noreturn]] void fail_kind(const Descriptor& file, const std::filesystem::path& path, uint64_t size,
                            const std::string& reason) {
  std::string first(std::min<uint64_t>(size, kKindBytes), '\0');
  read_at(file, path, 0, first);
  const std::string kind = foreign_kind(first);
  if (!kind.empty()) fail(ExitCode::input, path.string(), ": expected a safetensors file, but this is ", kind);
  fail(ExitCode::input, path.string(), ": not a safetensors file: ", reason);
}

/// The header's text, read only after its length was found to fit.
std::string header_text(const Descriptor& file, const std::filesystem::path& path, uint64_t size) {
  if (size == 0) fail(ExitCode::input, path.string(), ": the file is empty, expected a safetensors file");
  if (size < kLengthBytes) fail_kind(file, path, size, cat("it has only ", size, " bytes"));
  uint64_t length = 0;
  read_at(file, path, 0, {reinterpret_cast<char*>(&length), kLengthBytes});
  if (length > kMaxHeaderBytes) {
    fail_kind(file, path, size, cat("its header would be ", length, " bytes long, the limit is ", kMaxHeaderBytes));
  }
  const bool cut = length > size - kLengthBytes;
  std::string text(cut ? size - kLengthBytes : length, '\0');
  read_at(file, path, kLengthBytes, text);
  const size_t start = text.find_first_not_of(" \t\r\n");
  if (start == text.npos ? !cut : text[start] != '{') fail_kind(file, path, size, "its header does not open with '{'");
  if (cut) {
    fail(ExitCode::input, path.string(), ": the file is short by at least ", length - text.size(),
         " bytes: its header of ", length, " bytes is cut; was a download interrupted?");
  }
  return text;
}

std::string header_json(const std::vector<std::pair<std::string_view, at::Tensor>>& tensors, const Metadata& metadata) {
  std::string text = "{\"__metadata__\":{";
  for (const auto& [key, value] : metadata) {
    text += cat(text.back() == '{' ? "" : ",", json_quoted(key), ":", json_quoted(value));
  }
  text += "}";
  uint64_t begin = 0;
  for (const auto& [name, tensor] : tensors) {
    const uint64_t end = begin + tensor.nbytes();
    text += cat(",", json_quoted(name), ":{\"dtype\":\"", find_dtype(tensor.scalar_type())->name, "\",\"shape\":[");
    for (int64_t i = 0; i < tensor.dim(); ++i) text += cat(i ? "," : "", tensor.size(i));
    text += cat("],\"data_offsets\":[", begin, ",", end, "]}");
    begin = end;
  }
  text += "}";
  return text.append((kLengthBytes - text.size() % kLengthBytes) % kLengthBytes, ' ');
}

}  // namespace

struct SafetensorsFile::State {
  std::filesystem::path path;
  Descriptor file;
  SafetensorsHeader header;
  uint64_t data_offset = 0;
};

SafetensorsFile::SafetensorsFile(const std::filesystem::path& path) : state_(std::make_unique<State>()) {
  State& state = *state_;
  state.path = path;
  state.file = open_for_reading(path);
  const uint64_t size = regular_size(state.file, path);
  const std::string text = header_text(state.file, path, size);
  state.data_offset = kLengthBytes + text.size();
  state.header = parse_safetensors_header(text, path.string());
  const uint64_t available = size - state.data_offset, expected = state.header.data_bytes;
  if (available < expected) {
    fail(ExitCode::input, path.string(), ": the file is short by ", expected - available, " bytes: ", expected,
         " bytes of data expected, got ", available, "; was a download interrupted?");
  }
  if (available > expected) {
    fail(ExitCode::input, path.string(), ": ", available - expected, " bytes follow the last tensor; expected ",
         expected, " bytes of data, got ", available);
  }
}

SafetensorsFile::~SafetensorsFile() = default;
SafetensorsFile::SafetensorsFile(SafetensorsFile&&) noexcept = default;

const std::filesystem::path& SafetensorsFile::path() const {
  return state_->path;
}
const Metadata& SafetensorsFile::metadata() const {
  return state_->header.metadata;
}
const std::map<std::string, SafetensorsFile::Entry, std::less<>>& SafetensorsFile::entries() const {
  return state_->header.entries;
}
bool SafetensorsFile::contains(std::string_view name) const {
  return entries().contains(name);
}

at::Tensor SafetensorsFile::tensor(std::string_view name) const {
  const auto found = entries().find(name);
  if (found == entries().end()) fail(ExitCode::input, path().string(), ": has no tensor '", printable(name), "'");
  const Entry& entry = found->second;
  const SafetensorsDtype* dtype = find_dtype(entry.dtype);
  if (!dtype->type) {
    fail(ExitCode::input, path().string(), ": tensor '", printable(name), "' is ", entry.dtype,
         ", a dtype this program does not read; expected F32, F16, BF16, F64, I64, I32, I16, I8, U8 or BOOL");
  }
  at::Tensor tensor = at::empty(entry.shape, *dtype->type);
  const std::span<char> bytes{static_cast<char*>(tensor.data_ptr()), entry.end - entry.begin};
  read_at(state_->file, path(), state_->data_offset + entry.begin, bytes);
  // A bool that is neither 0 nor 1 is undefined behaviour for every later reader.
  if (dtype->type == at::kBool && std::any_of(bytes.begin(), bytes.end(), [](char byte) { return byte & ~1; })) {
    fail(ExitCode::input, path().string(), ": tensor '", printable(name),
         "' is BOOL but holds bytes other than 0 and 1");
  }
  return tensor;
}

sdk::TensorMap SafetensorsFile::tensors() const {
  sdk::TensorMap all;
  for (const auto& [name, entry] : entries()) all.emplace(name, tensor(name));
  return all;
}

at::Tensor read_fp32(const SafetensorsFile& file, const std::string& name) {
  const std::string& dtype = file.entries().find(name)->second.dtype;
  if (dtype != "F32" && dtype != "F16" && dtype != "BF16" && dtype != "F64") {
    fail(ExitCode::input, file.path().string(), ": tensor '", printable(name), "' is ", dtype,
         ", expected F32, F16, BF16 or F64");
  }
  return file.tensor(name).to(at::kFloat);
}

void write_safetensors(const std::filesystem::path& path, const sdk::TensorMap& tensors, Metadata metadata) {
  metadata["format"] = "pt";
  std::vector<std::pair<std::string_view, at::Tensor>> order;
  for (const auto& [name, tensor] : tensors) {
    if (!tensor.defined() || !find_dtype(tensor.scalar_type())) {
      fail(ExitCode::internal, path.string(), ": tensor '", name, "' is undefined or of a dtype that is not written");
    }
    order.emplace_back(name, tensor.detach().to(at::kCPU).contiguous());
  }
  // As the format asks: strongest alignment first, then by name (the map's order, kept by the stable sort).
  std::stable_sort(order.begin(), order.end(), [](const auto& a, const auto& b) {
    return find_dtype(a.second.scalar_type()) > find_dtype(b.second.scalar_type());
  });
  const std::string header = header_json(order, metadata);
  const uint64_t length = header.size();
  AtomicFile file(path);
  file.write({reinterpret_cast<const char*>(&length), kLengthBytes});
  file.write(header);
  for (const auto& [name, tensor] : order) file.write({static_cast<const char*>(tensor.data_ptr()), tensor.nbytes()});
  file.commit();
}

}  // namespace pyra::io
