#include "io/recipe.h"

#include <cmath>
#include <cstring>

#include "base/philox.h"
#include "io_support.h"
#include "support.h"

namespace pyra::io {
namespace {

using test::check_error;
using test::put;

/// The recipe in `text`, which stands in a file named vit.toml.
Recipe read_text(const std::string& text, const std::vector<std::string>& overrides = {}) {
  const test::TempDir dir;
  put(dir / "vit.toml", text);
  return read_recipe(dir / "vit.toml", overrides);
}

void check_refused(const std::string& text, std::vector<std::string> words) {
  INFO(printable(text));
  const test::TempDir dir;
  put(dir / "vit.toml", text);
  words.push_back("recipe " + (dir / "vit.toml").string());
  check_error(ExitCode::usage, words, [&] { (void)read_recipe(dir / "vit.toml", {}); });
}

void check_override_refused(const std::string& text, std::vector<std::string> words) {
  INFO(printable(text));
  words.push_back("--set " + printable(text) + ": ");
  check_error(ExitCode::usage, words, [&] { (void)read_recipe({}, {text}); });
}

class Draw {
 public:
  explicit Draw(uint64_t seed) : random_(seed, RandomStream::split) {}
  uint64_t below(uint64_t bound) { return random_.below(at_++, bound); }
  bool coin() { return below(2) == 1; }
  /// A finite double from 0: any bits, so that the text is put to the test, or a plain one.
  double number() {
    for (;;) {
      const uint64_t high = random_.word(at_++) & 0x7FFFFFFFu, low = random_.word(at_++);
      const uint64_t bits = high << 32 | low;
      double value = 0;
      std::memcpy(&value, &bits, sizeof value);
      if (std::isfinite(value)) return coin() ? value : double(below(1000)) / 8;
    }
  }
  double positive() { return std::max(number(), 1e-300); }
  std::string text() {
    static const std::string pieces[] = {"a",    "Z", "0",  " ", "\"", "\\", "\n", "\t", "\x01",
                                         "\x7f", "é", "漢", "#", "=",  "'",  "[",  "."};
    std::string result;
    for (uint64_t n = below(12); n-- > 0;) result += pieces[below(std::size(pieces))];
    return result;
  }
  sdk::ParameterValue parameter() {
    switch (below(5)) {
      case 0:
        return coin();
      case 1:
        return int64_t(below(uint64_t{1} << 62)) - (int64_t{1} << 61);
      case 2:
        return coin() ? number() : -number();
      case 3:
        return text();
      default:
        return std::vector<std::string>(below(4), text());
    }
  }
  PluginChoice plugin() {
    PluginChoice choice{.name = coin() ? text() : "lora", .parameters = {}};
    for (uint64_t n = below(4); n-- > 0;) choice.parameters[cat("p-", n, "_x")] = parameter();
    return choice;
  }

 private:
  Philox random_;
  uint64_t at_ = 0;
};

Recipe random_recipe(uint64_t seed) {
  Draw draw(seed);
  Recipe recipe;
  recipe.model = draw.text();
  recipe.data = draw.text();
  recipe.out = draw.text();
  recipe.seed = int64_t(draw.below(uint64_t{1} << 63));
  recipe.protocol = draw.coin() ? "vtab" : "paper";
  recipe.dtype = draw.coin() ? "fp32" : "bf16";
  recipe.new_head = draw.coin();
  recipe.deterministic = draw.coin();
  recipe.train = {.epochs = int64_t(1 + draw.below(1000)),
                  .max_seconds = draw.number(),
                  .batch = int64_t(1 + draw.below(65536)),
                  .lr = {draw.positive()},
                  .merge_lr = draw.number(),
                  .min_lr = draw.number(),
                  .warmup_lr = draw.number(),
                  .warmup_epochs = int64_t(draw.below(1000)),
                  .weight_decay = draw.number(),
                  .drop_path = double(draw.below(1000)) / 1000,
                  .hflip = draw.coin(),
                  .random_resized_crop = draw.coin(),
                  .checkpoint_every = int64_t(draw.below(1000)),
                  .eval_every = int64_t(draw.below(1000)),
                  .teacher = draw.text(),
                  .teacher_weight = double(1 + draw.below(1000)) / 1000,
                  .teacher_temperature = 0.5 + double(draw.below(100))};
  for (uint64_t n = draw.below(3); n-- > 0;) recipe.train.lr.push_back(draw.positive());
  recipe.peft = draw.plugin();
  recipe.merge = draw.plugin();
  recipe.schedule = draw.text();
  recipe.proportional_attention = draw.coin();
  if (draw.coin()) recipe.image_size = int64_t(1 + draw.below(4096));
  if (draw.coin()) recipe.resize = draw.coin() ? "squash" : "crop";
  if (draw.coin()) recipe.mean = {draw.number(), -draw.number(), 0.0};
  if (draw.coin()) recipe.std = {draw.positive(), draw.positive(), 1.0};
  return recipe;
}

}  // namespace

TEST_CASE("an empty recipe is the published defaults") {
  CHECK(read_recipe({}, {}) == Recipe{});
  Recipe empty = read_text("");
  CHECK(empty.file.filename() == "vit.toml");
  empty.file.clear();
  CHECK(empty == Recipe{});
  CHECK(empty.peft.name == "lora");
}

TEST_CASE("every key of a recipe is read") {
  const Recipe recipe = read_text(R"(
model = "models/vit.safetensors"
data = "tasks/a b.tar"
out = "run"
seed = 7
protocol = "paper"
dtype = "bf16"
new_head = true
deterministic = true
[train]
epochs = 5
max_seconds = 60
batch = 64
lr = [1e-3, 0.0005]
merge_lr = 3e-4
min_lr = 0
warmup_lr = 1e-7
warmup_epochs = 0
weight_decay = 0.05
drop_path = 0.25
hflip = true
random_resized_crop = true
checkpoint_every = 10
eval_every = 2
[peft]
name = "lora"
rank = 4
alpha = 8.0
targets = ["q", "v"]
[merge]
name = "pyra"
schedule = "high"
proportional_attention = false
partition = "random"
[preprocess]
size = 112
resize = "crop"
mean = [0.5, 0.5, 0]
std = [0.25, 0.5, 1]
)");
  CHECK(recipe.model == "models/vit.safetensors");
  CHECK(recipe.data == "tasks/a b.tar");
  CHECK(recipe.out == "run");
  CHECK(recipe.seed == 7);
  CHECK(recipe.protocol == "paper");
  CHECK(recipe.dtype == "bf16");
  CHECK(recipe.new_head);
  CHECK(recipe.deterministic);
  const TrainSettings train{.epochs = 5,
                            .max_seconds = 60,
                            .batch = 64,
                            .lr = {1e-3, 5e-4},
                            .merge_lr = 3e-4,
                            .min_lr = 0,
                            .warmup_lr = 1e-7,
                            .warmup_epochs = 0,
                            .weight_decay = 0.05,
                            .drop_path = 0.25,
                            .hflip = true,
                            .random_resized_crop = true,
                            .checkpoint_every = 10,
                            .eval_every = 2,
                            .teacher = {}};
  CHECK(recipe.train == train);
  using Values = std::map<std::string, sdk::ParameterValue>;
  CHECK((recipe.peft.parameters ==
         Values{{"rank", int64_t{4}}, {"alpha", 8.0}, {"targets", std::vector<std::string>{"q", "v"}}}));
  CHECK(recipe.merge.name == "pyra");
  CHECK((recipe.merge.parameters == Values{{"partition", std::string("random")}}));
  CHECK(recipe.peft.where.ends_with("vit.toml:25: [peft]"));
  CHECK(recipe.schedule == "high");
  CHECK_FALSE(recipe.proportional_attention);
  CHECK(recipe.image_size == 112);
  CHECK(recipe.resize == "crop");
  CHECK(recipe.mean == std::vector<double>{0.5, 0.5, 0});
  CHECK(recipe.std == std::vector<double>{0.25, 0.5, 1});
}

TEST_CASE("a schedule may be written as text, a number or a list") {
  CHECK(read_text("merge.schedule = 13").schedule == "13");
  CHECK(read_text("merge.schedule = [16, 8, 4]").schedule == "16,8,4");
  CHECK(read_recipe({}, {"merge.schedule=16,8,4"}).schedule == "16,8,4");
  CHECK(read_recipe({}, {"merge.schedule=8@-0.5"}).schedule == "8@-0.5");
  CHECK(read_recipe({}, {"merge.schedule=13"}).schedule == "13");
  check_refused("merge.schedule = [16, 'a']", {":1: merge.schedule holds a string, expected integers"});
  check_refused("merge.schedule = true", {":1: merge.schedule is a boolean, expected a string"});
}

TEST_CASE("mistakes in a recipe are told by file, line, key, got and expected") {
  check_refused("seed = 1\n\n[train]\nepochs = 5\nbatchs = 32\n",
                {"vit.toml:5: train.batchs is not a key; did you mean 'batch'?"});
  check_refused("[trian]\n", {"vit.toml:1: trian is not a key; did you mean 'train'?"});
  check_refused("modle = 'x'", {":1: modle is not a key; did you mean 'model'?"});
  check_refused("\nxyzzy = 1", {":2: xyzzy is not a key; there are: ", "model", "preprocess"});
  check_refused("[preprocess]\nzzzzzzzz = 1",
                {":2: preprocess.zzzzzzzz is not a key; there are: mean, resize, size, std"});
  check_refused("train = 5", {":1: train is an integer, expected a table: [train]"});
  check_refused("[[train]]\nepochs = 1", {":1: train is a list, expected a table"});
  check_refused("[model]\nname = 'x'", {":1: model is a table, expected a string"});
  check_refused("model = 5", {":1: model is an integer, expected a string"});
  check_refused("new_head = 1", {":1: new_head is an integer, expected true or false"});
  check_refused("seed = -1", {":1: seed is -1, expected 0 to "});
  check_refused("seed = 1.5", {":1: seed is a number with a fraction, expected an integer"});
  check_refused("protocol = 'vtba'", {":1: protocol is 'vtba', expected one of vtab, paper; did you mean 'vtab'?"});
  check_refused("dtype = 'fp64'", {":1: dtype is 'fp64', expected one of auto, fp32, tf32, bf16"});
  check_refused("out = 2024-01-01", {":1: out is a date or time, expected a string"});
  check_refused("[train]\nepochs = 0", {":2: train.epochs is 0, expected 1 to"});
  check_refused("[train]\nepochs = '5'", {":2: train.epochs is a string, expected an integer"});
  check_refused("[train]\nbatch = 65537", {":2: train.batch is 65537, expected 1 to 65536"});
  check_refused("[train]\nlr = 0", {":2: train.lr is 0, expected more than 0"});
  check_refused("[train]\nlr = nan", {":2: train.lr is nan, expected more than 0"});
  check_refused("[train]\nlr = inf", {":2: train.lr is inf"});
  check_refused("[train]\nlr = []", {":2: train.lr has 0 rates"});
  check_refused("[train]\nlr = [1e-3, -1]", {":2: train.lr holds -1, expected more than 0"});
  check_refused("[train]\nlr = [1e-3, 'x']", {":2: train.lr holds a string"});
  check_refused("[train]\nlr = 'fast'", {":2: train.lr is a string, expected a number"});
  check_refused("[train]\nmerge_lr = -1.0", {":2: train.merge_lr is -1, expected 0 or more"});
  check_refused("[train]\nwarmup_epochs = -1", {":2: train.warmup_epochs is -1"});
  check_refused("[train]\ndrop_path = 1", {":2: train.drop_path is 1, expected 0 or more and less than 1"});
  check_refused("[train]\nweight_decay = -inf", {":2: train.weight_decay is -inf"});
  check_refused("[preprocess]\nsize = 5000", {":2: preprocess.size is 5000, expected 1 to 4096"});
  check_refused("[preprocess]\nresize = 'stretch'",
                {":2: preprocess.resize is 'stretch', expected one of squash, crop"});
  check_refused("[preprocess]\nmean = [0.5]", {":2: preprocess.mean has 1 numbers, expected 3"});
  check_refused("[preprocess]\nmean = 0.5", {":2: preprocess.mean is a number with a fraction, expected a list"});
  check_refused("[preprocess]\nstd = [0.5, 0.5, 0]", {":2: preprocess.std holds 0, expected more than 0"});
  check_refused("[peft]\nname = 4", {":2: peft.name is an integer, expected a string"});
  check_refused("[peft.rank]\nx = 1", {"peft.rank is a table, expected a number, a boolean, a string or a list"});
  check_refused("[peft]\ntargets = ['q', 1]", {":2: peft.targets holds an integer, expected strings"});
  check_refused("[peft]\n'a b' = 1", {":2: peft.a b is not a key"});
}

TEST_CASE("text that is no TOML is told by line and column") {
  check_refused("seed = 1\nmodel = \n", {"vit.toml:2:", "not valid TOML"});
  check_refused("seed = 1\nseed = 2", {"vit.toml:2:", "not valid TOML"});
  check_refused("model = \"\xff\"", {"vit.toml:1:", "not valid TOML"});
  check_refused(std::string("seed = 1\0", 9), {"vit.toml:1:", "not valid TOML"});
  check_refused("x = " + std::string(100'000, '['), {"not valid TOML"});
  std::string dotted = "a";
  for (int i = 0; i < 100'000; ++i) dotted += ".a";
  check_refused(dotted + " = 1", {"100000 dots"});
  check_refused(std::string((1 << 20) + 1, '#'), {"larger than 1048576 bytes"});
  check_error(ExitCode::usage, {"recipe /nowhere/r.toml: ", "No such file"},
              [] { (void)read_recipe("/nowhere/r.toml", {}); });
}

TEST_CASE("an override of --set goes over the file, the last one wins, and its value is TOML or a bare word") {
  const std::string file = "seed = 1\n[train]\nbatch = 8\nepochs = 3\n";
  const Recipe recipe =
      read_text(file, {"train.batch=16", "train.batch = 24", "model=my model.safetensors", "out=\"a\\tb\"",
                       "train.lr=[1e-3, 1e-4]", "train.hflip=true", "data=2024", "peft.rank=4"});
  CHECK(recipe.seed == 1);
  CHECK(recipe.train.batch == 24);
  CHECK(recipe.train.epochs == 3);
  CHECK(recipe.model == "my model.safetensors");
  CHECK(recipe.out == "a\tb");
  CHECK(recipe.train.lr == std::vector<double>{1e-3, 1e-4});
  CHECK(recipe.train.hflip);
  CHECK(recipe.data == "2024");
  CHECK((recipe.peft.parameters.at("rank") == sdk::ParameterValue{int64_t{4}}));
  CHECK(read_recipe({}, {"model="}).model.empty());
  CHECK(read_recipe({}, {"model=a#b=c"}).model == "a#b=c");
  CHECK(read_recipe({}, {"model=../../x.y"}).model == "../../x.y");
}

TEST_CASE("a path is set to the letter by recipe_override") {
  for (const std::string path :
       {"plain", "a b", "q\"uote", "back\\slash", "true", "12", "new\nline", "[x]", "#", "é", ""}) {
    CHECK(read_recipe({}, {recipe_override("model", path)}).model == path);
  }
}

TEST_CASE("mistakes in --set quote what was typed") {
  check_override_refused("train.batch", {"expected key=value"});
  check_override_refused("train.batchs=4", {"train.batchs is not a key; did you mean 'batch'?"});
  check_override_refused("trian.batch=4", {"trian is not a key; did you mean 'train'?"});
  check_override_refused("sed=4", {"sed is not a key; did you mean 'seed'?"});
  check_override_refused("train.batch=many", {"train.batch is a string, expected an integer"});
  check_override_refused("train.batch=", {"train.batch is a string, expected an integer"});
  check_override_refused("train.batch=0", {"train.batch is 0, expected 1 to 65536"});
  check_override_refused("train=5", {"train is a table; set one of its keys"});
  check_override_refused("peft=bitfit", {"peft is a table; set one of its keys, as peft.name="});
  check_override_refused("=5", {"is no key"});
  check_override_refused("train..batch=5", {"is no key"});
  check_override_refused("peft.a.b=5", {"is no key"});
  check_override_refused("model=\"half", {"not valid TOML"});
  check_override_refused("train.lr=[1, 2", {"not valid TOML"});
  check_override_refused("model=a\nseed = 3", {"one line"});
  check_override_refused("seed=3\nmodel = 'x'", {"one line"});
  check_override_refused("model=a\xff", {"valid UTF-8"});
  check_override_refused("protocol=1", {"protocol is '1', expected one of vtab, paper"});
}

TEST_CASE("another plugin by --set leaves the file's parameters behind") {
  const std::string file = "[peft]\nname = 'lora'\nrank = 4\n";
  CHECK(read_text(file, {"peft.name=lora"}).peft.parameters.size() == 1);
  const Recipe other = read_text(file, {"peft.width=8", "peft.name=adapter"});
  CHECK(other.peft.name == "adapter");
  CHECK((other.peft.parameters == std::map<std::string, sdk::ParameterValue>{{"width", int64_t{8}}}));
  CHECK(other.peft.where.find("--set peft.width=8") != std::string::npos);
}

TEST_CASE("a recipe written and read again is the same recipe") {
  CHECK(read_text(to_toml(Recipe{})).train == TrainSettings{});
  for (uint64_t seed = 0; seed < 400; ++seed) {
    const Recipe recipe = random_recipe(seed);
    const std::string text = to_toml(recipe);
    INFO(text);
    Recipe again = read_text(text);
    again.file.clear();
    CHECK(again == recipe);
    CHECK(to_toml(again) == text);
  }
}

TEST_CASE("mutated recipes are read or refused, nothing else") {
  const std::string source = to_toml(random_recipe(5));
  Draw draw(17);
  const std::string tokens[] = {"[",  "]", "{",     "}",   "\"",   "'",      "=",  ".",
                                "\n", "#", "1e999", "nan", "\xff", "\"\"\"", "0x", "-"};
  const test::TempDir dir;
  int accepted = 0, refused = 0;
  for (int round = 0; round < 2000; ++round) {
    std::string text = source;
    for (uint64_t edits = 1 + draw.below(2); edits-- > 0;) {
      const size_t place = draw.below(text.size());
      switch (draw.below(3)) {
        case 0:
          text[place] = char(draw.below(256));
          break;
        case 1:
          text.insert(place, tokens[draw.below(std::size(tokens))]);
          break;
        default:
          text.erase(place, 1 + draw.below(4));
      }
    }
    put(dir / "vit.toml", text);
    const auto error = test::error_of([&] { (void)read_recipe(dir / "vit.toml", {}); });
    if (error && error->code() != ExitCode::usage) FAIL("round " << round << ": " << error->what());
    ++(error ? refused : accepted);
  }
  CHECK(refused > 200);
  CHECK(accepted > 20);
}

}  // namespace pyra::io
