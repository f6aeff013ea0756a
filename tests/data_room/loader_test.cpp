#include "data/loader.h"

#include <ATen/Parallel.h>

#include <csignal>
#include <set>

#include "data_support.h"
#include "support.h"

namespace pyra::data {
namespace {

using test::check_error;
using test::get;
using test::kDemo;
using test::put;
using test::TempDir;

const std::filesystem::path kImages = std::filesystem::path(PYRA_TEST_DATA) / "goldens/images";

/// LibTorch's number of threads, put back at the end of the scope.
class Threads {
 public:
  explicit Threads(int count) : before_(at::get_num_threads()) { at::set_num_threads(count); }
  ~Threads() { at::set_num_threads(before_); }
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

 private:
  int before_;
};

class CountingProgress final : public Progress {
 public:
  void begin(std::string_view label, int64_t total, std::string_view) override { label_ = label, total_ = total; }
  void update(int64_t done, std::string_view) override { done_ = done; }
  void end() override { ended_ = true; }
  void note(std::string_view) override {}
  std::string label_;
  int64_t total_ = 0, done_ = 0;
  bool ended_ = false;
};

/// A data set of real images, where the lines of `list` are put in test.txt.
TempDir& fill(TempDir& folder, const std::string& list) {
  std::filesystem::copy(kImages, folder / "images");
  put(folder / "images/cut.jpg", get(kImages / "rgb_q90.jpg").substr(0, 5000));
  put(folder / "images/text.png", "hello");
  put(folder / "test.txt", list);
  return folder;
}

TEST_CASE("some images of a split are spread over it, and no other is decoded") {
  const Dataset dataset = Dataset::open(kDemo);
  const nn::Preprocess preprocess{.size = 40};
  const StoredSet all = load_split(dataset, "val200", preprocess);
  const at::Tensor images = all.images.range(0, 200);
  for (const int64_t count : {1, 3, 64, 200, 1000}) {
    const ImageSet some = load_some(dataset, "val200", count, preprocess);
    const int64_t wanted = std::min<int64_t>(count, 200);
    REQUIRE(some.labels.size(0) == wanted);
    for (int64_t i = 0; i < wanted; ++i) {
      const int64_t at = (i * 200 + wanted - 1) / wanted;
      CHECK(some.paths[size_t(i)] == dataset.split("val200")[size_t(at)].path);
      CHECK(at::equal(some.images[i], images[at]));
      CHECK(some.labels[i].item<int64_t>() == all.labels[at].item<int64_t>());
    }
  }
  TempDir folder;
  // The second of four is not among the two that are asked for, so nobody hears of it.
  const Dataset bad = Dataset::open(
      fill(folder, "images/rgb_q90.jpg 0\nimages/cut.jpg 1\nimages/rgb_q90.jpg 1\nimages/text.png 0\n").path());
  CHECK(load_some(bad, "test", 2, preprocess).skipped.empty());
  CHECK(load_some(bad, "test", 4, preprocess, BadImages::skip).skipped.size() == 2);
  check_error(ExitCode::input, {"cut.jpg"}, [&] { (void)load_some(bad, "test", 4, preprocess); });
}

TEST_CASE("a split is decoded in its order, whatever the number of threads") {
  const Dataset dataset = Dataset::open(kDemo);
  const nn::Preprocess preprocess{.size = 40};
  CountingProgress progress;
  const StoredSet one = [&] {
    const Threads threads(1);
    return load_split(dataset, "val200", preprocess, BadImages::fail, progress);
  }();
  const at::Tensor images = one.images.range(0, one.images.count());
  CHECK(progress.label_ == "decode val200");
  CHECK((progress.total_ == 200 && progress.done_ == 200 && progress.ended_));
  REQUIRE(images.sizes() == at::IntArrayRef{200, 40, 40, 3});
  for (const int count : {2, 3, 8}) {
    const Threads threads(count);
    const StoredSet many = load_split(dataset, "val200", preprocess);
    CHECK(at::equal(images, many.images.range(0, 200)));
    CHECK(at::equal(one.labels, many.labels));
  }
  const auto& samples = dataset.split("val200");
  for (int64_t i = 0; i < 200; i += 37) {
    const Image image = prepare(decode(dataset.read(samples[size_t(i)]), "image"), preprocess);
    CHECK(at::equal(images[i], test::as_tensor(image)));
    CHECK(one.labels[i].item<int64_t>() == samples[size_t(i)].label);
  }
}

TEST_CASE("the first bad image in the list's order stops the load, or bad ones are left out and listed") {
  TempDir folder;
  const Dataset dataset = Dataset::open(fill(folder,
                                             "images/rgb.png 0\nimages/rgb.bmp 1\nimages/cut.jpg 2\n"
                                             "images/text.png 3\nimages/gray.jpg 4\nimages/gone.jpg 5\n"
                                             "images/small.png 6\n")
                                            .path());
  const nn::Preprocess preprocess{.size = 16};
  for (const int count : {1, 4, 8}) {
    const Threads threads(count);
    for (int repeat = 0; repeat < 5; ++repeat) {
      check_error(ExitCode::input, {"images/cut.jpg", "test.txt:3", "cut", "--bad-images skip"},
                  [&] { (void)load_split(dataset, "test", preprocess); });
    }
    const StoredSet set = load_split(dataset, "test", preprocess, BadImages::skip);
    CHECK(at::equal(set.labels, at::tensor({0, 1, 4, 6}, at::kLong)));
    REQUIRE(set.images.count() == 4);
    const ImageSet piece = load_some(dataset, "test", 100, preprocess, BadImages::skip);
    CHECK(piece.paths ==
          std::vector<std::string>{"images/rgb.png", "images/rgb.bmp", "images/gray.jpg", "images/small.png"});
    CHECK(at::equal(piece.images, set.images.range(0, 4)));
    CHECK(at::equal(piece.labels, set.labels));
    const Image last = prepare(decode(test::get_bytes(kImages / "small.png"), "small.png"), preprocess);
    CHECK(at::equal(piece.images[3], test::as_tensor(last)));
    REQUIRE(set.skipped.size() == 3);
    CHECK(set.skipped[0].path == "images/cut.jpg");
    CHECK(set.skipped[1].path == "images/text.png");
    CHECK(set.skipped[2].path == "images/gone.jpg");
    CHECK(set.skipped[2].reason.find("missing") != std::string::npos);
  }
  put(folder / "test.txt", "images/cut.jpg 0\nimages/text.png 1\n");
  const Dataset bad = Dataset::open(folder.path());
  check_error(ExitCode::input, {"none of the 2 images", "cut.jpg"},
              [&] { (void)load_split(bad, "test", preprocess, BadImages::skip); });
}

TEST_CASE("a piece too large for memory is refused with the figure") {
  const TempDir folder;
  std::string list;
  for (int i = 0; i < 20'000; ++i) list += cat("images/", i, ".png 0\n");
  put(folder / "test.txt", list);
  const Dataset dataset = Dataset::open(folder.path());
  check_error(ExitCode::device, {"20000 images", "1000 x 1000", "55 GiB"},
              [&] { (void)load_some(dataset, "test", 20'000, {.size = 1000}); });
}

TEST_CASE("a pending signal ends the load") {
  const Dataset dataset = Dataset::open(kDemo);
  for (const auto& [number, code] : {std::pair{SIGINT, ExitCode::interrupted}, {SIGTERM, ExitCode::terminated}}) {
    raise_pending_signal(number);
    check_error(code, {"interrupted"}, [&] { (void)load_split(dataset, "test", {.size = 112}); });
    raise_pending_signal(0);
  }
}

TEST_CASE("normalise is (x/255 - mean)/std, to the last bit") {
  const nn::Preprocess preprocess{.mean = {0.485f, 0.456f, 0.406f}, .std = {0.229f, 0.224f, 0.225f}};
  const at::Tensor images = at::arange(2 * 5 * 7 * 3).mul(37).remainder(256).to(at::kByte).reshape({2, 5, 7, 3});
  const at::Tensor mean = at::tensor({0.485f, 0.456f, 0.406f}), std = at::tensor({0.229f, 0.224f, 0.225f});
  const at::Tensor expected = images.to(at::kFloat).div(255).sub(mean).div(std).permute({0, 3, 1, 2});
  CHECK(at::equal(normalise(images, preprocess), expected));
  CHECK(at::equal(normalise(images.slice(1, 1, 4), preprocess), expected.slice(2, 1, 4)));
  CHECK_THROWS_AS(normalise(images.to(at::kFloat), preprocess), Error);
}

TEST_CASE("an epoch's order is a permutation of its own") {
  const auto order = epoch_order(1000, 3, 0);
  CHECK(std::set<int64_t>(order.begin(), order.end()).size() == 1000);
  CHECK((*std::ranges::min_element(order) == 0 && *std::ranges::max_element(order) == 999));
  CHECK(order == epoch_order(1000, 3, 0));
  CHECK(order != epoch_order(1000, 3, 1));
  CHECK(order != epoch_order(1000, 4, 0));
}

TEST_CASE("a batch holds the images asked for, augmented by seed, epoch and index alone") {
  const nn::Preprocess preprocess{.size = 24};
  const StoredSet set = load_split(Dataset::open(kDemo), "val200", preprocess);
  const at::Tensor images = set.images.range(0, 200);
  const std::vector<int64_t> indices{5, 199, 0, 42, 5};
  const at::Tensor rows = at::tensor(indices, at::kLong);
  const at::Tensor plain = normalise(images.index_select(0, rows), preprocess);

  const Batch batch = make_batch(set, indices, preprocess, {}, 1, 0);
  CHECK(at::equal(batch.images, plain));
  CHECK(at::equal(batch.labels, set.labels.index_select(0, rows)));

  std::vector<int64_t> all(200);
  for (int64_t i = 0; i < 200; ++i) all[size_t(i)] = i;
  const at::Tensor whole = normalise(images, preprocess), mirrored = whole.flip(3);
  const at::Tensor flipped = make_batch(set, all, preprocess, {.hflip = true}, 1, 0).images;
  int64_t flips = 0;
  for (int64_t i = 0; i < 200; ++i) {
    const bool is_mirrored = at::equal(flipped[i], mirrored[i]);
    REQUIRE((is_mirrored || at::equal(flipped[i], whole[i])));
    flips += is_mirrored;
  }
  CHECK((flips > 70 && flips < 130));

  const Augment both{.hflip = true, .random_resized_crop = true};
  const at::Tensor cropped = make_batch(set, all, preprocess, both, 1, 0).images;
  CHECK_FALSE(at::equal(cropped, flipped));
  for (const int count : {1, 3}) {
    const Threads threads(count);
    CHECK(at::equal(make_batch(set, indices, preprocess, both, 1, 0).images, cropped.index_select(0, rows)));
  }
  CHECK_FALSE(at::equal(make_batch(set, all, preprocess, both, 2, 0).images, cropped));
  CHECK_FALSE(at::equal(make_batch(set, all, preprocess, both, 1, 1).images, cropped));
  CHECK_THROWS_AS(make_batch(set, {200}, preprocess, {}, 1, 0), Error);
  CHECK_THROWS_AS(make_batch(set, {-1}, preprocess, {}, 1, 0), Error);
}

}  // namespace
}  // namespace pyra::data
