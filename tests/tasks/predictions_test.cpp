#include "tasks/predictions.h"

#include "io/io_support.h"
#include "support.h"

using namespace pyra;
using test::check_error;

namespace {

const std::string kHeader = std::string(tasks::kPredictionsHeader) + "\n";

}  // namespace

TEST_CASE("predictions are counted by class, whatever their paths hold", "[report]") {
  const test::TempDir folder;
  test::put(folder / "p.csv", kHeader +
                                  "a.png,0,0,0.9\n"
                                  "\"b, \"\"c\"\".png\",0,2,0.5\r\n"
                                  "\"two\nlines.png\",0,2,1\n"
                                  ",0,1,0\n"
                                  "d.png,2,2,1e-3\n"
                                  "e.png,1,0,0.25");  // the last line may lack its end
  const tasks::Confusion confusion = tasks::read_predictions(folder / "p.csv", 0);
  CHECK(confusion.images == 6);
  CHECK(confusion.correct == 2);
  CHECK(confusion.classes == 3);
  CHECK(confusion.counts == std::map<std::pair<int64_t, int64_t>, int64_t>{
                                {{0, 0}, 1}, {{0, 1}, 1}, {{0, 2}, 2}, {{1, 0}, 1}, {{2, 2}, 1}});
  const auto results = tasks::class_results(confusion);
  REQUIRE(results.size() == 3);
  CHECK(results[0].images == 4);
  CHECK(results[0].correct == 1);
  CHECK(results[0].taken_for == 2);
  CHECK(results[0].taken_images == 2);
  CHECK(results[2].taken_for == -1);
  CHECK(tasks::read_predictions(folder / "p.csv", 10).classes == 10);
}

TEST_CASE("a predictions file that is none, with the line that says so", "[report]") {
  const test::TempDir folder;
  struct Case {
    std::string text;
    std::vector<std::string> says;
  };
  for (const Case& bad : std::vector<Case>{
           {"", {"p.csv:1", "path,label,predicted,probability"}},
           {"path,label\na,0\n", {"p.csv:1"}},
           {"{\"path\": 1}\n", {"p.csv:1"}},
           {kHeader, {"holds no image"}},
           {kHeader + "a,0,0\n", {"p.csv:2", "3 fields"}},
           {kHeader + "a,0,0,1,1\n", {"p.csv:2", "5 fields"}},
           {kHeader + "a,0,0,1\n\n", {"p.csv:3", "1 fields"}},
           {kHeader + "a,x,0,1\n", {"p.csv:2", "label", "'x'"}},
           {kHeader + "a,0,1.5,1\n", {"p.csv:2", "predicted", "'1.5'"}},
           {kHeader + "\"two\nlines\",0,0,1\nb,-1,0,1\n", {"p.csv:4", "label is -1"}},
           {kHeader + "a,3,0,1\n", {"p.csv:2", "label is 3", "0 to 2"}},
           {kHeader + "a,0,99999999999999999999,1\n", {"p.csv:2", "predicted"}},
           {kHeader + "a,0,0,2\n", {"p.csv:2", "probability is 2"}},
           {kHeader + "a,0,0,nan\n", {"p.csv:2", "probability"}},
           {kHeader + "\"a,0,0,1\n", {"p.csv:2", "without an end"}},
           {kHeader + "\"a\"b,0,0,1\n", {"p.csv:2"}},
       }) {
    test::put(folder / "p.csv", bad.text);
    CAPTURE(bad.text);
    check_error(ExitCode::input, bad.says, [&] { (void)tasks::read_predictions(folder / "p.csv", 3); });
  }
  test::put(folder / "p.csv", kHeader + "a,1048576,0,1\n");
  check_error(ExitCode::input, {"p.csv:2", "1048576"}, [&] { (void)tasks::read_predictions(folder / "p.csv", 0); });
  check_error(ExitCode::input, {"none.csv"}, [&] { (void)tasks::read_predictions(folder / "none.csv", 0); });
}
