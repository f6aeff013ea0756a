#include "kernels/cuda/gemm_cache.h"

#include <fstream>

#include "catch.h"
#include "support.h"

using pyra::kernels::cuda::AlgorithmWords;
using pyra::kernels::cuda::GemmCache;

namespace {

const AlgorithmWords kWords{1, 2, 0xffffffffffffffff, 4, 5, 6, 7, 0x123456789abcdef0};

std::string text_of(const std::filesystem::path& path) {
  std::ifstream in(path);
  return {std::istreambuf_iterator<char>(in), {}};
}

}  // namespace

TEST_CASE("chosen algorithms outlive the process, for the same device and libraries", "[cuda]") {
  const pyra::test::TempDir folder;
  const auto file = folder / "deep/er/gemm.tsv";
  GemmCache first(file, "H100 driver 13000");
  CHECK_FALSE(first.find("1, 2, 3"));
  first.add("1, 2, 3", kWords);
  first.save();
  CHECK(GemmCache(file, "H100 driver 13000").find("1, 2, 3") == kWords);
  CHECK_FALSE(GemmCache(file, "H100 driver 13010").find("1, 2, 3"));
  const std::string before = text_of(file);
  first.save();  // nothing is new
  CHECK(text_of(file) == before);
}

TEST_CASE("what two processes choose for a shape stays as each chose it, in the file as the first did", "[cuda]") {
  const pyra::test::TempDir folder;
  const auto file = folder / "gemm.tsv";
  const AlgorithmWords other{9, 9, 9, 9, 9, 9, 9, 9};
  GemmCache first(file, "v"), second(file, "v");
  first.add("both", kWords);
  second.add("both", other);
  second.add("second's", other);
  first.save();
  second.save();
  CHECK(first.find("both") == kWords);
  CHECK(second.find("both") == other);
  const GemmCache later(file, "v");
  CHECK(later.find("both") == kWords);
  CHECK(later.find("second's") == other);
}

TEST_CASE("a damaged file of algorithms is ignored, line by line", "[cuda]") {
  const pyra::test::TempDir folder;
  const auto file = folder / "gemm.tsv";
  GemmCache good(file, "v");
  good.add("shape", kWords);
  good.save();
  const std::string line = text_of(file);
  const std::string spoilt = GENERATE("v\tother\t1 2 3\n", "v\tother\tzz 2 3 4 5 6 7 8\n", "v other\n", "\t\t\n", "\n",
                                      "v\tother\t1 2 3 4 5 6 7 fffffffffffffffff\n");
  std::ofstream(file) << spoilt << line << spoilt;
  const GemmCache cache(file, "v");
  CHECK(cache.find("shape") == kWords);
  CHECK_FALSE(cache.find("other"));
}

TEST_CASE("a file that is too large, or cannot be written, is no error", "[cuda]") {
  const pyra::test::TempDir folder;
  const auto file = folder / "gemm.tsv";
  std::ofstream(file) << std::string(5 << 20, 'x');
  CHECK_FALSE(GemmCache(file, "v").find("x"));
  GemmCache nowhere("/proc/no/such/gemm.tsv", "v");
  nowhere.add("shape", kWords);
  CHECK_NOTHROW(nowhere.save());
  CHECK(nowhere.find("shape") == kWords);
}
