// Pickles as torch.save writes them, opcode by opcode, so that a test may put any other in their place.
#pragma once
#include <string>
#include <string_view>
#include <vector>

#include "io/zip_writer.h"

namespace pyra::test::pickled {

inline std::string proto(std::string_view body) {
  return std::string("\x80\x02", 2).append(body) + ".";
}
inline std::string text(std::string_view value) {
  return "X" + little(value.size(), 4).append(value);
}
inline std::string integer(int64_t value) {
  return value == int32_t(value) ? "J" + little(uint64_t(value), 4) : "\x8a\x08" + little(uint64_t(value), 8);
}
inline std::string global(const std::string& module, const std::string& name) {
  return "c" + module + "\n" + name + "\n";
}
inline std::string tuple(const std::vector<int64_t>& numbers) {
  std::string body = "(";
  for (const int64_t number : numbers) body += integer(number);
  return body + "t";
}

/// A tensor of a storage of fp32; every number as it is to be found.
struct Tensor {
  std::string key = "0";
  int64_t elements = 4, offset = 0;
  std::vector<int64_t> size{4}, stride{1};
  std::string storage = "FloatStorage";
};

inline std::string tensor(const Tensor& t) {
  const std::string storage =
      "(" + text("storage") + global("torch", t.storage) + text(t.key) + text("cpu") + integer(t.elements) + "tQ";
  return global("torch._utils", "_rebuild_tensor_v2") + "(" + storage + integer(t.offset) + tuple(t.size) +
         tuple(t.stride) + "\x89" + global("collections", "OrderedDict") + ")RtR";
}

/// {name: value}
inline std::string dict(const std::string& name, const std::string& value) {
  return "}" + text(name) + value + "s";
}

/// torch.save's zip of this pickle and one storage.
inline std::string archive(const std::string& pickle, const std::string& storage = std::string(16, '\0')) {
  return zip_bytes({{.name = "m/data.pkl", .bytes = pickle}, {.name = "m/data/0", .bytes = storage}});
}

}  // namespace pyra::test::pickled
