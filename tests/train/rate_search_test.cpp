#include "train/rate_search.h"

#include <limits>

#include "base/philox.h"
#include "goldens.h"
#include "io/io_support.h"
#include "support.h"
#include "tensor_maps.h"
#include "tiny_vit.h"

using namespace pyra;
using train::KeptCounts;
using train::RateSearch;
using train::RateSearchSettings;

namespace {

constexpr int64_t kBlocks = 4;

data::StoredSet random_images(int64_t n) {
  data::ImageSet set{
      .images = at::empty({n, 16, 16, 3}, at::kByte), .labels = at::empty({n}, at::kLong), .paths = {}, .skipped = {}};
  const Philox random(4, RandomStream::init);
  for (int64_t i = 0; i < n; ++i) {
    set.labels[i] = i % 3;
    auto* pixels = set.images[i].data_ptr<uint8_t>();
    for (int64_t p = 0; p < 16 * 16 * 3; ++p) pixels[p] = uint8_t(random.below(uint64_t(i * 768 + p), 256));
  }
  return data::stored(std::move(set));
}

RateSearchSettings settings(double share) {
  const double dense = double(nn::count_macs(test::tiny_config(kBlocks)));
  return {.target = share * dense, .unit = 0.1 * dense, .lr = 0.1, .epochs = 6, .batch = 8, .seed = 3};
}

}  // namespace

TEST_CASE("a search moves its counts to the target and leaves the model alone", "[rate_search]") {
  const double share = GENERATE(0.5, 0.85);
  const nn::Vit vit(test::tiny_config(kBlocks), nn::random_weights(test::tiny_config(kBlocks), 3));
  const sdk::TensorMap before = test::copies(vit.weights());
  const data::StoredSet images = random_images(27);
  RateSearch search(vit, images, test::kTinyPreprocess, settings(share));
  const auto distance = [&] {
    const auto macs = double(nn::count_macs(test::tiny_config(kBlocks), search.counts().merge));
    return std::abs(macs / double(nn::count_macs(test::tiny_config(kBlocks))) - share);
  };
  const double at_first = distance();
  while (!search.finished()) search.step();
  CAPTURE(share, at_first, search.counts().prune, search.counts().merge);
  CHECK(search.position().step == 6 * 3);
  CHECK(distance() < 0.5 * at_first);
  CHECK(distance() < 0.1);
  test::check_equal(vit.weights(), before);
}

TEST_CASE("a search that is restored goes on bit for bit", "[rate_search]") {
  const nn::Vit vit(test::tiny_config(kBlocks), nn::random_weights(test::tiny_config(kBlocks), 3));
  const data::StoredSet images = random_images(27);
  const RateSearchSettings chosen = settings(0.5);
  RateSearch unbroken(vit, images, test::kTinyPreprocess, chosen);
  while (!unbroken.finished()) unbroken.step();
  for (const int64_t stop : {0, 1, 3, 7, 17, 18}) {
    RateSearch first(vit, images, test::kTinyPreprocess, chosen), second(vit, images, test::kTinyPreprocess, chosen);
    for (int64_t i = 0; i < stop; ++i) first.step();
    second.restore(first.position(), test::copies(first.state()), "test");
    while (!second.finished()) second.step();
    CAPTURE(stop);
    test::check_equal(second.state(), unbroken.state());
    CHECK(second.counts() == unbroken.counts());
  }
}

TEST_CASE("another seed is another search", "[rate_search]") {
  const nn::Vit vit(test::tiny_config(kBlocks), nn::random_weights(test::tiny_config(kBlocks), 3));
  const data::StoredSet images = random_images(27);
  const auto end = [&](uint64_t seed) {
    RateSearchSettings chosen = settings(0.5);
    chosen.seed = seed;
    RateSearch search(vit, images, test::kTinyPreprocess, chosen);
    while (!search.finished()) search.step();
    // Block 1's prune is the one that cuts from the start: a rate above an earlier block's feels the MACs alone.
    return search.state().at("value.blocks.1.prune_logits").clone();
  };
  CHECK(at::equal(end(1), end(1)));
  CHECK_FALSE(at::equal(end(1), end(2)));
}

TEST_CASE("a state of another search is refused by the tensor's name", "[rate_search]") {
  const nn::Vit vit(test::tiny_config(kBlocks), nn::random_weights(test::tiny_config(kBlocks), 3));
  const data::StoredSet images = random_images(8);
  RateSearch search(vit, images, test::kTinyPreprocess, settings(0.5));
  sdk::TensorMap state = test::copies(search.state());
  state["value.blocks.1.merge_logits"] = at::zeros({3});
  test::check_error(ExitCode::input, {"here: tensor 'value.blocks.1.merge_logits'"},
                    [&] { search.restore({}, state, "here"); });
  state.erase("value.blocks.1.merge_logits");
  test::check_error(ExitCode::input, {"is missing"}, [&] { search.restore({}, state, "here"); });
}

TEST_CASE("a loss that is not finite stops the search before it changes anything", "[rate_search]") {
  sdk::TensorMap weights = nn::random_weights(test::tiny_config(kBlocks), 3);
  weights.at("head.bias")[0] = std::numeric_limits<float>::quiet_NaN();
  const nn::Vit vit(test::tiny_config(kBlocks), std::move(weights));
  const data::StoredSet images = random_images(8);
  RateSearch search(vit, images, test::kTinyPreprocess, settings(0.5));
  const sdk::TensorMap before = test::copies(search.state());
  CHECK_THROWS_AS(search.step(), train::Diverged);
  test::check_equal(search.state(), before);
  CHECK(search.position().step == 0);
}

TEST_CASE("nothing to search in one block, or without images", "[rate_search]") {
  nn::VitConfig shallow = test::tiny_config(kBlocks);
  shallow.depth = 1;
  const nn::Vit one(shallow, nn::random_weights(shallow, 3)),
      vit(test::tiny_config(kBlocks), nn::random_weights(test::tiny_config(kBlocks), 3));
  const data::StoredSet images = random_images(8), none = random_images(0);
  test::check_error(ExitCode::usage, {"one block"},
                    [&] { RateSearch(one, images, test::kTinyPreprocess, settings(0.5)); });
  test::check_error(ExitCode::input, {"no image"},
                    [&] { RateSearch(vit, none, test::kTinyPreprocess, settings(0.5)); });
}

TEST_CASE("logits are found for any count but one patch, which could not train", "[rate_search]") {
  const int64_t patches = GENERATE(2, 16, 196), prefix = GENERATE(1, 2);
  const auto kept = [&](int64_t count) {
    return train::rate_of(train::logits_for(count, patches, prefix), patches, prefix).count;
  };
  CHECK(kept(prefix + 1) == prefix + 2);
  for (int64_t count = prefix + 2; count <= patches + prefix; ++count) {
    const at::Tensor logits = train::logits_for(count, patches, prefix);
    CAPTURE(patches, count);
    CHECK(kept(count) == count);
    CHECK(logits.isfinite().all().item<bool>());
  }
}

TEST_CASE("a search starts from the counts it is given", "[rate_search]") {
  const nn::Vit vit(test::tiny_config(kBlocks), nn::random_weights(test::tiny_config(kBlocks), 3));
  const data::StoredSet images = random_images(8);
  RateSearchSettings chosen = settings(0.5);
  chosen.start = {.prune = {17, 14, 9, 5}, .merge = {17, 12, 8, 3}};
  CHECK(RateSearch(vit, images, test::kTinyPreprocess, chosen).counts() == chosen.start);
}

TEST_CASE("fitted counts cost the most that the target allows, and stay counts", "[rate_search]") {
  const nn::VitConfig config = nn::arch_config("vit_ti_patch8_112");
  const double dense = double(nn::count_macs(config));
  const KeptCounts counts{.prune = {197, 150, 110, 90, 70, 60, 40, 30, 20, 10, 7, 6},
                          .merge = {197, 120, 95, 80, 61, 44, 36, 22, 12, 9, 7, 4}};
  for (const double share : {0.2, 0.3, 0.5, 0.7, 0.95, 1.0}) {
    const auto target = int64_t(share * dense);
    const KeptCounts fitted = train::fit_counts(config, counts, target);
    CAPTURE(share, fitted.prune, fitted.merge);
    const int64_t macs = nn::count_macs(config, fitted.merge);
    CHECK(macs <= target);
    CHECK(double(macs) > double(target) - 0.01 * dense);
    int64_t tokens = config.tokens();
    for (size_t block = 0; block < fitted.prune.size(); ++block) {
      CHECK(fitted.prune[block] <= tokens);
      CHECK(fitted.merge[block] <= fitted.prune[block]);
      CHECK(fitted.merge[block] >= 2);
      tokens = fitted.merge[block];
    }
    CHECK(fitted.merge[0] == config.tokens());
  }
  CHECK(train::fit_counts(config, counts, int64_t(0.05 * dense)).merge.empty());
}
