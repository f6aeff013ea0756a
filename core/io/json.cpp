#include "io/json.h"

#include <set>
#include <vector>

#include "base/error.h"
#include "io/atomic_file.h"

namespace pyra::io {
using nlohmann::json;

std::string json_reason(const json::exception& error) {
  // "[json.exception.parse_error.101] parse error at …"
  const std::string text = error.what();
  const size_t end = text.find("] ");
  return printable(end == std::string::npos ? text : text.substr(end + 2), 300);
}

json parse_json(std::string_view text, std::string_view where, int max_depth) {
  // The library takes a NUL for the end of its input and would not see what follows.
  if (const size_t at = text.find('\0'); at != text.npos) fail(ExitCode::input, where, ": NUL byte at offset ", at);
  std::vector<std::set<std::string, std::less<>>> keys;
  const auto check = [&](int depth, json::parse_event_t event, json& parsed) {
    using Event = json::parse_event_t;
    if ((event == Event::object_start || event == Event::array_start) && depth >= max_depth) {
      fail(ExitCode::input, where, ": JSON nested deeper than ", max_depth, " levels");
    }
    if (event == Event::object_start) keys.emplace_back();
    if (event == Event::object_end) keys.pop_back();
    if (event == Event::key && !keys.back().insert(parsed.get<std::string>()).second) {
      fail(ExitCode::input, where, ": the key '", printable(parsed.get<std::string>()), "' stands twice");
    }
    return true;
  };
  try {
    return json::parse(text, check);
  } catch (const json::exception& error) {
    fail(ExitCode::input, where, ": not valid JSON: ", json_reason(error));
  }
}

json read_json(const std::filesystem::path& path, size_t limit) {
  return parse_json(read_file(path, limit), path.string());
}

std::string_view json_type(const json& value) {
  switch (value.type()) {
    case json::value_t::null:
      return "null";
    case json::value_t::object:
      return "an object";
    case json::value_t::array:
      return "an array";
    case json::value_t::string:
      return "a string";
    case json::value_t::boolean:
      return "a boolean";
    case json::value_t::number_integer:
    case json::value_t::number_unsigned:
      return "an integer";
    case json::value_t::number_float:
      return "a number with a fraction";
    default:
      return "binary data";
  }
}

std::string json_quoted(std::string_view text) {
  return json(text).dump(-1, ' ', false, json::error_handler_t::replace);
}

}  // namespace pyra::io
