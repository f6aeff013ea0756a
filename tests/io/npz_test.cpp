// Google's .npz files in all their layouts against timm's loader (tests/data/npz/make.py), and hostile ones made here.
#include "io/npz.h"

#include <ATen/ATen.h>

#include "io/augreg_model.h"
#include "io/io_support.h"
#include "io/safetensors.h"
#include "io/zip_writer.h"
#include "nn/vit.h"
#include "support.h"

using namespace pyra;
using namespace pyra::io;
using test::check_error;
using test::little;
namespace fs = std::filesystem;

namespace {

const fs::path kNpzFiles = fs::path(PYRA_TEST_DATA) / "npz";

std::string npy(const std::string& header, const std::string& data, int version = 1) {
  return std::string("\x93NUMPY", 6) + char(version) + '\0' + little(header.size(), version == 1 ? 2 : 4) + header +
         data;
}

const std::string kGood = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }";

/// A file of one array that must be refused with these words.
void refused_npz(const std::vector<test::ZipEntry>& entries, std::vector<std::string> words) {
  const test::TempDir dir;
  test::put(dir / "m.npz", test::zip_bytes(entries));
  words.push_back("m.npz");
  INFO(join(words));
  check_error(ExitCode::input, words, [&] { (void)NpzFile(dir / "m.npz"); });
}

void refused_header(const std::string& header, const std::vector<std::string>& words) {
  refused_npz({{.name = "w.npy", .bytes = npy(header, std::string(24, '\0'))}}, words);
}

std::string header_of(const std::string& descr, const std::string& shape) {
  return cat("{'descr': '", descr, "', 'fortran_order': False, 'shape': ", shape, "}");
}

}  // namespace

TEST_CASE("Google's files give the logits that timm gives for them", "[npz]") {
  const at::NoGradGuard no_gradients;
  const SafetensorsFile expected(kNpzFiles / "expected.safetensors");
  for (const auto& [file, logits] :
       std::vector<std::pair<std::string, std::string>>{{"augreg.npz", "augreg"},
                                                        {"opt_target.npz", "target"},
                                                        {"big_vision.npz", "big_vision"},
                                                        {"big_vision_stacked.npz", "stacked"}}) {
    CAPTURE(file);
    CHECK(is_npz(kNpzFiles / file));
    const ModelFile model = read_model(kNpzFiles / file);
    CHECK(model.config.num_heads == 2);
    CHECK(model.config.depth == 2);
    CHECK(model.config.num_classes == 5);
    CHECK(model.config.norm_eps == 1e-6);
    CHECK(model.preprocess.mean == std::array{0.5f, 0.5f, 0.5f});
    const at::Tensor got = nn::Vit(model.config, model.weights).forward(expected.tensor("images"));
    CHECK(test::max_difference(got, expected.tensor(logits)) < 1e-5);
  }
  CHECK(read_model(kNpzFiles / "augreg.npz", {.image_size = 64}).config.tokens() == 65);
  CHECK_FALSE(is_npz(kNpzFiles / "expected.safetensors"));
  CHECK_FALSE(is_npz(kNpzFiles / "../pth/vit_zip.pth"));
  CHECK_FALSE(is_npz(kNpzFiles));
  CHECK_FALSE(is_npz(kNpzFiles / "none"));
}

TEST_CASE("an .npy header is a dict of three keys", "[npz]") {
  const NpyHeader header = parse_npy_header(kGood, "w");
  CHECK(header.shape == std::vector<int64_t>{2, 3});
  CHECK(header.dtype == at::kFloat);
  CHECK(header.bytes == 24);
  CHECK_FALSE(header.fortran_order);
  CHECK(parse_npy_header("{\"shape\": (5,), \"descr\": \"|V2\", \"fortran_order\": True}  \n", "w").dtype ==
        at::kBFloat16);
  CHECK(parse_npy_header(header_of("<f8", "()"), "w").bytes == 8);
  CHECK(parse_npy_header(header_of("<f2", "(0, 7)"), "w").bytes == 0);
  CHECK_FALSE(parse_npy_header(header_of("<i8", "()"), "w").dtype);

  refused_header("", {"expected '{'"});
  refused_header("{}", {"'descr' is missing"});
  refused_header("{'descr': '<f4', 'fortran_order': False}", {"'shape' is missing"});
  refused_header("{'descr': '<f4', 'descr': '<f4'}", {"'descr' stands twice"});
  refused_header("{'descr': '<f4', 'other': 1}", {"'other' is not one of"});
  refused_header(kGood + "x", {"more text follows"});
  refused_header("{'descr': '<f4'", {"expected '}'"});
  refused_header("{'descr': '<f4", {"does not end"});
  refused_header("{'descr': '\\x3cf4'}", {"backslash"});
  refused_header("{'descr': [('a', '<f4')]}", {"structures"});
  refused_header("{'descr': __import__('os')}", {"quoted word"});
  refused_header("{'fortran_order': 1}", {"neither True nor False"});
  refused_header(header_of("|O", "(3,)"), {"Python objects", "w.npy"});
  refused_header(header_of("O", "(3,)"), {"Python objects"});
  refused_header(header_of(">f4", "(6,)"), {"big-endian"});
  refused_header(header_of("<c8", "(3,)"), {"'<c8' are not read"});
  refused_header(header_of("<f4", "(-6,)"), {"no number from 0"});
  refused_header(header_of("<f4", "(6.0,)"), {"expected ')'"});
  refused_header(header_of("<f4", "(6L,)"), {"expected ')'"});
  refused_header(header_of("<f4", "(99999999999999999999,)"), {"no number from 0"});
  refused_header(header_of("<f4", "(4294967296, 4294967296)"), {"no size that can be held"});
  refused_header(header_of("<f4", "(9223372036854775807, 3)"), {"no size that can be held"});
  refused_header(header_of("<f4", "(0, 9223372036854775807)"), {"no size that can be held"});
  refused_header(header_of("<f4", "(1, 1, 1, 1, 1, 1, 1, 1, 6)"), {"more than 8 sizes"});
  refused_header(header_of("<f4", "(7,)"), {"takes 28 bytes, but its entry holds 24"});
  refused_header(header_of("<f4", "(5,)"), {"takes 20 bytes, but its entry holds 24"});
}

TEST_CASE("entries are .npy files of a version that is known, and no bombs", "[npz]") {
  const std::string good = npy(kGood, std::string(24, '\0'));
  const test::TempDir dir;
  test::put(dir / "two.npz", test::zip_bytes({{.name = "w.npy", .bytes = npy(kGood, std::string(24, '\0'), 2)}}));
  CHECK(NpzFile(dir / "two.npz").read([](const std::string&) { return true; }).at("w").numel() == 6);

  refused_npz({{.name = "w.npy", .bytes = npy(kGood, std::string(24, '\0'), 3)}}, {"version 3.0"});
  refused_npz({{.name = "w.npy", .bytes = "no array"}}, {"does not open with"});
  refused_npz({{.name = "w.npy", .bytes = good.substr(0, 40)}}, {"too few"});
  refused_npz({{.name = "w.npy", .bytes = "x"}}, {"too few"});
  refused_npz({{.name = "w.npy", .bytes = good}, {.name = "readme", .bytes = "x"}}, {"readme", "no .npy file"});
  refused_npz({{.name = "w.npy", .bytes = good}, {.name = "w.npy", .bytes = good}}, {"twice"});
  refused_npz({{.name = "w.npy", .bytes = good, .stated_size = 0xfffffff0}}, {"zip bomb"});
  refused_npz({{.name = "w.npy", .bytes = good, .flags = 1}}, {"w.npy"});
  refused_npz({}, {});
  std::vector<test::ZipEntry> many;
  for (size_t i = 0; i <= kMaxNpzEntries; ++i) many.push_back({.name = cat(i, ".npy"), .bytes = good});
  refused_npz(many, {"more than 10000 entries"});
  check_error(ExitCode::input, {"bomb.npz", "zip bomb"}, [] { (void)read_model(kNpzFiles / "bomb.npz"); });

  test::put(dir / "crc.npz", test::zip_bytes({{.name = "w.npy", .bytes = good, .bad_checksum = true}}));
  check_error(ExitCode::input, {"w.npy", "CRC"},
              [&] { (void)NpzFile(dir / "crc.npz").read([](const std::string&) { return true; }); });
  const std::string whole = test::get(kNpzFiles / "augreg.npz");
  for (size_t length = 100; length + 22 < whole.size(); length += 997) {
    CAPTURE(length);
    test::put(dir / "cut.npz", whole.substr(0, length));
    const auto error = test::error_of([&] { (void)read_model(dir / "cut.npz"); });
    REQUIRE(error);
    CHECK(error->code() == ExitCode::input);
  }
}

TEST_CASE("arrays that make no ViT are refused by name", "[npz]") {
  const test::TempDir dir;
  const auto write = [&](const std::string& changed, const std::string& header, const std::string& data) {
    std::vector<test::ZipEntry> entries;
    const NpzFile good(kNpzFiles / "augreg.npz");
    for (const auto& [name, tensor] : good.read([](const std::string&) { return true; })) {
      if (name == changed) continue;
      const std::string shape = cat("(", join(good.arrays().at(name).shape), ",)");
      entries.push_back(
          {.name = name + ".npy",
           .bytes = npy(header_of("<f4", shape), {static_cast<const char*>(tensor.data_ptr()), tensor.nbytes()})});
    }
    if (!header.empty()) entries.push_back({.name = changed + ".npy", .bytes = npy(header, data)});
    test::put(dir / "m.npz", test::zip_bytes(entries));
  };
  const auto refused_change = [&](const std::string& name, const std::string& header, size_t bytes,
                                  std::vector<std::string> words) {
    write(name, header, std::string(bytes, '\0'));
    words.push_back("m.npz");
    INFO(join(words));
    check_error(ExitCode::input, words, [&] { (void)read_model(dir / "m.npz"); });
  };
  write("", "", "");
  CHECK(read_model(dir / "m.npz").config.num_classes == 5);
  write("head/kernel", "", "");
  check_error(ExitCode::input, {"'head/bias'"}, [&] { (void)read_model(dir / "m.npz"); });

  refused_change("embedding/kernel", "", 0, {"has no array 'embedding/kernel'"});
  refused_change("embedding/kernel", header_of("<f4", "(8, 8, 1, 16)"), 4096, {"'embedding/kernel' has shape"});
  refused_change("cls", "", 0, {"has no array 'cls'"});
  refused_change("cls", header_of("<i4", "(1, 1, 16)"), 64, {"cls.npy", "'<i4'"});
  refused_change("Transformer/encoderblock_1/LayerNorm_2/scale", "", 0,
                 {"has no array 'Transformer/encoderblock_1/LayerNorm_2/scale'"});
  const std::string query = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel";
  refused_change(query, header_of("<f4", "(16, 3, 8)"), 1536, {query, "3 heads of 8 channels"});
  refused_change("MAPHead_0/probe", header_of("<f4", "(1, 1, 16)"), 64, {"'MAPHead_0/probe' is none"});
}
