// pyractl data: whether a data set is sound, before anything is trained on it.
#include "base/error.h"
#include "command.h"
#include "tasks/data_check.h"

namespace pyra::cli {
namespace {

using nlohmann::json;

constexpr size_t kShown = 10;  // of each kind, for people; --json has them all

json notes_json(const std::vector<tasks::ImageNote>& notes, const char* text) {
  json list = json::array();
  for (const auto& note : notes) list.push_back({{"image", note.image}, {text, note.text}});
  return list;
}

json duplicates_json(const std::vector<tasks::Duplicate>& duplicates) {
  json list = json::array();
  for (const auto& d : duplicates)
    list.push_back({{"images", d.images}, {"splits", d.splits}, {"labels_differ", d.labels_differ}});
  return list;
}

json to_json(const tasks::DataCheck& check) {
  json splits = json::array();
  for (const auto& split : check.splits)
    splits.push_back({{"name", split.name},
                      {"images", split.images},
                      {"unreadable", split.unreadable},
                      {"images_by_class", split.by_class},
                      {"classes_not_in_train", split.not_in_train}});
  return {{"data", check.data.string()},
          {"classes", check.class_names},
          {"splits", splits},
          {"files", check.files},
          {"smallest_side", check.smallest_side},
          {"largest_side", check.largest_side},
          {"common_size",
           {{"width", check.common_width}, {"height", check.common_height}, {"images", check.of_common_size}}},
          {"wrong_lines", check.wrong_lines},
          {"two_labels", check.two_labels},
          {"unreadable", notes_json(check.unreadable, "reason")},
          {"leaks", duplicates_json(check.leaks)},
          {"duplicates", duplicates_json(check.duplicates)},
          {"listed_twice", check.listed_twice},
          {"odd_sizes", notes_json(check.odd_sizes, "size")},
          {"one_colour", check.one_colour},
          {"empty_classes", check.empty_classes},
          {"empty_splits", check.empty_splits},
          {"left_out", check.left_out},
          {"warnings", check.warnings()},
          {"faults", check.has_faults()}};
}

/// A heading with the number, and the first of them.
void write_list(std::ostream& out, const char* kind, const std::string& heading,
                const std::vector<std::string>& lines) {
  if (lines.empty()) return;
  out << kind << lines.size() << " " << heading << "\n";
  for (size_t i = 0; i < std::min(lines.size(), kShown); ++i) out << "         " << lines[i] << "\n";
  if (lines.size() > kShown) out << "         … and " << lines.size() - kShown << " more (--json lists them all)\n";
}

std::vector<std::string> lines_of(const std::vector<tasks::ImageNote>& notes) {
  std::vector<std::string> lines;
  lines.reserve(notes.size());
  for (const auto& note : notes) lines.push_back(cat(note.image, ": ", note.text));
  return lines;
}

std::vector<std::string> lines_of(const std::vector<tasks::Duplicate>& duplicates) {
  std::vector<std::string> lines;
  for (const auto& d : duplicates) {
    const size_t more = d.images.size() > 3 ? d.images.size() - 3 : 0;
    const std::vector<std::string> first(d.images.begin(), d.images.end() - int64_t(more));
    lines.push_back(cat(join(d.splits, " and "), ": ", join(first, " = "), more ? cat(" = ", more, " more") : "",
                        d.labels_differ ? ", with different labels" : ""));
  }
  return lines;
}

void write_splits(std::ostream& out, const tasks::DataCheck& check) {
  for (const auto& split : check.splits) {
    const auto [least, most] = std::ranges::minmax_element(split.by_class);
    out << "split    " << split.name << ": " << grouped(split.images) << " images";
    if (!split.by_class.empty()) {
      const bool even = *least == *most;
      out << ", " << (even ? "" : cat(*least, " to ")) << *most << " a class";
    }
    if (split.unreadable > 0) out << ", " << split.unreadable << " unreadable";
    out << "\n";
  }
}

void write_human(std::ostream& out, const tasks::DataCheck& check) {
  out << "data     " << check.data.string() << ": " << grouped(check.files) << " image files, "
      << check.class_names.size() << " classes\n";
  write_splits(out, check);
  if (check.of_common_size > 0)
    out << "sizes    " << grouped(check.of_common_size) << " images of " << check.common_width << " x "
        << check.common_height << ", sides from " << check.smallest_side << " to " << check.largest_side << "\n";
  write_list(out, "FAULT    ", "wrong lines in list files:", check.wrong_lines);
  write_list(out, "FAULT    ", "images with two labels:", check.two_labels);
  write_list(out, "FAULT    ", "unreadable images:", lines_of(check.unreadable));
  write_list(out, "warning  ", "images in two splits that should share none:", lines_of(check.leaks));
  write_list(out, "warning  ", "images that stand in a split more than once:", lines_of(check.duplicates));
  write_list(out, "warning  ", "lines that repeat another of their list:", check.listed_twice);
  write_list(out, "warning  ", "images of odd size:", lines_of(check.odd_sizes));
  write_list(out, "warning  ", "images of one colour:", check.one_colour);
  write_list(out, "warning  ", "classes without an image:", check.empty_classes);
  write_list(out, "warning  ", "splits without an image:", check.empty_splits);
  write_list(out, "warning  ",
             "entries left out: links that lead nowhere, in a .tar all links and names that lead out:", check.left_out);
  for (const auto& split : check.splits)
    write_list(out, "warning  ", cat("classes of split ", split.name, " that no training image has:"),
               split.not_in_train);
  if (check.has_faults()) {
    out << "result   not usable as it is\n";
  } else if (check.warnings() > 0) {
    out << "result   usable, " << check.warnings() << " warnings\n";
  } else {
    out << "result   clean\n";
  }
}

}  // namespace

void add_data(CLI::App& root, Session& session) {
  CLI::App* command = add_command(root, session, "data", "Check a data set");
  command->require_subcommand(1);
  command->fallthrough();
  command->footer(R"(
Examples:
  pyractl data check task.tar
  pyractl data check photos/ --json
  pyractl data check vtab/cifar --list my_train.txt)");

  CLI::App* check = command->add_subcommand("check", "Decode every image, count and compare");
  const auto options = std::make_shared<tasks::DataCheckOptions>();
  check->add_option("DATA", options->data, "Folder or .tar: list files, or an image folder")->required()->type_name("");
  check->add_option("--list", options->list, "One more list file ('path label' lines) for this data")
      ->type_name("FILE");
  check->footer(R"(
Faults (exit code 3): unreadable images, wrong lines in list files, labels out of range, one image with two labels.
Warnings: images with the same pixels within a split or, worse, across splits, odd sizes, one colour, classes without
images or without training images.)");
  check->callback([&session, options] {
    session.action = [&session, options] {
      const tasks::DataCheck result = tasks::check_data(*options, session.progress());
      session.print(to_json(result), [&](std::ostream& out) { write_human(out, result); });
      return result.has_faults() ? int(ExitCode::input) : 0;
    };
  });
}

}  // namespace pyra::cli
