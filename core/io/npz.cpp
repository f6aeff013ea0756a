#include "io/npz.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <charconv>
#include <limits>

#include "base/descriptor.h"
#include "base/error.h"
#include "io/zip_reader.h"

namespace pyra::io {
namespace {

constexpr std::string_view kSuffix = ".npy", kMagic("\x93NUMPY", 6);
constexpr size_t kMaxHeaderBytes = 64 << 10, kMaxRank = 8;

struct NpyDtype {
  std::string_view descr;
  uint64_t bytes;
  std::optional<at::ScalarType> type;
};
// NumPy has no bfloat16 of its own: those who add it leave raw words of two bytes behind.
constexpr NpyDtype kNpyDtypes[] = {{"<f4", 4, at::kFloat},
                                   {"<f2", 2, at::kHalf},
                                   {"<f8", 8, at::kDouble},
                                   {"|V2", 2, at::kBFloat16},
                                   {"<V2", 2, at::kBFloat16},
                                   {"|b1", 1, {}},
                                   {"|i1", 1, {}},
                                   {"|u1", 1, {}},
                                   {"<i2", 2, {}},
                                   {"<u2", 2, {}},
                                   {"<i4", 4, {}},
                                   {"<u4", 4, {}},
                                   {"<i8", 8, {}},
                                   {"<u8", 8, {}}};

/// The literal, character by character: not Python, only what NumPy writes.
class HeaderParser {
 public:
  HeaderParser(std::string_view text, const std::string& where) : text_(text), where_(where) {}

  NpyHeader parse() {
    NpyHeader header;
    bool has_descr = false, has_order = false, has_shape = false;
    expect('{');
    while (!taken('}')) {
      const std::string key = quoted();
      bool& seen = key == "descr"           ? has_descr
                   : key == "fortran_order" ? has_order
                   : key == "shape"         ? has_shape
                                            : refuse_key(key, "is not one of descr, fortran_order and shape");
      if (seen) refuse_key(key, "stands twice");
      seen = true;
      expect(':');
      if (key == "descr") header.descr = descr();
      if (key == "fortran_order") header.fortran_order = boolean();
      if (key == "shape") header.shape = shape();
      if (!taken(',')) {
        expect('}');
        break;
      }
    }
    skip_space();
    if (at_ != text_.size()) refuse("more text follows the header's dict");
    if (!has_descr || !has_order || !has_shape)
      refuse(cat("the key '", !has_descr ? "descr" : !has_order ? "fortran_order" : "shape", "' is missing"));
    return header;
  }

  [[noreturn]] void refuse(const std::string& reason) const {
    fail(ExitCode::input, where_, ": broken .npy header: ", reason);
  }

 private:
  [[noreturn]] bool& refuse_key(const std::string& key, const char* reason) const {
    refuse(cat("the key '", printable(key), "' ", reason));
  }
  void skip_space() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n')) ++at_;
  }
  bool taken(char wanted) {
    skip_space();
    if (at_ == text_.size() || text_[at_] != wanted) return false;
    ++at_;
    return true;
  }
  void expect(char wanted) {
    if (!taken(wanted)) refuse(cat("expected '", wanted, "' at character ", at_));
  }
  bool word(std::string_view wanted) {
    skip_space();
    if (!text_.substr(at_).starts_with(wanted)) return false;
    at_ += wanted.size();
    return true;
  }

  std::string quoted() {
    skip_space();
    const char quote = at_ < text_.size() ? text_[at_] : '\0';
    if (quote != '\'' && quote != '"') refuse(cat("expected a quoted word at character ", at_));
    const size_t end = text_.find(quote, at_ + 1);
    if (end == text_.npos) refuse("a quoted word does not end");
    std::string found(text_.substr(at_ + 1, end - at_ - 1));
    if (found.find('\\') != found.npos) refuse("a quoted word holds a backslash");
    at_ = end + 1;
    return found;
  }

  std::string descr() {
    skip_space();
    if (at_ < text_.size() && text_[at_] == '[') refuse("its elements are structures, expected numbers");
    return quoted();
  }

  bool boolean() {
    if (word("True")) return true;
    if (word("False")) return false;
    refuse("fortran_order is neither True nor False");
  }

  std::vector<int64_t> shape() {
    std::vector<int64_t> sizes;
    expect('(');
    while (!taken(')')) {
      skip_space();
      int64_t size = 0;
      const char* const begin = text_.data() + at_;
      const auto [end, error] = std::from_chars(begin, text_.data() + text_.size(), size);
      if (error != std::errc{} || size < 0) refuse("shape holds what is no number from 0");
      at_ += size_t(end - begin);
      if (sizes.size() == kMaxRank) refuse(cat("shape has more than ", kMaxRank, " sizes"));
      sizes.push_back(size);
      if (!taken(',')) {
        expect(')');
        break;
      }
    }
    return sizes;
  }

  std::string_view text_;
  const std::string& where_;
  size_t at_ = 0;
};

void resolve_dtype(NpyHeader& header, const HeaderParser& parser) {
  const auto* dtype = std::find_if(std::begin(kNpyDtypes), std::end(kNpyDtypes),
                                   [&](const NpyDtype& known) { return known.descr == header.descr; });
  if (dtype == std::end(kNpyDtypes)) {
    const std::string shown = printable(header.descr);
    if (header.descr.find('O') != std::string::npos)
      parser.refuse(cat("its elements are Python objects ('", shown,
                        "'), which would have to be unpickled; save it "
                        "as numbers"));
    if (header.descr.starts_with('>')) parser.refuse(cat("'", shown, "' is big-endian, expected little-endian"));
    parser.refuse(cat("elements of type '", shown, "' are not read, expected <f4, <f2, <f8 or |V2 (bfloat16)"));
  }
  header.dtype = dtype->type;
  uint64_t elements = 1;
  bool empty = false;
  for (const int64_t size : header.shape) {
    empty |= size == 0;
    if (__builtin_mul_overflow(elements, uint64_t(std::max<int64_t>(size, 1)), &elements) ||
        elements > uint64_t(std::numeric_limits<int64_t>::max()) / dtype->bytes)
      parser.refuse(cat("shape (", join(header.shape), ") is no size that can be held in memory"));
  }
  header.bytes = empty ? 0 : elements * dtype->bytes;
}

/// The header at the start of an entry, and that it fits the entry's size.
NpyHeader read_header(ZipReader& zip, uint64_t entry_bytes) {
  char magic[8] = {};
  zip.read(magic);
  if (std::string_view(magic, kMagic.size()) != kMagic)
    fail(ExitCode::input, zip.where(), ": is no .npy file: it does not open with \\x93NUMPY");
  const int version = static_cast<unsigned char>(magic[6]);
  if ((version != 1 && version != 2) || magic[7] != 0)
    fail(ExitCode::input, zip.where(), ": .npy version ", version, ".", int(static_cast<unsigned char>(magic[7])),
         ", expected 1.0 or 2.0");
  unsigned char length[4] = {};
  const size_t length_bytes = version == 1 ? 2 : 4;
  zip.read({reinterpret_cast<char*>(length), length_bytes});
  const size_t bytes = length[0] | size_t(length[1]) << 8 | size_t(length[2]) << 16 | size_t(length[3]) << 24;
  if (bytes > kMaxHeaderBytes)
    fail(ExitCode::input, zip.where(), ": its .npy header has ", bytes, " bytes, the limit is ", kMaxHeaderBytes);
  std::string text(bytes, '\0');
  zip.read(text);
  NpyHeader header = parse_npy_header(text, zip.where());
  const uint64_t data = entry_bytes - sizeof magic - length_bytes - bytes;
  if (header.bytes != data)
    fail(ExitCode::input, zip.where(), ": '", header.descr, "' (", join(header.shape), ") takes ", header.bytes,
         " bytes, but its entry holds ", data);
  return header;
}

at::Tensor read_array(ZipReader& zip, const NpyHeader& header) {
  std::vector<int64_t> shape = header.shape;
  if (header.fortran_order) std::reverse(shape.begin(), shape.end());
  at::Tensor tensor = at::empty(shape, *header.dtype);
  zip.read({static_cast<char*>(tensor.data_ptr()), header.bytes});
  zip.finish();
  if (!header.fortran_order || shape.size() < 2) return tensor;
  std::vector<int64_t> back(shape.size());
  for (size_t i = 0; i < back.size(); ++i) back[i] = int64_t(back.size() - 1 - i);
  return tensor.permute(back).contiguous();
}

ZipLimits limits_of(const std::filesystem::path& path) {
  const uint64_t size = regular_size(open_for_reading(path), path);
  return {.entries = kMaxNpzEntries, .bytes = std::min(size, kMaxNpzBytes / kMaxNpzRatio) * kMaxNpzRatio};
}

}  // namespace

NpyHeader parse_npy_header(std::string_view text, const std::string& where) {
  HeaderParser parser(text, where);
  NpyHeader header = parser.parse();
  resolve_dtype(header, parser);
  return header;
}

NpzFile::NpzFile(const std::filesystem::path& path) : path_(path) {
  ZipReader zip(path, limits_of(path));
  while (const auto entry = zip.next()) {
    if (!entry->name.ends_with(kSuffix)) fail(ExitCode::input, zip.where(), ": is no .npy file, as .npz files hold");
    const std::string name = entry->name.substr(0, entry->name.size() - kSuffix.size());
    arrays_.emplace(name, read_header(zip, entry->size));
  }
  if (arrays_.empty()) fail(ExitCode::input, path.string(), ": holds no arrays");
}

sdk::TensorMap NpzFile::read(const std::function<bool(const std::string&)>& wanted) const {
  sdk::TensorMap tensors;
  ZipReader zip(path_, limits_of(path_));
  while (const auto entry = zip.next()) {
    const std::string name = entry->name.substr(0, entry->name.size() - kSuffix.size());
    if (!wanted(name)) continue;
    const NpyHeader header = read_header(zip, entry->size);
    if (!header.dtype)
      fail(ExitCode::input, zip.where(), ": its elements are '", header.descr, "', expected <f4, <f2, <f8 or |V2");
    tensors.emplace(name, read_array(zip, header));
  }
  return tensors;
}

bool is_npz(const std::filesystem::path& path) {
  std::error_code error;
  if (!std::filesystem::is_regular_file(path, error)) return false;
  const auto first = first_zip_entry(path);
  return first && first->ends_with(kSuffix);
}

}  // namespace pyra::io
