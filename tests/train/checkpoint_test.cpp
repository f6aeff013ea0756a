#include "train/checkpoint.h"

#include "catch.h"
#include "io/io_support.h"
#include "support.h"
#include "train/metrics_log.h"

using namespace pyra;
using train::Checkpoint;

namespace {

Checkpoint sample(int64_t step) {
  return {.position = {.step = step,
                       .epoch = 3,
                       .batch = 1,
                       .seconds = 0.1 + double(step),
                       .loss_sum = 1.0 / 3,
                       .correct = 7,
                       .images = 9,
                       .epoch_seconds = 1e-9},
          .tensors = {{"value.a", at::full({2, 3}, float(step))}},
          .task = R"({"what":"quotes \" and ünicode"})"};
}

class Notes final : public Progress {
 public:
  std::string text;
  void begin(std::string_view, int64_t, std::string_view) override {}
  void update(int64_t, std::string_view) override {}
  void end() override {}
  void note(std::string_view line) override { text += line; }
};

}  // namespace

TEST_CASE("a checkpoint comes back as it was, to the last bit", "[checkpoint]") {
  const test::TempDir folder;
  CHECK_FALSE(train::read_checkpoint(folder / "none").has_value());
  const Checkpoint written = sample(5);
  train::write_checkpoint(folder / "c", written);
  const auto read = train::read_checkpoint(folder / "c");
  REQUIRE(read.has_value());
  CHECK(read->position == written.position);
  CHECK(read->task == written.task);
  REQUIRE(read->tensors.size() == 1);
  CHECK(at::equal(read->tensors.at("value.a"), written.tensors.at("value.a")));
}

TEST_CASE("the checkpoint before stands in for a damaged one, with a note", "[checkpoint]") {
  const test::TempDir folder;
  train::write_checkpoint(folder.path(), sample(1));
  train::write_checkpoint(folder.path(), sample(2));
  train::write_checkpoint(folder.path(), sample(3));
  CHECK(train::read_checkpoint(folder.path())->position.step == 3);

  std::filesystem::resize_file(folder / "last.safetensors", 40);
  Notes notes;
  CHECK(train::read_checkpoint(folder.path(), notes)->position.step == 2);
  CHECK(notes.text.find("last.safetensors") != std::string::npos);

  std::filesystem::remove(folder / "last.safetensors");
  CHECK(train::read_checkpoint(folder.path())->position.step == 2);
  std::filesystem::resize_file(folder / "previous.safetensors", 40);
  CHECK_THROWS_AS(train::read_checkpoint(folder.path()), Error);
}

TEST_CASE("metrics are appended by line and cut back to what a checkpoint remembers", "[metrics]") {
  const test::TempDir folder;
  int64_t remembered = 0;
  {
    train::MetricsLog log(folder / "m.jsonl", 0);
    log.append(R"({"step":1})");
    remembered = log.synced_size();
    log.append(R"({"step":2})");
  }
  CHECK(test::get(folder / "m.jsonl") == "{\"step\":1}\n{\"step\":2}\n");
  {
    train::MetricsLog log(folder / "m.jsonl", remembered);
    log.append(R"({"step":3})");
  }
  CHECK(test::get(folder / "m.jsonl") == "{\"step\":1}\n{\"step\":3}\n");
  // A log shorter than remembered (lost with the machine) is kept as far as it goes.
  train::MetricsLog(folder / "m.jsonl", 1000);
  CHECK(test::get(folder / "m.jsonl").size() == 22);
  CHECK_THROWS_AS(train::MetricsLog(folder / "no folder" / "m.jsonl", 0), Error);
}
