#include "fuzz/targets.h"

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <fstream>
#include <iterator>

#include "base/error.h"
#include "data/dataset.h"
#include "data/image.h"
#include "io/model_file.h"
#include "io/peft_adapter.h"
#include "io/recipe.h"
#include "io/safetensors.h"
#include "io/torch_file.h"

namespace pyra::fuzz {
namespace {

namespace fs = std::filesystem;
const fs::path kData = PYRA_TEST_DATA, kRecipes = fs::path(PYRA_SOURCE_DIR) / "recipes";

std::string get(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) throw std::runtime_error("no file " + path.string());
  return {std::istreambuf_iterator<char>(in), {}};
}

void put(const fs::path& path, const std::string& bytes) {
  fs::remove(path);
  std::ofstream(path, std::ios::binary).write(bytes.data(), std::streamsize(bytes.size()));
}

std::vector<std::string> get_all(const fs::path& folder, const std::vector<std::string>& names) {
  std::vector<std::string> files;
  for (const std::string& name : names) files.push_back(get(folder / name));
  return files;
}

/// The files in a folder whose names end so, in a fixed order.
std::vector<std::string> get_images(const std::string& end) {
  std::vector<fs::path> paths;
  for (const auto& item : fs::directory_iterator(kData / "pillow/images"))
    if (item.path().extension() == end) paths.push_back(item.path());
  std::ranges::sort(paths);
  std::vector<std::string> files;
  for (const fs::path& path : paths) files.push_back(get(path));
  return files;
}

void check(bool good, const std::string& what) {
  if (!good) throw Finding("read although " + what);
}

/// The first and the last byte of each: a sanitizer sees what lies outside.
void touch(const sdk::TensorMap& tensors) {
  static volatile char seen = 0;
  for (const auto& [name, tensor] : tensors) {
    if (tensor.numel() == 0) continue;
    int64_t last = 0;
    for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
    const auto* first = static_cast<const char*>(tensor.const_data_ptr());
    seen = char(seen ^ first[0] ^ first[(last + 1) * int64_t(tensor.element_size()) - 1]);
  }
}

/// What can be read can be written, and is the same then.
void check_model(const io::ModelFile& model, const fs::path& folder) {
  touch(model.weights);
  const fs::path copy = folder / "copy.safetensors";
  try {
    io::write_model(copy, model);
    const io::ModelFile again = io::read_model(copy);
    check(again.weights.size() == model.weights.size(), "its copy has other tensors");
    check(again.class_names == model.class_names, "its copy has other classes");
  } catch (const Error& error) {
    throw Finding(std::string("read although it cannot be written and read again: ") + error.what());
  }
}

void read_safetensors(const fs::path& path, const std::string& bytes) {
  const io::SafetensorsFile file(path);
  uint64_t data = 0;
  for (const auto& [name, entry] : file.entries()) data += entry.end - entry.begin;
  uint64_t header = 0;
  for (size_t i = 0; i < 8; ++i) header |= uint64_t(static_cast<unsigned char>(bytes[i])) << (8 * i);
  check(8 + header + data == bytes.size(), "its tensors do not fill it");
  touch(file.tensors());
}

void read_checkpoint(const fs::path& path, const std::string& bytes) {
  const auto checkpoint = io::read_torch_file(path);
  uint64_t elements = 0;
  for (const auto& [name, tensor] : checkpoint.tensors) elements += uint64_t(tensor.numel());
  check(elements <= bytes.size(), "it has more elements than bytes");
  touch(checkpoint.tensors);
}

void read_image(const std::string& bytes) {
  const data::Image image = data::decode({reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size()}, "image");
  check(int64_t(image.pixels.size()) == image.height * image.width * 3, "its pixels are too few");
  nn::Preprocess preprocess;
  preprocess.size = preprocess.shorter = 8;
  if (image.height * image.width < 10'000) (void)data::prepare(image, preprocess);
}

void read_recipe(const fs::path& path) {
  const io::Recipe recipe = io::read_recipe(path, {});
  const fs::path copy = path.parent_path() / "copy.toml";
  put(copy, io::to_toml(recipe));
  try {
    check(
        io::read_recipe(copy, {}) ==
            [&] {
              io::Recipe same = recipe;
              same.file = copy;
              return same;
            }(),
        "its copy says something else");
  } catch (const Error& error) {
    throw Finding(std::string("read although it cannot be written and read again: ") + error.what());
  }
}

void read_dataset(const fs::path& path) {
  const auto set = data::Dataset::open(path);
  for (const std::string& split : set.splits()) {
    for (const data::Sample& sample : set.split(split)) {
      check(sample.label >= 0 && sample.label < set.num_classes(), "a label is beyond its classes");
      check(!sample.path.starts_with('/') && !sample.path.starts_with("../"), "a path leads out of it");
      try {
        (void)set.read(sample);
      } catch (const Error& error) {
        if (error.code() != ExitCode::input) throw;
      }
    }
  }
}

std::string demo_tar() {
  const std::string png = get(kData / "pillow/images/rgb8.png"), jpg = get(kData / "pillow/images/s444.jpg");
  return tar_bytes({{.name = "set/train800.txt", .bytes = "images/a.png 0\nimages/b.jpg 1\n"},
                    {.name = "set/test.txt", .bytes = "images/b.jpg 1\n\nimages/c d.png 0\r\n"},
                    {.name = "set/classes.txt", .bytes = "shirt\nshoe\n"},
                    {.name = "set/images/a.png", .bytes = png},
                    {.name = "set/images/b.jpg", .bytes = jpg},
                    {.name = "set/images/c d.png", .bytes = png}});
}

const std::vector<std::string> kSafetensorsWords{"\"__metadata__\":{},",
                                                 "\"dtype\":\"F32\",",
                                                 "\"shape\":[],",
                                                 "\"data_offsets\":[0,0],",
                                                 "F16",
                                                 "BF16",
                                                 "F64",
                                                 "I64",
                                                 "BOOL",
                                                 "F8_E4M3",
                                                 "F4",
                                                 "U8",
                                                 "\"\":{}",
                                                 "C64",
                                                 "head.weight",
                                                 "cls_token",
                                                 "pos_embed",
                                                 "dist_token"};
const std::vector<std::string> kPickleWords{"c__builtin__\neval\n",
                                            "R",
                                            "(",
                                            "t",
                                            "Q",
                                            "u",
                                            "s",
                                            "}",
                                            "]",
                                            "\x85",
                                            "\x86",
                                            "N",
                                            ".",
                                            "q\x01",
                                            "h\x01",
                                            "r\xff\xff\xff\x7f",
                                            "\x8a\x09",
                                            "X\xff\xff\xff\xff",
                                            "ctorch\nFloatStorage\n",
                                            "ccollections\nOrderedDict\n)R",
                                            "b",
                                            "\x94",
                                            "\x81"};
const std::vector<std::string> kNpyWords{"'descr': '<f4', ",
                                         "'shape': (1,), ",
                                         "True",
                                         "False",
                                         "|O",
                                         ">f4",
                                         "<f8",
                                         "|V2",
                                         "<f2",
                                         "()",
                                         "(3,)",
                                         "{",
                                         "}",
                                         "<i8",
                                         "embedding/kernel.npy",
                                         "head/bias.npy"};
const std::vector<std::string> kJsonWords{"\"num_heads\":1,",
                                          "\"hidden_size\":8,",
                                          "true",
                                          "false",
                                          "null",
                                          "LORA",
                                          "gelu",
                                          "\"mean\":[0,0,0],",
                                          "\"r\":4,",
                                          "\"rank_pattern\":{\"a|b*\":2},",
                                          "all-linear",
                                          "\"target_modules\":\"(.*a)*\",",
                                          "[[[[[[",
                                          "\"label_names\":[\"a\"],"};
const std::vector<std::string> kTomlWords{
    "train.", "[merge]\n", "[peft]\n",   "lr=[1,2]\n",         "seed=1\n", "'''",       "\"\"\"",
    "inf",    "nan",       "2020-01-01", "0x7fffffffffffffff", "[[a]]\n",  "a={b=1}\n", "mean=[1,1,1]\n"};
const std::vector<std::string> kListWords{"../",
                                          "/",
                                          "set/",
                                          " ",
                                          "\n",
                                          "0",
                                          "1",
                                          "-1",
                                          "99999999999999999999",
                                          "././@LongLink",
                                          "path=",
                                          "11 size=9999\n",
                                          "0 GNU.sparse.major=1\n"};
const std::vector<std::string> kPngWords{"IHDR", "PLTE", "tRNS", "IDAT", "IEND", "iCCP",
                                         "zTXt", "gAMA", "sBIT", "tEXt", "eXIf"};
const std::vector<std::string> kJpegWords{"\xff\xd8", "\xff\xd9", "\xff\xda", "\xff\xc0", "\xff\xc2",
                                          "\xff\xc4", "\xff\xdb", "\xff\xdd", "\xff\xee", "\xff\xd0"};
const std::vector<std::string> kPlainWords{"P5", "P6", "BM", " 255\n", "#", "\n"};

/// A reader of one file, `name`, in a folder where other files may lie.
template <class Read>
Target one_file(const std::string& title, const fs::path& path, std::vector<std::string> seeds,
                const std::vector<std::string>& words, decltype(Target::forge) forge, Read&& read) {
  return {.name = title,
          .seeds = std::move(seeds),
          .words = words,
          .forge = std::move(forge),
          .read =
              [path, read](const std::string& bytes) {
                put(path, bytes);
                read(path, bytes);
              },
          .named = path.filename().string()};
}

/// The same where the whole folder, a copy of `from`, is what is read.
template <class Read>
Target in_folder(const std::string& title, const fs::path& from, const fs::path& folder, const std::string& file,
                 const std::vector<std::string>& words, decltype(Target::forge) forge, Read&& read) {
  const fs::path copy = folder / title;
  fs::create_directories(copy);
  for (const auto& item : fs::directory_iterator(from)) fs::copy_file(item.path(), copy / item.path().filename());
  Target target = one_file(title, copy / file, {get(copy / file)}, words, std::move(forge),
                           [copy, read](const fs::path&, const std::string&) { read(copy); });
  target.named = copy.filename().string();
  return target;
}

void add_files(std::vector<Target>& targets, const fs::path& folder) {
  targets.push_back(
      one_file("safetensors", folder / "a.safetensors",
               {get(kData / "io/python_library.safetensors"), get(kData / "peft/hf_layers/adapter_model.safetensors")},
               kSafetensorsWords, forge_safetensors, read_safetensors));
  const auto model = [folder](const fs::path& path, const std::string&) { check_model(io::read_model(path), folder); };
  targets.push_back(
      one_file("timm", folder / "t.safetensors",
               get_all(kData, {"timm/deit3.safetensors", "timm/dinov2_reg.safetensors", "peft/timm_base.safetensors"}),
               kSafetensorsWords, forge_safetensors, model));
  io::write_model(folder / "ours.safetensors", io::read_model(kData / "peft/timm_base.safetensors"));
  targets.push_back(one_file("ours", folder / "o.safetensors", {get(folder / "ours.safetensors")}, kSafetensorsWords,
                             forge_safetensors, model));
  targets.push_back(
      one_file("npz", folder / "a.npz",
               get_all(kData / "npz", {"augreg.npz", "big_vision.npz", "opt_target.npz", "big_vision_stacked.npz"}),
               kNpyWords, forge_zip, model));
  targets.push_back(
      one_file("pth-zip", folder / "z.pth",
               get_all(kData / "pth", {"vit_zip.pth", "vit_views.pth", "vit_dtypes.pth", "pyra_trained.pth"}),
               kPickleWords, forge_zip, read_checkpoint));
  targets.push_back(one_file("pth-legacy", folder / "l.pth",
                             {get(kData / "pth/vit_legacy.pth"), get(kData / "pth/vit_legacy.pth").substr(0, 6000)},
                             kPickleWords, damage, read_checkpoint));
  targets.push_back(one_file(
      "pth-forged", folder / "f.pth", {""}, {},
      [](Random& random, const std::string&, Words) { return forge_checkpoint(random); }, read_checkpoint));
  targets.push_back(one_file(
      "recipe", folder / "r.toml",
      get_all(kRecipes, {"vtab1k.toml", "fashion_mnist_pyra.toml", "vtab1k/pyra_high.toml", "vtab1k/full.toml"}),
      kTomlWords, damage_text, [](const fs::path& path, const std::string&) { read_recipe(path); }));
  targets.push_back(one_file("tar", folder / "set.tar", {demo_tar()}, kListWords, forge_tar,
                             [](const fs::path& path, const std::string&) { read_dataset(path); }));
}

void add_folders(std::vector<Target>& targets, const fs::path& folder) {
  const auto model = [folder](const fs::path& path) { check_model(io::read_model(path), folder); };
  targets.push_back(in_folder("hf-config", kData / "hf/vit", folder, "config.json", kJsonWords, damage_text, model));
  targets.push_back(in_folder("hf-weights", kData / "hf/deit", folder, "model.safetensors", kSafetensorsWords,
                              forge_safetensors, model));
  targets.push_back(in_folder("hf-index", kData / "hf/vit_sharded", folder, "model.safetensors.index.json", kJsonWords,
                              damage_text, model));
  targets.push_back(
      in_folder("timm-config", kData / "timm/hub", folder, "config.json", kJsonWords, damage_text, model));
  const auto base = std::make_shared<io::ModelFile>(io::read_model(kData / "hf/vit"));
  const auto adapter = [base](const fs::path& path) { touch(io::read_peft_adapter(path, *base).weights); };
  targets.push_back(
      in_folder("peft-config", kData / "peft/hf_qv", folder, "adapter_config.json", kJsonWords, damage_text, adapter));
  targets.push_back(in_folder("peft-weights", kData / "peft/hf_qv", folder, "adapter_model.safetensors",
                              kSafetensorsWords, forge_safetensors, adapter));
  const fs::path lists = folder / "lists";
  fs::create_directories(lists);
  put(lists / "test.txt", "a.png 0\nb c.png 1\n\n");
  targets.push_back(in_folder("lists", lists, folder / "x", "test.txt", kListWords, damage_text, read_dataset));
}

void add_images(std::vector<Target>& targets) {
  const auto read = [](const std::string& bytes) { read_image(bytes); };
  targets.push_back({.name = "png",
                     .seeds = get_images(".png"),
                     .words = kPngWords,
                     .forge = forge_png,
                     .read = read,
                     .named = "image"});
  targets.push_back({.name = "jpeg",
                     .seeds = get_images(".jpg"),
                     .words = kJpegWords,
                     .forge = damage,
                     .read = read,
                     .named = "image"});
  std::vector<std::string> plain = get_images(".bmp");
  for (const char* end : {".ppm", ".pgm"}) std::ranges::move(get_images(end), std::back_inserter(plain));
  targets.push_back(
      {.name = "bmp-pnm", .seeds = plain, .words = kPlainWords, .forge = damage, .read = read, .named = "image"});
}

}  // namespace

std::vector<Target> all_targets(const fs::path& folder) {
  std::vector<Target> targets;
  add_files(targets, folder);
  add_folders(targets, folder);
  add_images(targets);
  return targets;
}

}  // namespace pyra::fuzz
