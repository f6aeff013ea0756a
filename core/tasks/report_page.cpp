// The report as a page.
#include <algorithm>

#include "base/text.h"
#include "io/charts.h"
#include "tasks/machine.h"
#include "tasks/report.h"

namespace pyra::tasks {
namespace {

using io::decimal;
using io::Markup;
using io::percent;
using io::significant;

constexpr size_t kOpenRuns = 3;         // sections of more runs are folded
constexpr int64_t kMatrixClasses = 64;  // more make no picture that can be read
constexpr size_t kConfusedPairs = 20;   // listed instead
constexpr const char* kTestSelected = "best of several looks at the test split";

std::string text_of(const Spread& spread, bool share) {
  const auto one = [&](double value) { return share ? decimal(100 * value, 2) : decimal(value, 1); };
  std::string text = one(spread.mean);
  if (spread.deviation) text += " ± " + one(*spread.deviation);
  return share ? text + " %" : text;
}

const char* speed_label(Speed speed) {
  return speed == Speed::inference ? "images/s, inference" : "images/s, training";
}

void fact(Markup& page, const char* name, std::string_view value) {
  page.element("dt", name);
  page.element("dd", value);
}

void number_cell(Markup& page, std::string_view text) {
  page.element("td", {{"class", "n"}}, text);
}

void table_head(Markup& page, std::string_view caption, const std::vector<std::string>& names, size_t words) {
  page.element("caption", caption);
  page.open("thead");
  page.open("tr");
  for (size_t i = 0; i < names.size(); ++i)
    page.element("th", {{"scope", "col"}, {"class", i < words ? "" : "n"}}, names[i]);
  page.close();
  page.close();
}

std::string protocol_text(const FinetuneReport& r) {
  return r.test_selected ? r.protocol + ", test-selected: " + kTestSelected : r.protocol;
}

std::string machine_text(const FinetuneReport& r) {
  const std::string name = r.processor.empty() ? "processor not recorded" : r.processor;
  return r.device + " (" + name + "), " + r.dtype +
         (r.device == "cpu" ? ", " + std::to_string(r.threads) + " threads" : "");
}

std::string training_text(const FinetuneReport& r) {
  return grouped(r.epochs) + " epochs, " + grouped(r.steps) + " steps in " + decimal(r.train_seconds, 1) + " s (" +
         decimal(r.images_per_second, 1) + " images/s); " + decimal(r.total_seconds, 1) + " s in all" +
         (r.resumed ? " since it was last resumed" : "");
}

void write_facts(Markup& page, const RunRecord& run) {
  const FinetuneReport& r = run.result;
  page.open("dl");
  fact(page, "accuracy",
       percent(r.accuracy) + " (" + grouped(r.correct) + " of " + grouped(r.test_images) + " images, split " +
           r.test_split + ")");
  page.element("dt", "protocol");
  page.element("dd", {{"class", r.test_selected ? "warn" : ""}}, protocol_text(r));
  fact(page, "method", method_of(r));
  fact(page, "seed", std::to_string(r.seed));
  fact(page, "model", r.arch + ", from " + run.recipe.model.string());
  fact(page, "data", run.recipe.data.string() + ", trained on " + r.train_split);
  fact(page, "parameters",
       grouped(r.trained_parameters) + " trained of " + grouped(r.parameters) + "; adapter " +
           grouped(run.adapter_bytes) + " bytes");
  fact(page, "MACs", grouped(r.macs) + " an image");
  fact(page, "training", training_text(r));
  fact(page, "inference", decimal(r.eval_images_per_second, 1) + " images/s in its last evaluation, without decoding");
  fact(page, "learning rate", significant(r.lr) + (r.merge_lr != r.lr ? ", merger " + significant(r.merge_lr) : ""));
  if (r.selected_epoch != r.epochs) fact(page, "reported epoch", std::to_string(r.selected_epoch));
  if (r.skipped_images > 0) fact(page, "left out", grouped(r.skipped_images) + " images that do not decode");
  if (r.peak_memory_bytes > 0) fact(page, "memory", grouped(r.peak_memory_bytes) + " bytes at most");
  if (r.device_memory_bytes > 0) fact(page, "GPU memory", grouped(r.device_memory_bytes) + " bytes in training");
  fact(page, "device", machine_text(r));
  fact(page, "versions", "pyractl " + r.pyractl_version + ", LibTorch " + r.libtorch_version);
  page.close();
}

template <class Value>
io::Series series_of(const Curve& curve, const std::string& name, Value&& value) {
  io::Series series{.name = name, .points = {}};
  for (const EpochPoint& point : curve.epochs) series.points.emplace_back(point.at, value(point));
  return series;
}

/// The curves of a run in one chart; `name` says what each shows, with several trainings also which.
io::LineChart chart_of(const RunRecord& run, const std::string& title, const char* y_label) {
  return {.title = title,
          .description = title + " of run " + run.name + " over its " + std::to_string(run.result.epochs) + " epochs",
          .x_label = "epochs",
          .y_label = y_label,
          .series = {}};
}

std::string series_name(const RunRecord& run, const Curve& curve, const std::string& name) {
  return run.curves.size() > 1 ? curve.training + ": " + name : name;
}

void write_curves(Markup& page, const RunRecord& run) {
  io::LineChart loss = chart_of(run, "Training loss", "mean of the epoch");
  io::LineChart accuracy = chart_of(run, "Accuracy", "%");
  io::LineChart rate = chart_of(run, "Learning rate", "at the end of the epoch");
  for (const Curve& curve : run.curves) {
    loss.series.push_back(series_of(curve, series_name(run, curve, "loss"), [](const auto& p) { return p.loss; }));
    rate.series.push_back(series_of(curve, series_name(run, curve, "rate"), [](const auto& p) { return p.lr; }));
    accuracy.series.push_back(
        series_of(curve, series_name(run, curve, "training"), [](const auto& p) { return 100 * p.accuracy; }));
    io::Series looks{.name = series_name(run, curve, "split " + curve.split), .points = {}, .marks = true};
    for (const EvaluationPoint& point : curve.evaluations) looks.points.emplace_back(point.at, 100 * point.accuracy);
    accuracy.series.push_back(std::move(looks));
  }
  page.open("div", {{"class", "row"}});
  for (const io::LineChart* chart : {&loss, &accuracy, &rate}) {
    page.open("div");
    draw(page, *chart);
    page.close();
  }
  page.close();
}

void write_choices(Markup& page, const FinetuneReport& r) {
  if (r.choices.empty()) return;
  page.open("table");
  table_head(page, "Learning rates tried", {"learning rate", "accuracy"}, 0);
  page.open("tbody");
  for (const Choice& choice : r.choices) {
    page.open("tr");
    number_cell(page, significant(choice.lr));
    number_cell(page, percent(choice.accuracy));
    page.close();
  }
  page.close();
  page.close();
}

void write_run(Markup& page, const RunRecord& run, bool open) {
  if (open) {
    page.open("details", {{"open", "open"}});
  } else {
    page.open("details");
  }
  page.element("summary", run.name + ": " + percent(run.result.accuracy) + ", " + method_of(run.result));
  write_facts(page, run);
  write_curves(page, run);
  write_choices(page, run.result);
  page.close();
}

void write_run_table(Markup& page, const Report& report) {
  page.element("h2", "Runs");
  page.open("div", {{"class", "wide"}});
  page.open("table");
  table_head(page, "Every run, as its report.json has it",
             {"run", "method", "protocol", "device", "seed", "accuracy", "trained", "parameters", "MACs",
              "images/s, inference", "images/s, training", "training, s"},
             4);
  page.open("tbody");
  for (const RunRecord& run : report.runs) {
    const FinetuneReport& r = run.result;
    page.open("tr");
    page.element("th", {{"scope", "row"}}, run.name);
    page.element("td", method_of(r));
    page.element("td", {{"class", r.test_selected ? "warn" : ""}}, protocol_text(r));
    page.element("td", machine_text(r));
    for (const std::string& cell : {std::to_string(r.seed), percent(r.accuracy), grouped(r.trained_parameters),
                                    grouped(r.parameters), grouped(r.macs), decimal(r.eval_images_per_second, 1),
                                    decimal(r.images_per_second, 1), decimal(r.train_seconds, 1)})
      number_cell(page, cell);
    page.close();
  }
  page.close();
  page.close();
  page.close();
}

io::ScatterChart scatter_of(const ReportBoard& board, const Report& report) {
  io::ScatterChart chart{.title = "Accuracy against speed",
                         .description = "Top-1 accuracy in percent against images a second of " +
                                        std::to_string(board.entries.size()) + " entries on " + board.caption +
                                        ". On the Pareto front:",
                         .x_label = speed_label(report.speed),
                         .y_label = "top-1, %",
                         .points = {}};
  for (const ReportEntry& entry : board.entries) {
    chart.points.push_back({.name = entry.name,
                            .x = entry.images_per_second.mean,
                            .y = 100 * entry.accuracy.mean,
                            .x_deviation = entry.images_per_second.deviation.value_or(0),
                            .y_deviation = 100 * entry.accuracy.deviation.value_or(0),
                            .front = entry.front});
    if (entry.front) chart.description += " " + entry.name + ";";
  }
  return chart;
}

void write_board(Markup& page, const ReportBoard& board, const Report& report) {
  page.element("h3", board.caption);
  draw(page, scatter_of(board, report));
  page.open("div", {{"class", "wide"}});
  page.open("table");
  table_head(
      page,
      report.grouped ? "Means over seeds ± sample standard deviation; the Pareto front is marked"
                     : "The Pareto front is marked",
      {report.grouped ? "method" : "run", "front", "seeds", "accuracy", speed_label(report.speed), "MACs", "trained"},
      3);
  page.open("tbody");
  for (const ReportEntry& entry : board.entries) {
    const FinetuneReport& first = report.runs[entry.runs.front()].result;
    std::vector<std::string> seeds;
    for (const size_t run : entry.runs) seeds.push_back(std::to_string(report.runs[run].result.seed));
    page.open("tr", {{"class", entry.front ? "front" : ""}});
    page.element("th", {{"scope", "row"}}, entry.name);
    page.element("td", entry.front ? "yes" : "");
    page.element("td", join(seeds));
    for (const std::string& cell : {text_of(entry.accuracy, true), text_of(entry.images_per_second, false),
                                    grouped(first.macs), grouped(first.trained_parameters)})
      number_cell(page, cell);
    page.close();
  }
  page.close();
  page.close();
  page.close();
}

void write_boards(Markup& page, const Report& report) {
  page.element("h2", "Accuracy against speed");
  page.element("p", {{"class", "dim"}},
               "A chart for each data set, protocol and device: accuracy and speed compare only there. Filled points "
               "are the Pareto front: none is at least as accurate and as fast, and better in one. The speed is what "
               "the run itself measured, once; `pyractl bench` measures with repetitions.");
  for (const ReportBoard& board : report.boards) write_board(page, board, report);
}

std::string class_name(const Report& report, int64_t label) {
  return size_t(label) < report.classes.size() ? report.classes[size_t(label)] : std::to_string(label);
}

void write_class_table(Markup& page, const Confusion& confusion, const Report& report) {
  page.open("table");
  table_head(page, "By class", {"class", "most often taken for", "images", "correct", "accuracy"}, 2);
  page.open("tbody");
  const std::vector<ClassResult> results = class_results(confusion);
  for (size_t label = 0; label < results.size(); ++label) {
    const ClassResult& r = results[label];
    if (r.images == 0) continue;
    page.open("tr");
    page.element("th", {{"scope", "row"}}, class_name(report, int64_t(label)));
    page.element(
        "td", r.taken_for < 0 ? std::string() : class_name(report, r.taken_for) + " (" + grouped(r.taken_images) + ")");
    number_cell(page, grouped(r.images));
    number_cell(page, grouped(r.correct));
    number_cell(page, percent(double(r.correct) / double(r.images)));
    page.close();
  }
  page.close();
  page.close();
}

void write_matrix(Markup& page, const Confusion& confusion, const Report& report) {
  io::MatrixChart chart{
      .title = "Confusion matrix",
      .description =
          "Images by class and by predicted class, shaded by their share of the class, in " + confusion.file.string(),
      .row_label = "class",
      .column_label = "predicted",
      .names = {},
      .counts = confusion.counts};
  for (int64_t label = 0; label < confusion.classes; ++label) chart.names.push_back(class_name(report, label));
  page.open("div", {{"class", "wide"}});
  draw(page, chart);
  page.close();
}

/// What replaces the matrix where there are too many classes for one.
void write_pairs(Markup& page, const Confusion& confusion, const Report& report) {
  std::vector<std::pair<int64_t, std::pair<int64_t, int64_t>>> pairs;
  for (const auto& [place, images] : confusion.counts)
    if (place.first != place.second) pairs.emplace_back(-images, place);
  std::sort(pairs.begin(), pairs.end());
  pairs.resize(std::min(pairs.size(), kConfusedPairs));
  page.open("table");
  table_head(page, std::to_string(confusion.classes) + " classes are too many for a picture; what is confused most:",
             {"class", "taken for", "images"}, 2);
  page.open("tbody");
  for (const auto& [negative, place] : pairs) {
    page.open("tr");
    page.element("td", class_name(report, place.first));
    page.element("td", class_name(report, place.second));
    number_cell(page, grouped(-negative));
    page.close();
  }
  page.close();
  page.close();
}

void write_confusion(Markup& page, const Confusion& confusion, const Report& report) {
  page.element("h2", "Predictions: " + confusion.file.string());
  page.element("p", percent(double(confusion.correct) / double(confusion.images)) + " (" + grouped(confusion.correct) +
                        " of " + grouped(confusion.images) + " images) correct");
  if (confusion.classes <= kMatrixClasses) {
    write_matrix(page, confusion, report);
  } else {
    write_pairs(page, confusion, report);
  }
  write_class_table(page, confusion, report);
}

void write_left_out(Markup& page, const Report& report) {
  if (report.left_out.empty()) return;
  page.element("h2", {{"class", "warn"}}, "Left out");
  page.open("ul");
  for (const auto& [folder, reason] : report.left_out) page.element("li", folder.string() + ": " + reason);
  page.close();
}

}  // namespace

std::string to_html(const Report& report) {
  const bool single = report.runs.size() == 1;
  const std::string title =
      single ? "Run " + report.runs.front().name : "Report on " + std::to_string(report.runs.size()) + " runs";
  Markup page = io::open_page(title);
  page.element("h1", title);
  page.element("p", {{"class", "dim"}}, "Written by pyractl " + version() + " from the runs' own files.");
  write_left_out(page, report);
  if (!single || report.grouped) write_boards(page, report);
  if (!single) write_run_table(page, report);
  for (const Confusion& confusion : report.confusions) write_confusion(page, confusion, report);
  page.element("h2", single ? "The run" : "Curves and facts of every run");
  for (const RunRecord& run : report.runs) write_run(page, run, report.runs.size() <= kOpenRuns);
  return std::move(page).take();
}

}  // namespace pyra::tasks
