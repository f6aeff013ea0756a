// Pickles as data: a machine for the opcodes that torch.save writes, which builds values and never calls anything.
// Protocols 2 to 5 (Python's pickletools.py describes the opcodes). Nothing outside `pyractl convert` uses it.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace pyra::io {

/// The values of one pickle, in one list: they refer to each other by their places in it, so that neither nesting nor
/// sharing, however deep, costs recursion or copies.
struct Pickle {
  enum class Kind : uint8_t {
    none,
    boolean,  ///< integer is 0 or 1
    integer,  ///< that fits 64 bits
    big,      ///< an integer of more: `text` has its bytes, least significant first
    real,
    text,
    bytes,
    tuple,       ///< items
    list,        ///< items; sets too
    dict,        ///< items: key, value, key, value …; OrderedDict too
    global,      ///< `text` is "module.name"
    object,      ///< items: the global that would have been called, its arguments, its state if there is one
    persistent,  ///< items: the one value that names something outside of the pickle
  };
  using Ref = uint32_t;
  struct Value {
    Kind kind = Kind::none;
    int64_t integer = 0;
    double real = 0;
    std::string text;
    std::vector<Ref> items;
  };

  std::vector<Value> values;
  Ref root = 0;
  size_t bytes = 0;  ///< how many bytes of the text it took

  [[nodiscard]] const Value& at(Ref ref) const { return values[ref]; }
  /// The value under a text key of a dict; nullptr when it is no dict or has no such key.
  [[nodiscard]] const Value* find(const Value& dict, std::string_view key) const;
};

/// Reads one pickle from the start of `text`; what follows it is left. `allowed` answers whether a global
/// ("collections.OrderedDict") may be named. Error(input), `where` opens the text: an opcode that is not known here, by
/// name and offset, a global that is not allowed, text that is cut, values, stack, memo or nesting beyond the limits.
[[nodiscard]] Pickle parse_pickle(std::string_view text, const std::string& where,
                                  const std::function<bool(const std::string&)>& allowed);

/// Far above any checkpoint: a value is some 100 bytes here.
inline constexpr size_t kMaxPickleBytes = size_t{64} << 20, kMaxPickleValues = 2'000'000, kMaxPickleStack = 100'000,
                        kMaxPickleMarks = 1'000, kMaxPickleMemo = 2'000'000;

}  // namespace pyra::io
