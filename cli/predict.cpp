// pyractl predict: what single images show.
#include "tasks/predict.h"

#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <iomanip>

#include "base/error.h"
#include "command.h"
#include "data/image.h"

namespace pyra::cli {
namespace {

std::string read_stdin() {
  std::string bytes;
  std::string piece(1 << 16, '\0');
  for (;;) {
    const ssize_t count = ::read(STDIN_FILENO, piece.data(), piece.size());
    if (count < 0 && errno == EINTR) {
      tasks::stop_if_asked("reading stdin");
      continue;
    }
    if (count < 0) fail(ExitCode::input, "stdin cannot be read: ", std::strerror(errno));
    if (count == 0) break;
    bytes.append(piece, 0, size_t(count));
    if (bytes.size() > data::kMaxImageBytes)
      fail(ExitCode::input, "stdin has more than ", data::kMaxImageBytes, " bytes; expected one encoded image");
  }
  if (bytes.empty()) fail(ExitCode::input, "stdin is empty; expected one encoded image");
  return bytes;
}

nlohmann::json to_json(const tasks::PredictOptions& options, const tasks::Predictions& predictions) {
  nlohmann::json list = nlohmann::json::array();
  for (const tasks::Prediction& prediction : predictions.images) {
    nlohmann::json top = nlohmann::json::array();
    for (const tasks::ClassProbability& entry : prediction.top)
      top.push_back({{"label", entry.label}, {"class", entry.name}, {"probability", entry.probability}});
    list.push_back({{"path", prediction.path}, {"top", top}});
  }
  return {{"model", options.run.model.string()}, {"predictions", list}, {"skipped", cli::to_json(predictions.skipped)}};
}

void print_human(std::ostream& out, const tasks::Predictions& predictions) {
  out << std::fixed << std::setprecision(2);
  for (const tasks::Prediction& prediction : predictions.images) {
    out << prediction.path << "\n";
    for (const tasks::ClassProbability& entry : prediction.top)
      out << std::setw(8) << 100 * entry.probability << "%  " << entry.name << "\n";
  }
  print_skipped(out, predictions.skipped, "");
}

}  // namespace

void add_predict(CLI::App& root, Session& session) {
  CLI::App* command =
      add_command(root, session, "predict", "Classes of an image, of the images in a folder or .tar, or of stdin");
  const auto options = std::make_shared<tasks::PredictOptions>();
  command->add_option("MODEL", options->run.model, "Model file (.safetensors)")->required()->type_name("");
  command->add_option("IMAGE", options->input, "Image, folder, .tar, or - for one image on stdin")
      ->required()
      ->type_name("");
  command->add_option("--top", options->top, "How many classes to name")
      ->type_name("N")
      ->check(CLI::Range(1, 1 << 20).description(""))
      ->capture_default_str();
  command->add_option("--batch", options->batch, "Images at once, of a folder or .tar")
      ->type_name("N")
      ->check(CLI::Range(1, 65536).description(""))
      ->capture_default_str();
  add_bad_images_option(*command, options->bad_images);
  command->add_flag("--exact-gelu", options->run.exact_gelu,
                    "On a GPU in bf16 or fp16: GELU by erf, not its tanh form");
  command->footer(R"(
Examples:
  pyractl predict vit.safetensors cat.jpg
  pyractl predict vit.safetensors photos/ --top 1 --json
  curl -s https://example.org/cat.jpg | pyractl predict vit.safetensors -)");
  command->callback([&session, options] {
    session.action = [&session, options] {
      options->run.device = session.globals.device;
      options->run.dtype = session.globals.dtype;
      options->run.set = session.globals.set;
      if (options->input == "-") {
        options->bytes = read_stdin();
        options->input = "stdin";
      }
      const auto predictions = tasks::predict(*options, session.plugins(), session.progress());
      session.print(to_json(*options, predictions), [&](std::ostream& out) { print_human(out, predictions); });
      return 0;
    };
  });
}

}  // namespace pyra::cli
