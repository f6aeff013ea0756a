#include "data/image_store.h"

#include <ATen/Parallel.h>

#include <cstdlib>
#include <filesystem>
#include <numeric>

#include "data_support.h"
#include "support.h"

namespace pyra::data {
namespace {

using test::check_error;
using test::EnvironmentVariable;
using test::TempDir;

at::Tensor numbered(int64_t count, int64_t size) {
  return at::arange(count * size * size * 3).mul(31).remainder(251).to(at::kByte).reshape({count, size, size, 3});
}

ImageStore on_disk(const at::Tensor& images) {
  ImageStore store(images.size(0), images.size(1));
  at::parallel_for(0, images.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) store.write(i, images[i].const_data_ptr<uint8_t>());
  });
  return store;
}

TEST_CASE("images come back as they went, from a file and from memory") {
  const at::Tensor images = numbered(37, 9);
  for (const bool disk : {true, false}) {
    ImageStore store = disk ? on_disk(images) : ImageStore(images);
    CHECK((store.count() == 37 && store.image_size() == 9 && store.image_bytes() == 243));
    CHECK(at::equal(store.range(0, 37), images));
    CHECK(at::equal(store.range(30, 7), images.narrow(0, 30, 7)));
    CHECK(store.range(5, 0).numel() == 0);
    const std::vector<int64_t> some{36, 0, 7, 7};
    at::Tensor read = at::empty({4, 9, 9, 3}, at::kByte);
    store.read(some, read.data_ptr<uint8_t>());
    CHECK(at::equal(read, images.index_select(0, at::tensor(some, at::kLong))));
    for (const int64_t outside : {int64_t{-1}, int64_t{37}})
      check_error(ExitCode::internal, {cat(outside), "37"}, [&] { store.read(outside, read.data_ptr<uint8_t>()); });
    store.keep({3, 36});
    CHECK(store.count() == 2);
    CHECK(at::equal(store.range(0, 2), images.index_select(0, at::tensor({3, 36}, at::kLong))));
    check_error(ExitCode::internal, {"image 2"}, [&] { (void)store.range(2, 1); });
  }
}

TEST_CASE("decoded images leave nothing in the folder they are in") {
  const TempDir folder;
  const EnvironmentVariable temporary("TMPDIR", folder.path().string());
  const at::Tensor images = numbered(3, 4);
  const ImageStore store = on_disk(images);
  CHECK(std::filesystem::is_empty(folder.path()));
  CHECK(at::equal(store.range(0, 3), images));
}

TEST_CASE("a disk without room, or without the folder, is known before anything is decoded") {
  const TempDir folder;
  const EnvironmentVariable temporary("TMPDIR", folder.path().string());
  check_error(ExitCode::output, {folder.path().string(), "10000000", "MiB", "TMPDIR"},
              [] { (void)ImageStore(10'000'000, 4096); });
  check_error(ExitCode::input, {"0 pixels"}, [] { (void)ImageStore(1, 0); });
  const EnvironmentVariable nowhere("TMPDIR", "/nowhere");
  check_error(ExitCode::output, {"/nowhere", "No such file", "TMPDIR"}, [] { (void)ImageStore(1, 4); });
}

}  // namespace
}  // namespace pyra::data
