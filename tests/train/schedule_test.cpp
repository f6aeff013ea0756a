#include "train/schedule.h"

#include <cmath>
#include <numbers>

#include "catch.h"

using namespace pyra::train;

TEST_CASE("learning rate follows the published formula, epoch by epoch", "[schedule]") {
  const Schedule published;
  const auto cosine = [](double e) { return 1e-5 + (1e-3 - 1e-5) * (1 + std::cos(std::numbers::pi * e / 100)) / 2; };
  CHECK(learning_rate(published, 0) == Approx(1e-6).epsilon(1e-12));
  CHECK(learning_rate(published, 1) == Approx(1e-6 + 0.1 * (1e-3 - 1e-6)).epsilon(1e-12));
  CHECK(learning_rate(published, 9) == Approx(1e-6 + 0.9 * (1e-3 - 1e-6)).epsilon(1e-12));
  for (int64_t e = 10; e < 100; ++e) {
    CAPTURE(e);
    CHECK(learning_rate(published, e) == Approx(cosine(double(e))).epsilon(1e-12));
  }
  CHECK(learning_rate(published, 100) == Approx(1e-5).epsilon(1e-12));
  CHECK(learning_rate(published, 5000) == learning_rate(published, 100));
}

TEST_CASE("without a warm-up the cosine starts at its peak", "[schedule]") {
  const Schedule schedule{.peak = 0.5, .min_lr = 0.1, .warmup_epochs = 0, .epochs = 4};
  CHECK(learning_rate(schedule, 0) == Approx(0.5));
  CHECK(learning_rate(schedule, 2) == Approx(0.3));
  CHECK(learning_rate(schedule, 4) == Approx(0.1));
}

TEST_CASE("under a time limit the later of epoch and clock decides", "[schedule]") {
  const Schedule schedule{.epochs = 100};
  CHECK(schedule_epoch(schedule, 7, 1e9, 0) == 7);
  CHECK(schedule_epoch(schedule, 0, 0, 60) == 0);
  CHECK(schedule_epoch(schedule, 0, 29.9, 60) == 49);
  CHECK(schedule_epoch(schedule, 0, 30, 60) == 50);
  CHECK(schedule_epoch(schedule, 80, 30, 60) == 80);
  CHECK(schedule_epoch(schedule, 0, 61, 60) == 99);
  CHECK(schedule_epoch(schedule, 100, 0, 0) == 99);
}
