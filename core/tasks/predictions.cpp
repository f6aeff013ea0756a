#include "tasks/predictions.h"

#include <charconv>

#include "base/error.h"
#include "io/atomic_file.h"
#include "nn/config.h"

namespace pyra::tasks {
namespace {

constexpr size_t kMaxBytes = size_t{256} << 20;

/// Takes records off the front of a CSV text.
class CsvReader {
 public:
  CsvReader(std::string_view text, std::string file) : text_(text), file_(std::move(file)) {}

  [[nodiscard]] bool at_end() const { return at_ == text_.size(); }
  /// Where the record read last begins: "p.csv:7".
  [[nodiscard]] std::string where() const { return cat(file_, ":", line_); }

  std::vector<std::string> record() {
    line_ = next_line_;
    std::vector<std::string> fields;
    do fields.push_back(field());
    while (take(','));
    (void)take('\r');
    if (!take('\n') && !at_end())
      fail(ExitCode::input, where(), ": a field that ends neither at a comma nor with the line");
    ++next_line_;
    return fields;
  }

 private:
  bool take(char letter) {
    if (at_end() || text_[at_] != letter) return false;
    ++at_;
    return true;
  }

  std::string field() {
    if (!take('"')) {
      const size_t begin = at_;
      at_ = std::min(text_.find_first_of(",\r\n", at_), text_.size());
      return std::string(text_.substr(begin, at_ - begin));
    }
    std::string value;
    for (;;) {
      if (at_end()) fail(ExitCode::input, where(), ": a quoted field without an end; the file is cut or damaged");
      const char letter = text_[at_++];
      if (letter == '\n') ++next_line_;
      if (letter == '"' && !take('"')) return value;
      value += letter;
    }
  }

  std::string_view text_;
  std::string file_;
  size_t at_ = 0;
  int64_t line_ = 1, next_line_ = 1;
};

template <class T>
T number_of(const std::string& text, const char* field, const std::string& where) {
  T value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size()) {
    fail(ExitCode::input, where, ": ", field, " is '", printable(text), "', expected a number");
  }
  return value;
}

int64_t label_of(const std::string& text, const char* field, int64_t classes, const std::string& where) {
  const auto label = number_of<int64_t>(text, field, where);
  const int64_t limit = classes > 0 ? classes : nn::kMaxClasses;
  if (label < 0 || label >= limit) {
    fail(ExitCode::input, where, ": ", field, " is ", label, ", expected 0 to ", limit - 1,
         classes > 0 ? ", the classes of the run" : "");
  }
  return label;
}

}  // namespace

Confusion read_predictions(const std::filesystem::path& file, int64_t classes) {
  const std::string text = io::read_file(file, kMaxBytes);
  CsvReader reader(text, file.string());
  if (text.empty() || join(reader.record(), ",") != kPredictionsHeader) {
    fail(ExitCode::input, file.string(), ":1: expected '", kPredictionsHeader,
         "', the first line of what `pyractl eval --predictions` writes");
  }
  Confusion confusion{.file = file, .classes = classes, .counts = {}};
  while (!reader.at_end()) {
    const std::vector<std::string> fields = reader.record();
    const std::string where = reader.where();
    if (fields.size() != 4) fail(ExitCode::input, where, ": has ", fields.size(), " fields, expected 4");
    const int64_t label = label_of(fields[1], "label", classes, where);
    const int64_t predicted = label_of(fields[2], "predicted", classes, where);
    const auto probability = number_of<double>(fields[3], "probability", where);
    if (!(probability >= 0 && probability <= 1)) {
      fail(ExitCode::input, where, ": probability is ", probability, ", expected 0 to 1");
    }
    ++confusion.images;
    confusion.correct += label == predicted;
    ++confusion.counts[{label, predicted}];
    confusion.classes = std::max({confusion.classes, label + 1, predicted + 1});
  }
  if (confusion.images == 0) fail(ExitCode::input, file.string(), ": holds no image");
  return confusion;
}

std::vector<ClassResult> class_results(const Confusion& confusion) {
  std::vector<ClassResult> results(size_t(confusion.classes));
  for (const auto& [place, images] : confusion.counts) {
    const auto [label, predicted] = place;
    ClassResult& result = results[size_t(label)];
    result.images += images;
    if (label == predicted) {
      result.correct += images;
    } else if (images > result.taken_images) {
      result.taken_for = predicted;
      result.taken_images = images;
    }
  }
  return results;
}

}  // namespace pyra::tasks
