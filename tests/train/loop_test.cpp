#include "train/loop.h"

#include <cmath>

#include "base/philox.h"
#include "goldens.h"
#include "io/io_support.h"
#include "support.h"
#include "tensor_maps.h"
#include "tiny_vit.h"

using namespace pyra;
using train::Loop;
using train::LoopSettings;

namespace {

/// A tiny model with LoRA (dropout on) and PYRA: everything random and everything learned that a run can have.
nn::Vit tiny_model() {
  nn::Vit vit(test::tiny_config(), nn::random_weights(test::tiny_config(), 3));
  const sdk::ModelShape shape = test::tiny_config().shape();
  auto peft = std::make_unique<nn::PeftSetup>();
  peft->name = "lora";
  peft->method = test::built_plugins().peft("lora", {{"rank", int64_t{2}}, {"dropout", 0.2}}, "test");
  for (const auto& decl : peft->method->declare(shape)) peft->learned.emplace(decl.name, nn::make_tensor(decl, 1));
  vit.set_peft(std::move(peft));
  auto merge = std::make_unique<nn::MergeSetup>();
  merge->name = "pyra";
  merge->merger = test::built_plugins().merger("pyra", {}, "test");
  merge->schedule = merge->merger->resolve({.text = "4,2", .remove = {4, 2}, .prune = {}, .merge = {}}, shape);
  for (const auto& decl : merge->merger->declare(shape, merge->schedule)) {
    merge->learned.emplace(decl.name, nn::make_tensor(decl, 1));
  }
  vit.set_merge(std::move(merge));
  return vit;
}

/// Images whose colour tells their class.
data::StoredSet tiny_images(int64_t n) {
  data::ImageSet set{
      .images = at::empty({n, 16, 16, 3}, at::kByte), .labels = at::empty({n}, at::kLong), .paths = {}, .skipped = {}};
  const Philox random(4, RandomStream::init);
  for (int64_t i = 0; i < n; ++i) {
    set.labels[i] = i % test::kTinyClasses;
    auto* pixels = set.images[i].data_ptr<uint8_t>();
    for (int64_t p = 0; p < 16 * 16 * 3; ++p) {
      const uint64_t noise = random.below(uint64_t(i * 768 + p), 100);
      pixels[p] = uint8_t(noise + (p % 3 == i % test::kTinyClasses ? 150 : 0));
    }
  }
  return data::stored(std::move(set));
}

LoopSettings tiny_settings() {
  return {.schedule = {.peak = 5e-3, .warmup_epochs = 1, .epochs = 3},
          .batch = 8,
          .drop_path = 0.2,
          .augment = {.hflip = true},
          .seed = 11};
}

}  // namespace

TEST_CASE("a loop restored before any step ends bit-equal to the unbroken one", "[loop]") {
  const data::StoredSet images = tiny_images(27);  // 3 batches of 8 an epoch, 3 images dropped
  std::vector<std::pair<train::Position, sdk::TensorMap>> snapshots;
  nn::Vit model = tiny_model();
  Loop whole(model, images, test::kTinyPreprocess, tiny_settings());
  REQUIRE(whole.steps_per_epoch() == 3);
  int64_t epochs = 0;
  while (!whole.finished()) {
    snapshots.emplace_back(whole.position(), test::copies(whole.state()));
    const auto epoch = whole.step();
    CHECK(epoch.has_value() == (whole.position().batch == 0));
    if (epoch) CHECK(epoch->epoch == epochs++);
  }
  CHECK(whole.position().step == 9);
  CHECK(epochs == 3);
  for (const auto& [position, tensors] : snapshots) {
    CAPTURE(position.step);
    nn::Vit other = tiny_model();
    Loop rest(other, images, test::kTinyPreprocess, tiny_settings());
    rest.restore(position, tensors, "test");
    while (!rest.finished()) (void)rest.step();
    test::check_equal(rest.state(), whole.state());
  }
}

TEST_CASE("training learns what colours mean", "[loop]") {
  const data::StoredSet images = tiny_images(48);
  nn::Vit model = tiny_model();
  LoopSettings settings = tiny_settings();
  settings.schedule = {.peak = 2e-2, .warmup_epochs = 1, .epochs = 8};
  settings.drop_path = 0;
  Loop loop(model, images, test::kTinyPreprocess, settings);
  std::vector<train::EpochReport> epochs;
  while (!loop.finished()) {
    if (const auto epoch = loop.step()) epochs.push_back(*epoch);
  }
  REQUIRE(epochs.size() == 8);
  CHECK(epochs.front().lr == Approx(settings.schedule.warmup_lr));
  CHECK(epochs.back().lr == Approx(train::learning_rate(settings.schedule, 7)));
  CHECK(epochs.back().loss < 0.5 * epochs.front().loss);
  CHECK(epochs.back().accuracy > 0.9);
}

TEST_CASE("fewer images than a batch make one batch", "[loop]") {
  const data::StoredSet images = tiny_images(5);
  nn::Vit model = tiny_model();
  Loop loop(model, images, test::kTinyPreprocess, tiny_settings());
  CHECK(loop.steps_per_epoch() == 1);
  CHECK(loop.images_per_step() == 5);
  const auto epoch = loop.step();
  REQUIRE(epoch.has_value());
  CHECK(loop.position().epoch == 1);
  const data::StoredSet none = tiny_images(0);
  CHECK_THROWS_AS(Loop(model, none, test::kTinyPreprocess, tiny_settings()), Error);
}

TEST_CASE("the merger's tensors may take a rate of their own", "[loop]") {
  const data::StoredSet images = tiny_images(8);
  LoopSettings settings = tiny_settings();
  settings.schedule.warmup_epochs = 0;
  const auto moved = [&](double merge_lr) {
    nn::Vit model = tiny_model();
    settings.merge_lr = merge_lr;
    Loop loop(model, images, test::kTinyPreprocess, settings);
    const sdk::TensorMap before = test::copies(loop.state());
    (void)loop.step();
    std::map<std::string, double> largest;
    for (const auto& [name, tensor] : loop.state()) {
      const std::string group = name.starts_with("value.merge.") ? "merge" : "rest";
      if (name.starts_with("value.")) {
        largest[group] = std::max(largest[group], test::max_difference(tensor, before.at(name)));
      }
    }
    return largest;
  };
  auto same = moved(0), slow = moved(5e-5);
  // The first AdamW step moves a tensor by its rate, nearly.
  CHECK(same["merge"] == Approx(5e-3).epsilon(0.02));
  CHECK(slow["merge"] == Approx(5e-5).epsilon(0.02));
  CHECK(slow["rest"] == Approx(same["rest"]));
}

TEST_CASE("a time limit ends training and squeezes the schedule", "[loop][timed]") {
  const data::StoredSet images = tiny_images(16);
  nn::Vit model = tiny_model();
  LoopSettings settings = tiny_settings();
  settings.schedule.epochs = 1000000;
  settings.max_seconds = 0.2;
  Loop loop(model, images, test::kTinyPreprocess, settings);
  std::optional<train::EpochReport> last;
  while (!loop.finished()) {
    if (const auto epoch = loop.step()) last = epoch;
  }
  CHECK(loop.position().seconds >= 0.2);
  CHECK(loop.position().epoch < 100000);
  REQUIRE(last.has_value());
  CHECK(last->step == loop.position().step);
  CHECK(last->lr < 0.5 * settings.schedule.peak);
}

TEST_CASE("what is not finite stops training and changes nothing", "[loop]") {
  const data::StoredSet images = tiny_images(16);
  nn::Vit model = tiny_model();
  LoopSettings settings = tiny_settings();
  settings.schedule = {.peak = 1e30, .warmup_lr = 1e30, .warmup_epochs = 0, .epochs = 1000};
  Loop loop(model, images, test::kTinyPreprocess, settings);
  std::string message;
  sdk::TensorMap before;
  try {
    while (!loop.finished()) {
      before = test::copies(loop.state());
      (void)loop.step();
    }
  } catch (const train::Diverged& error) {
    message = error.what();
    CHECK(error.code() == ExitCode::untrusted);
  }
  CHECK(message.find("learning rate 1e+30") != std::string::npos);
  CHECK(message.find(cat("step ", loop.position().step + 1)) != std::string::npos);
  for (const auto& [name, tensor] : loop.state()) CHECK(at::equal(tensor.nan_to_num(), before.at(name).nan_to_num()));
}

TEST_CASE("a state of another model is refused by its tensor", "[loop]") {
  const data::StoredSet images = tiny_images(16);
  nn::Vit model = tiny_model();
  Loop loop(model, images, test::kTinyPreprocess, tiny_settings());
  sdk::TensorMap state = test::copies(loop.state());
  state["value.head.weight"] = at::zeros({7, 32});
  const auto restore = [&] { loop.restore({}, state, "last.safetensors"); };
  test::check_error(ExitCode::input, {"last.safetensors", "value.head.weight", "7, 32"}, restore);
  state.erase("value.head.weight");
  test::check_error(ExitCode::input, {"value.head.weight", "missing"}, restore);
  state = test::copies(loop.state());
  state["value.extra"] = at::zeros({1});
  test::check_error(ExitCode::input, {"last.safetensors"}, restore);
}
