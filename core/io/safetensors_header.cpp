#include "io/safetensors_header.h"

#include <limits>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "io/json.h"

namespace pyra::io {
namespace {

using Entry = SafetensorsFile::Entry;

// In the format's order: writers put the strongest alignment first, that is, this list backwards.
const SafetensorsDtype kDtypes[] = {
    {"BOOL", 8, at::kBool},
    {"F4", 4, {}},
    {"F6_E2M3", 6, {}},
    {"F6_E3M2", 6, {}},
    {"U8", 8, at::kByte},
    {"I8", 8, at::kChar},
    {"F8_E5M2", 8, {}},
    {"F8_E4M3", 8, {}},
    {"F8_E8M0", 8, {}},
    {"F8_E4M3FNUZ", 8, {}},
    {"F8_E5M2FNUZ", 8, {}},
    {"I16", 16, at::kShort},
    {"U16", 16, {}},
    {"F16", 16, at::kHalf},
    {"BF16", 16, at::kBFloat16},
    {"I32", 32, at::kInt},
    {"U32", 32, {}},
    {"F32", 32, at::kFloat},
    {"C64", 64, {}},
    {"F64", 64, at::kDouble},
    {"I64", 64, at::kLong},
    {"U64", 64, {}},
};

/// What the parser is inside of; the format has four levels and no others.
enum class Place {
  before,
  root,
  metadata,
  metadata_value,
  name,
  entry,
  dtype,
  shape_open,
  shape,
  offsets_open,
  offsets,
  after
};

/// Builds the header as the JSON is read, and stops at the first thing that does not belong: a hostile file
/// never becomes a tree in memory.
class HeaderReader {
 public:
  HeaderReader(const std::string& where, SafetensorsHeader& header) : where_(where), header_(header) {}

  bool key(std::string& text) {
    switch (place_) {
      case Place::root:
        return begin_name(text);
      case Place::metadata:
        return begin_metadata(text);
      case Place::entry:
        return begin_field(text);
      default:
        return unexpected("a key");
    }
  }

  bool string(std::string& text) {
    if (place_ == Place::metadata_value) {
      header_.metadata.at(name_) = std::move(text);
      place_ = Place::metadata;
      return true;
    }
    if (place_ != Place::dtype) return unexpected("a string");
    if (!find_dtype(text)) refuse(cat("tensor '", printable(name_), "': unknown dtype '", printable(text), "'"));
    entry_.dtype = std::move(text);
    place_ = Place::entry;
    return true;
  }

  bool number_unsigned(uint64_t value) {
    if (place_ == Place::shape) {
      if (entry_.shape.size() == kMaxRank)
        refuse(cat("tensor '", printable(name_), "': more than ", kMaxRank, " dimensions"));
      if (value > uint64_t(std::numeric_limits<int64_t>::max())) {
        refuse(cat("tensor '", printable(name_), "': dimension ", value, " is too large"));
      }
      entry_.shape.push_back(int64_t(value));
      return true;
    }
    if (place_ != Place::offsets) return unexpected("a number");
    if (offsets_ == 2) refuse(cat("tensor '", printable(name_), "': data_offsets has more than two numbers"));
    (offsets_++ == 0 ? entry_.begin : entry_.end) = value;
    return true;
  }

  bool start_object(size_t) {
    if (place_ == Place::before) return go(Place::root);
    if (place_ != Place::name) return unexpected("an object");
    return go(name_ == kMetadataKey ? Place::metadata : Place::entry);
  }

  bool end_object() {
    if (place_ == Place::root) return go(Place::after);
    if (place_ == Place::entry) finish_entry();
    return go(Place::root);
  }

  bool start_array(size_t) {
    if (place_ == Place::shape_open) return go(Place::shape);
    if (place_ == Place::offsets_open) return go(Place::offsets);
    return unexpected("an array");
  }

  bool end_array() {
    if (place_ == Place::offsets && offsets_ != 2) {
      refuse(cat("tensor '", printable(name_), "': data_offsets has ", offsets_, " numbers, expected 2"));
    }
    return go(Place::entry);
  }

  bool number_integer(int64_t value) { return unexpected(cat("the negative number ", value)); }
  bool number_float(double, const std::string& text) {
    return unexpected(cat("the number ", printable(text), ", which is no integer of 64 bits"));
  }
  bool null() { return unexpected("null"); }
  bool boolean(bool) { return unexpected("a boolean"); }
  bool binary(std::vector<uint8_t>&) { return unexpected("binary data"); }
  bool parse_error(size_t, const std::string&, const nlohmann::json::exception& error) {
    refuse(cat("not valid JSON: ", json_reason(error)));
  }

 private:
  static constexpr std::string_view kMetadataKey = "__metadata__";
  enum Field : unsigned { kDtype = 1, kShape = 2, kOffsets = 4, kAllFields = 7 };

  bool go(Place place) {
    place_ = place;
    return true;
  }

  bool begin_name(std::string& text) {
    if (header_.entries.size() == kMaxEntries) refuse(cat("more than ", kMaxEntries, " tensors"));
    const bool repeated = text == kMetadataKey ? std::exchange(has_metadata_, true) : header_.entries.contains(text);
    if (repeated) refuse(cat("the name '", printable(text), "' stands twice"));
    name_ = std::move(text);
    entry_ = {};
    fields_ = 0;
    offsets_ = 0;
    return go(Place::name);
  }

  bool begin_metadata(std::string& text) {
    if (header_.metadata.size() == kMaxEntries) refuse(cat("more than ", kMaxEntries, " metadata entries"));
    if (!header_.metadata.emplace(text, "").second)
      refuse(cat("the metadata key '", printable(text), "' stands twice"));
    name_ = std::move(text);
    return go(Place::metadata_value);
  }

  bool begin_field(const std::string& text) {
    if (text == "dtype") return begin_field(text, kDtype, Place::dtype);
    if (text == "shape") return begin_field(text, kShape, Place::shape_open);
    if (text == "data_offsets") return begin_field(text, kOffsets, Place::offsets_open);
    refuse(cat("tensor '", printable(name_), "': unknown field '", printable(text), "'"));
  }

  bool begin_field(const std::string& text, Field field, Place place) {
    if (fields_ & field) refuse(cat("tensor '", printable(name_), "': the field '", text, "' stands twice"));
    fields_ |= field;
    return go(place);
  }

  void finish_entry() {
    if (fields_ != kAllFields) {
      refuse(cat("tensor '", printable(name_), "': no ",
                 !(fields_ & kDtype)   ? "dtype"
                 : !(fields_ & kShape) ? "shape"
                                       : "data_offsets"));
    }
    header_.entries.emplace(std::move(name_), std::move(entry_));
  }

  bool unexpected(const std::string& what) {
    switch (place_) {
      case Place::before:
        refuse(cat("the header is ", what, ", expected an object"));
      case Place::name:
        refuse(cat("'", printable(name_), "' is ", what, ", expected an object"));
      case Place::metadata_value:
        refuse(cat("metadata '", printable(name_), "' is ", what, ", expected a string"));
      case Place::dtype:
        refuse(cat("tensor '", printable(name_), "': dtype is ", what, ", expected a string"));
      case Place::shape_open:
      case Place::offsets_open:
        refuse(cat("tensor '", printable(name_), "': ", field_name(), " is ", what, ", expected an array"));
      default:
        refuse(cat("tensor '", printable(name_), "': ", field_name(), " holds ", what, ", expected integers from 0"));
    }
  }

  [[nodiscard]] std::string_view field_name() const {
    return place_ == Place::shape_open || place_ == Place::shape ? "shape" : "data_offsets";
  }

  [[noreturn]] void refuse(const std::string& reason) const {
    fail(ExitCode::input, where_, ": broken safetensors header: ", reason);
  }

  const std::string& where_;
  SafetensorsHeader& header_;
  Place place_ = Place::before;
  std::string name_;
  Entry entry_;
  unsigned fields_ = 0;
  int offsets_ = 0;
  bool has_metadata_ = false;
};

/// Bytes of shape x dtype; nothing when they overflow or are no whole number. Zeros do not hide an overflow:
/// LibTorch multiplies strides.
std::optional<uint64_t> byte_count(const Entry& entry) {
  uint64_t elements = 1;
  bool empty = false;
  for (const int64_t size : entry.shape) {
    empty |= size == 0;
    if (__builtin_mul_overflow(elements, uint64_t(std::max<int64_t>(size, 1)), &elements)) return {};
  }
  uint64_t bits = 0;
  if (elements > uint64_t(std::numeric_limits<int64_t>::max()) ||
      __builtin_mul_overflow(elements, find_dtype(entry.dtype)->bits, &bits) || bits % 8 != 0) {
    return {};
  }
  return empty ? 0 : bits / 8;
}

[[noreturn]] void fail_tensor(const std::string& where, const std::string& name, const std::string& reason) {
  fail(ExitCode::input, where, ": tensor '", printable(name), "': ", reason);
}

void check_size(const std::string& name, const Entry& entry, const std::string& where) {
  if (entry.begin > entry.end) {
    fail_tensor(where, name, cat("data_offsets [", entry.begin, ", ", entry.end, ") run backwards"));
  }
  const auto bytes = byte_count(entry);
  const std::string described = cat(entry.dtype, " [", join(entry.shape), "]");
  if (!bytes) fail_tensor(where, name, cat(described, " is no size that can be held in memory"));
  if (*bytes != entry.end - entry.begin) {
    fail_tensor(where, name,
                cat(described, " takes ", *bytes, " bytes, but data_offsets [", entry.begin, ", ", entry.end, ") hold ",
                    entry.end - entry.begin));
  }
}

/// The entries must follow each other from 0 without hole or overlap; returns where they end.
uint64_t check_layout(const Entries& entries, const std::string& where) {
  std::vector<const Entries::value_type*> order;
  for (const auto& item : entries) order.push_back(&item);
  std::sort(order.begin(), order.end(), [](auto* a, auto* b) {
    return std::tie(a->second.begin, a->second.end) < std::tie(b->second.begin, b->second.end);
  });
  uint64_t expected = 0;
  for (const auto* item : order) {
    const auto& [name, entry] = *item;
    check_size(name, entry, where);
    if (entry.begin != expected) {
      fail_tensor(where, name,
                  cat("its data begin at ", entry.begin, ", expected ", expected,
                      entry.begin > expected ? ": a hole in the file" : ": it overlaps the one before"));
    }
    expected = entry.end;
  }
  return expected;
}

}  // namespace

const SafetensorsDtype* find_dtype(std::string_view name) {
  const auto* found =
      std::find_if(std::begin(kDtypes), std::end(kDtypes), [&](auto& dtype) { return dtype.name == name; });
  return found == std::end(kDtypes) ? nullptr : found;
}

const SafetensorsDtype* find_dtype(at::ScalarType type) {
  const auto* found =
      std::find_if(std::begin(kDtypes), std::end(kDtypes), [&](auto& dtype) { return dtype.type == type; });
  return found == std::end(kDtypes) ? nullptr : found;
}

SafetensorsHeader parse_safetensors_header(std::string_view text, const std::string& where) {
  SafetensorsHeader header;
  // The JSON library takes a NUL for the end of its input, and skips a byte order mark that the format forbids.
  if (const size_t at = text.find('\0'); at != text.npos) {
    fail(ExitCode::input, where, ": broken safetensors header: NUL byte at offset ", at);
  }
  if (text.substr(0, 3) == "\xEF\xBB\xBF") {
    fail(ExitCode::input, where, ": broken safetensors header: it opens with a byte order mark");
  }
  HeaderReader reader(where, header);
  nlohmann::json::sax_parse(text, &reader);
  header.data_bytes = check_layout(header.entries, where);
  return header;
}

}  // namespace pyra::io
