#include "io/safetensors.h"

#include <ATen/ATen.h>
#include <sys/resource.h>
#include <unistd.h>

#include "base/philox.h"
#include "io_support.h"
#include "support.h"

namespace pyra::io {
namespace {

using test::check_error;
using test::get;
using test::golden;
using test::put;
using test::safetensors_bytes;

/// The tensors of tests/data/io/python_library.safetensors, which the Python package safetensors wrote.
sdk::TensorMap library_tensors() {
  const std::map<std::string, at::ScalarType> kinds{{"u8", at::kByte},       {"i8", at::kChar},   {"i16", at::kShort},
                                                    {"i32", at::kInt},       {"i64", at::kLong},  {"f16", at::kHalf},
                                                    {"bf16", at::kBFloat16}, {"f32", at::kFloat}, {"f64", at::kDouble}};
  const at::Tensor counting = at::arange(6).reshape({2, 3});
  sdk::TensorMap tensors;
  for (const auto& [name, type] : kinds)
    tensors["kind." + name] = (type == at::kByte ? counting : counting - 2).to(type);
  tensors["kind.bool"] = counting % 2 == 1;
  tensors["scalar"] = at::scalar_tensor(3.5, at::kFloat);
  tensors["empty"] = at::zeros({0, 4});
  tensors["special"] = at::tensor({NAN, INFINITY, -0.0f});
  tensors["näme \"quoted\" \\ and\ttab"] = at::tensor({1, 2}, at::kLong);
  return tensors;
}

/// Equal to the bit: NaN and -0 included.
bool same_bits(const at::Tensor& a, const at::Tensor& b) {
  return a.scalar_type() == b.scalar_type() && a.sizes() == b.sizes() &&
         std::string_view(static_cast<const char*>(a.data_ptr()), a.nbytes()) ==
             std::string_view(static_cast<const char*>(b.data_ptr()), b.nbytes());
}

void check_same(const sdk::TensorMap& got, const sdk::TensorMap& expected) {
  REQUIRE(got.size() == expected.size());
  for (const auto& [name, tensor] : expected) {
    INFO(name);
    REQUIRE(got.contains(name));
    CHECK(same_bits(got.at(name), tensor));
  }
}

/// One U8 tensor "a" described by `fields`, with two bytes of data.
std::string one(const std::string& fields) {
  return safetensors_bytes("{\"a\":{" + fields + "}}", "xy");
}

struct Hostile {
  std::string name, bytes, words;
};

std::vector<Hostile> hostile_files() {
  const std::string good = get(std::filesystem::path(PYRA_TEST_DATA) / "io/python_library.safetensors");
  const std::string fields = R"("dtype":"U8","shape":[2],"data_offsets":[0,2])";
  const std::string deep(100'000, '[');
  std::string deep_objects;
  for (int i = 0; i < 100'000; ++i) deep_objects += R"({"a":)";
  std::string ones;
  for (int i = 0; i < 64; ++i) ones += ",1";
  std::string tar(512, '\0');
  tar.replace(257, 5, "ustar");
  return {
      {"empty", "", "is empty"},
      {"one byte", "x", "only 1 bytes"},
      {"cut in the length", good.substr(0, 7), "only 7 bytes"},
      {"cut after the length", good.substr(0, 8), "short by at least"},
      {"cut in the header", good.substr(0, 100), "short by at least"},
      {"cut at the header's end", good.substr(0, 8 + 960), "short by"},
      {"cut by one byte", good.substr(0, good.size() - 1), "short by 1 bytes"},
      {"longer by one byte", good + "x", "1 bytes follow"},
      {"header length 0", test::little_endian(0), "does not open with '{'"},
      {"header length 0 with data", test::little_endian(0) + "{}", "does not open with '{'"},
      {"header length 2^62", test::little_endian(uint64_t{1} << 62) + "{}", "4611686018427387904 bytes long"},
      {"header length 2^64-1", test::little_endian(~uint64_t{0}) + "{}", "the limit is 100000000"},
      {"header length just over the limit", test::little_endian(100'000'001) + "{}", "the limit is"},
      {"header length beyond the file", test::little_endian(3) + "{}", "short by at least 1 bytes"},
      {"header of spaces", safetensors_bytes("        "), "does not open with '{'"},
      {"no JSON", safetensors_bytes("{a}"), "not valid JSON"},
      {"JSON and more", safetensors_bytes("{}{}"), "not valid JSON"},
      {"JSON, NUL and more", safetensors_bytes(std::string("{}\0[", 4)), "NUL byte"},
      {"byte order mark", safetensors_bytes("\xEF\xBB\xBF{}"), "does not open with '{'"},
      {"an array", safetensors_bytes("[]"), "does not open with '{'"},
      {"100 000 brackets", safetensors_bytes("{\"a\":" + deep), "expected an object"},
      {"100 000 brackets in a shape", one(R"("shape":)" + deep), "an array"},
      {"100 000 objects", safetensors_bytes(deep_objects), "unknown field"},
      {"invalid UTF-8", safetensors_bytes("{\"\xff\xfe\":{" + fields + "}}", "xy"), "UTF-8"},
      {"lone surrogate", safetensors_bytes("{\"\\ud800\":{" + fields + "}}", "xy"), "surrogate"},
      {"duplicate tensor", safetensors_bytes("{\"a\":{" + fields + "},\"a\":{" + fields + "}}", "xy"),
       "'a' stands twice"},
      {"duplicate tensor, escaped", safetensors_bytes("{\"a\":{" + fields + "},\"\\u0061\":{" + fields + "}}", "xy"),
       "'a' stands twice"},
      {"duplicate metadata", safetensors_bytes(R"({"__metadata__":{},"__metadata__":{}})"), "stands twice"},
      {"duplicate metadata key", safetensors_bytes(R"({"__metadata__":{"k":"1","k":"2"}})"), "'k' stands twice"},
      {"duplicate field", one(R"("dtype":"U8",)" + fields), "'dtype' stands twice"},
      {"metadata a list", safetensors_bytes(R"({"__metadata__":[]})"), "is an array, expected an object"},
      {"metadata null", safetensors_bytes(R"({"__metadata__":null})"), "is null, expected an object"},
      {"metadata holds a number", safetensors_bytes(R"({"__metadata__":{"k":1}})"), "metadata 'k' is a number"},
      {"metadata holds an object", safetensors_bytes(R"({"__metadata__":{"k":{}}})"), "metadata 'k' is an object"},
      {"tensor is a string", safetensors_bytes(R"({"a":"b"})"), "'a' is a string, expected an object"},
      {"no fields", one(""), "no dtype"},
      {"no shape", one(R"("dtype":"U8","data_offsets":[0,2])"), "no shape"},
      {"no offsets", one(R"("dtype":"U8","shape":[2])"), "no data_offsets"},
      {"unknown field", one(fields + R"(,"stride":[1])"), "unknown field 'stride'"},
      {"unknown dtype", one(R"("dtype":"U9","shape":[2],"data_offsets":[0,2])"), "unknown dtype 'U9'"},
      {"dtype a number", one(R"("dtype":8,"shape":[2],"data_offsets":[0,2])"), "dtype is a number"},
      {"shape a number", one(R"("dtype":"U8","shape":2,"data_offsets":[0,2])"), "shape is a number, expected an array"},
      {"negative dimension", one(R"("dtype":"U8","shape":[-2],"data_offsets":[0,2])"), "negative number -2"},
      {"fractional dimension", one(R"("dtype":"U8","shape":[2.0],"data_offsets":[0,2])"), "2.0"},
      {"dimension of 2^63", one(R"("dtype":"U8","shape":[9223372036854775808],"data_offsets":[0,2])"), "too large"},
      {"dimension of 2^64", one(R"("dtype":"U8","shape":[18446744073709551616],"data_offsets":[0,2])"),
       "no integer of 64 bits"},
      {"shape product overflow", one(R"("dtype":"U8","shape":[4294967296,4294967296,2],"data_offsets":[0,2])"),
       "no size"},
      {"shape product overflow beside a zero",
       safetensors_bytes(
           R"({"a":{"dtype":"U8","shape":[0,4611686018427387904,4611686018427387904],"data_offsets":[0,0]}})"),
       "no size"},
      {"byte count overflow", one(R"("dtype":"F64","shape":[4611686018427387904],"data_offsets":[0,2])"), "no size"},
      {"half a byte", one(R"("dtype":"F4","shape":[3],"data_offsets":[0,2])"), "no size"},
      {"65 dimensions", one(R"("dtype":"U8","shape":[2)" + ones + R"(],"data_offsets":[0,2])"),
       "more than 64 dimensions"},
      {"bytes not shape x dtype", one(R"("dtype":"U8","shape":[3],"data_offsets":[0,2])"), "takes 3 bytes"},
      {"negative offset", one(R"("dtype":"U8","shape":[2],"data_offsets":[-1,1])"), "negative number -1"},
      {"fractional offset", one(R"("dtype":"U8","shape":[2],"data_offsets":[0,2.0])"), "2.0"},
      {"offset as text", one(R"("dtype":"U8","shape":[2],"data_offsets":[0,"2"])"), "data_offsets holds a string"},
      {"one offset", one(R"("dtype":"U8","shape":[2],"data_offsets":[2])"), "1 numbers, expected 2"},
      {"three offsets", one(R"("dtype":"U8","shape":[2],"data_offsets":[0,1,2])"), "more than two"},
      {"descending offsets", one(R"("dtype":"U8","shape":[2],"data_offsets":[2,0])"), "run backwards"},
      {"offsets beyond the end", one(R"("dtype":"U8","shape":[1000000],"data_offsets":[0,1000000])"),
       "short by 999998 bytes"},
      {"offsets of 2^64-1",
       one(R"("dtype":"U8","shape":[2],"data_offsets":[18446744073709551613,18446744073709551615])"), "a hole"},
      {"a hole at the start", one(R"("dtype":"U8","shape":[1],"data_offsets":[1,2])"), "begin at 1, expected 0"},
      {"a hole between",
       safetensors_bytes(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                         R"("b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}})",
                         "xyz"),
       "a hole"},
      {"an overlap",
       safetensors_bytes(R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},)"
                         R"("b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}})",
                         "xyz"),
       "overlaps"},
      {"a tail", one(R"("dtype":"U8","shape":[1],"data_offsets":[0,1])"), "1 bytes follow"},
      {"a bool of 2", safetensors_bytes(R"({"a":{"dtype":"BOOL","shape":[1],"data_offsets":[0,1]}})", "\x02"),
       "other than 0 and 1"},
      {"a dtype LibTorch lacks",
       safetensors_bytes(R"({"a":{"dtype":"F8_E8M0","shape":[1],"data_offsets":[0,1]}})", "x"), "is F8_E8M0"},
      {"a PyTorch zip", std::string("PK\x03\x04\0\0\x08\x08", 8) + std::string(100, 'x'), "a PyTorch .pth or .pt"},
      {"a pickle", "\x80\x02}q\x01X\x05model", "Python pickle"},
      {"a Git LFS pointer", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"},
      {"an HTML page", "\n<!DOCTYPE HTML><html>404</html>", "HTML page"},
      {"gzip", "\x1f\x8b\x08 some compressed bytes", "gzip"},
      {"tar", tar, "tar archive"},
      {"JSON", "{\"weight_map\": {\"a\": \"b\"}}", "JSON text"},
      {"noise", "\x01\x02\x03\x04\x05\x06\x07\x08\x09", "not a safetensors file"},
  };
}

}  // namespace

TEST_CASE("a file of the Python library is read to the bit, and ours is the same file") {
  const test::TempDir dir;
  const auto reference = std::filesystem::path(PYRA_TEST_DATA) / "io/python_library.safetensors";
  const SafetensorsFile file(reference);
  check_same(file.tensors(), library_tensors());
  CHECK(file.metadata() == Metadata{{"format", "pt"}});
  CHECK(file.entries().at("kind.bf16").dtype == "BF16");
  CHECK(file.entries().at("kind.bf16").shape == std::vector<int64_t>{2, 3});
  CHECK(file.contains("scalar"));
  CHECK_FALSE(file.contains("Scalar"));

  write_safetensors(dir / "ours", library_tensors());
  CHECK(get(dir / "ours") == get(reference));
}

TEST_CASE("every golden survives being written and read") {
  const test::TempDir dir;
  int files = 0;
  for (const auto& item : std::filesystem::directory_iterator(golden(""))) {
    if (item.path().extension() != ".safetensors") continue;
    INFO(item.path());
    const SafetensorsFile file(item.path());
    write_safetensors(dir / "copy", file.tensors(), file.metadata());
    const SafetensorsFile copy(dir / "copy");
    check_same(copy.tensors(), file.tensors());
    CHECK(copy.metadata().at("describe") == file.metadata().at("describe"));
    CHECK(copy.metadata().at("format") == "pt");
    // Both put the same tensors in the same order.
    for (const auto& [name, entry] : file.entries()) CHECK(copy.entries().at(name).begin == entry.begin);
    ++files;
  }
  CHECK(files >= 10);
}

TEST_CASE("views, transposes and tensors that train are written by value") {
  const test::TempDir dir;
  const at::Tensor base = at::arange(12, at::kFloat).reshape({3, 4});
  const at::Tensor trained = at::ones({2}).requires_grad_();
  write_safetensors(dir / "f", {{"t", base.t()}, {"column", base.select(1, 2)}, {"trained", trained}});
  const SafetensorsFile file(dir / "f");
  CHECK(same_bits(file.tensor("t"), base.t().contiguous()));
  CHECK(same_bits(file.tensor("column"), at::tensor({2.f, 6.f, 10.f})));
  CHECK_FALSE(file.tensor("trained").requires_grad());
}

TEST_CASE("equal contents give equal bytes, and no tensors at all is a file too") {
  const test::TempDir dir;
  const sdk::TensorMap tensors{{"b", at::ones({3}, at::kHalf)}, {"a", at::zeros({2})}, {"c", at::ones({1}, at::kLong)}};
  write_safetensors(dir / "1", tensors, {{"z", "1"}, {"a", "2"}});
  write_safetensors(dir / "2", tensors, {{"a", "2"}, {"z", "1"}});
  CHECK(get(dir / "1") == get(dir / "2"));
  CHECK(uint64_t(get(dir / "1")[0]) % 8 == 0);
  write_safetensors(dir / "none", {});
  CHECK(SafetensorsFile(dir / "none").entries().empty());
}

TEST_CASE("white space around the header is legal, as the format's own reader takes it") {
  const test::TempDir dir;
  put(dir / "f",
      safetensors_bytes(" \n\t{\"a\" : {\"data_offsets\":[0,2], \"shape\":[ 2 ], \"dtype\":\"U8\"}}\r\n  ", "xy"));
  CHECK(same_bits(SafetensorsFile(dir / "f").tensor("a"), at::tensor({int64_t{'x'}, int64_t{'y'}}, at::kByte)));
}

TEST_CASE("hostile files are refused with one message that names the file and what is wrong") {
  const test::TempDir dir;
  const auto cases = hostile_files();
  CHECK(cases.size() >= 40);
  for (const Hostile& hostile : cases) {
    INFO(hostile.name);
    const auto path = dir / "hostile.safetensors";
    put(path, hostile.bytes);
    check_error(ExitCode::input, {path.string(), hostile.words}, [&] { (void)SafetensorsFile(path).tensors(); });
    const auto error = test::error_of([&] { (void)SafetensorsFile(path).tensors(); });
    CHECK(std::string(error->what()).size() < 600);
    CHECK(std::string(error->what()).find('\n') == std::string::npos);
  }
}

TEST_CASE("a missing file, a folder and a device are input errors") {
  const test::TempDir dir;
  check_error(ExitCode::input, {"none", "No such file"}, [&] { SafetensorsFile(dir / "none"); });
  check_error(ExitCode::input, {dir.path().string(), "is a folder"}, [&] { SafetensorsFile(dir.path()); });
  check_error(ExitCode::input, {"/dev/zero", "not a regular file"}, [&] { SafetensorsFile("/dev/zero"); });
  check_error(ExitCode::input, {"vit_dense.safetensors", "has no tensor 'none'"},
              [&] { (void)SafetensorsFile(golden("vit_dense.safetensors")).tensor("none"); });
}

TEST_CASE("control characters of a hostile name do not reach the terminal") {
  const test::TempDir dir;
  put(dir / "f", safetensors_bytes(R"({"\u001b[2Jx":{"dtype":"U8","shape":[3],"data_offsets":[0,2]}})", "xy"));
  check_error(ExitCode::input, {"\\x1b[2Jx"}, [&] { SafetensorsFile(dir / "f"); });
}

TEST_CASE("a file that shrinks after it was opened is an error, not a crash") {
  const test::TempDir dir;
  write_safetensors(dir / "f", {{"a", at::ones({1000})}});
  const SafetensorsFile file(dir / "f");
  std::filesystem::resize_file(dir / "f", 2000);
  check_error(ExitCode::input, {"became shorter while it was read"}, [&] { (void)file.tensor("a"); });
}

TEST_CASE("writing over a file that is being read leaves the reader with the old one") {
  const test::TempDir dir;
  write_safetensors(dir / "f", {{"a", at::ones({1000})}});
  const SafetensorsFile file(dir / "f");
  write_safetensors(dir / "f", {{"a", at::zeros({10})}});
  CHECK(same_bits(file.tensor("a"), at::ones({1000})));
  CHECK(same_bits(SafetensorsFile(dir / "f").tensor("a"), at::zeros({10})));
}

TEST_CASE("a header that claims much takes no memory for it") {
  const test::TempDir dir;
  // 20 MB of tensors that all claim terabytes: refused at the limit on their number, or when they do not fit.
  std::string header = "{";
  for (int i = 0; i < 90'000; ++i) {
    header += cat(i ? "," : "", "\"", i, R"(":{"dtype":"F64","shape":[1099511627776],"data_offsets":[)",
                  int64_t{i} << 43, ",", int64_t{i + 1} << 43, "]}");
  }
  put(dir / "claims", safetensors_bytes(header + "}"));
  const auto peak_kib = [] {
    rusage usage{};
    getrusage(RUSAGE_SELF, &usage);
    return usage.ru_maxrss;
  };
  const auto before = peak_kib();
  check_error(ExitCode::input, {"short by 791648371998720"}, [&] { SafetensorsFile(dir / "claims"); });
  CHECK(peak_kib() - before < (64 << 10) + 2 * int64_t(header.size() >> 10));

  std::string many = "{";
  for (int i = 0; i <= 100'000; ++i)
    many += cat(i ? "," : "", "\"", i, R"(":{"dtype":"U8","shape":[0],"data_offsets":[0,0]})");
  put(dir / "many", safetensors_bytes(many + "}"));
  check_error(ExitCode::input, {"more than 100000 tensors"}, [&] { SafetensorsFile(dir / "many"); });
}

TEST_CASE("mutated files are read or refused, nothing else") {
  const test::TempDir dir;
  const std::string source = GENERATE(get(golden("diffrate_search_step.safetensors")),
                                      get(std::filesystem::path(PYRA_TEST_DATA) / "io/python_library.safetensors"));
  const Philox random(7, RandomStream::split, source.size());
  const std::string tokens[] = {"{", "}", "[",   "]",    "\"",      ",",    ":",   "-",
                                "0", "9", "1e9", "null", "\\u0000", "\xff", "F64", "F4"};
  const size_t header_end = 8 + size_t(uint8_t(source[0]) | uint8_t(source[1]) << 8);
  uint64_t draw = 0;
  int accepted = 0, refused = 0;
  for (int round = 0; round < 2500; ++round) {
    std::string bytes = source;
    const auto place = [&] { return size_t(random.below(draw++, header_end)); };
    for (uint64_t edits = 1 + random.below(draw++, 3); edits-- > 0;) {
      switch (random.below(draw++, 5)) {
        case 0:
          bytes[place()] = char(random.word(draw++));
          break;
        case 1:
          bytes[place()] = char('0' + random.below(draw++, 10));
          break;
        case 2:
          bytes.insert(place(), tokens[random.below(draw++, std::size(tokens))]);
          break;
        case 3:
          bytes.erase(place(), 1 + random.below(draw++, 4));
          break;
        default:
          bytes.resize(random.below(draw++, bytes.size() + 16)), bytes.resize(std::max(bytes.size(), header_end));
      }
    }
    put(dir / "mutated", bytes);
    const auto error = test::error_of([&] { (void)SafetensorsFile(dir / "mutated").tensors(); });
    if (error && error->code() != ExitCode::input) FAIL("round " << round << ": " << error->what());
    ++(error ? refused : accepted);
  }
  CHECK(refused > 1000);
  CHECK(accepted > 0);
}

}  // namespace pyra::io
