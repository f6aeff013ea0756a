// What every plugin that can be found must hold to, the project's own and any in $PYRA_PLUGIN_PATH alike.
#include <nlohmann/json.hpp>
#include <set>

#include "base/error.h"
#include "host/plugin_registry.h"
#include "kernels/merge.h"
#include "nn/vit_parts.h"
#include "support.h"

using namespace pyra;
using sdk::ModelShape;
using sdk::ParameterValue;
using sdk::Schedule;
using sdk::TensorMap;

namespace {

using Given = std::map<std::string, ParameterValue>;

host::PluginRegistry registry() {
  return host::PluginRegistry({PYRA_PLUGIN_DIR});
}

/// The defaults, and for every parameter with a few possible values each of them.
std::vector<Given> settings(const std::vector<sdk::Parameter>& declared) {
  std::vector<Given> all{{}};
  for (const auto& parameter : declared) {
    if (const bool* flag = std::get_if<bool>(&parameter.default_value)) all.push_back({{parameter.name, !*flag}});
    for (const std::string& choice : parameter.choices) {
      if (std::holds_alternative<std::string>(parameter.default_value)) all.push_back({{parameter.name, choice}});
      if (std::holds_alternative<std::vector<std::string>>(parameter.default_value)) {
        all.push_back({{parameter.name, std::vector<std::string>{choice}}});
      }
    }
  }
  return all;
}

std::string describe(const std::string& plugin, const Given& given) {
  std::string text = plugin;
  for (const auto& [name, value] : given) text += " " + name + "=" + sdk::to_text(value);
  return text;
}

ModelShape model_shape(int64_t protected_tokens) {
  return {.depth = 4,
          .embed_dim = 24,
          .num_heads = 3,
          .mlp_dim = 96,
          .tokens = 36 + protected_tokens,
          .protected_tokens = protected_tokens,
          .num_classes = 5};
}

/// Declared tensors with values that are not their initial ones, so that they have an effect.
TensorMap trained(const std::vector<sdk::TensorDecl>& declared) {
  TensorMap tensors;
  for (const auto& decl : declared) {
    auto random = decl;
    random.init = sdk::Init::gaussian;
    random.scale = 0.3;
    tensors[decl.name] = nn::make_tensor(random, 3);
  }
  return tensors;
}

struct State {
  at::Tensor tokens, sizes, key_mean, class_attention;
  [[nodiscard]] State image(int64_t i) const {
    return {tokens.narrow(0, i, 1), sizes.narrow(0, i, 1), key_mean.narrow(0, i, 1), class_attention.narrow(0, i, 1)};
  }
};

State random_state(at::Tensor tokens, at::Tensor sizes, const ModelShape& shape, at::Generator& generator) {
  const int64_t batch = tokens.size(0), count = tokens.size(1);
  return {tokens, sizes, at::randn({batch, count, shape.embed_dim / shape.num_heads}, generator, at::TensorOptions()),
          at::rand({batch, count}, generator, at::TensorOptions())};
}

kernels::MergeArguments plan_of(const sdk::TokenMerger& merger, const Schedule& schedule, int64_t block,
                                const ModelShape& shape, const State& state, const TensorMap& learned) {
  const sdk::Needs needs = merger.needs();
  const sdk::MergeInputs inputs{.block = block,
                                .protected_tokens = shape.protected_tokens,
                                .tokens = state.tokens,
                                .sizes = state.sizes,
                                .key_mean = needs.key_mean ? state.key_mean : at::Tensor(),
                                .class_attention = needs.class_attention ? state.class_attention : at::Tensor(),
                                .learned = learned};
  return nn::arguments_of(merger.plan(inputs, schedule));
}

bool same(const at::Tensor& a, const at::Tensor& b) {
  return a.defined() == b.defined() && (!a.defined() || at::equal(a, b));
}

at::Tensor one_image(const at::Tensor& tensor, int64_t i) {
  return tensor.defined() ? tensor.narrow(0, i, 1) : tensor;
}

/// Block by block on random tokens: the plan is right, protected tokens stay, sizes add up, images are independent.
void check_blocks(const sdk::TokenMerger& merger, const Schedule& schedule, const ModelShape& shape) {
  constexpr int64_t kBatch = 3;
  const auto after = merger.tokens_after(schedule, shape);
  REQUIRE(after.size() == size_t(shape.depth));
  const TensorMap learned = trained(merger.declare(shape, schedule));
  auto generator = at::detail::createCPUGenerator(17);
  auto tokens = at::randn({kBatch, shape.tokens, shape.embed_dim}, generator, at::TensorOptions());
  auto sizes = at::ones({kBatch, shape.tokens});
  for (int64_t block = 0; block < shape.depth; ++block) {
    const int64_t kept = after[size_t(block)];
    CAPTURE(block, tokens.size(1), kept);
    if (!merger.acts(tokens.size(1), kept)) continue;
    const State state = random_state(tokens, sizes, shape, generator);
    const auto arguments = plan_of(merger, schedule, block, shape, state, learned);
    REQUIRE(kernels::check_merge(arguments, kBatch, tokens.size(1), kept, shape.protected_tokens).empty());
    const auto merged = kernels::merge_tokens(tokens, sizes, arguments);
    for (int64_t i = 0; i < kBatch; ++i) {
      const auto alone = plan_of(merger, schedule, block, shape, state.image(i), learned);
      CHECK(same(alone.keep, one_image(arguments.keep, i)));
      CHECK(same(alone.src, one_image(arguments.src, i)));
      CHECK(same(alone.dst, one_image(arguments.dst, i)));
      CHECK(same(alone.src_weight, one_image(arguments.src_weight, i)));
      CHECK(same(alone.src_size_scale, one_image(arguments.src_size_scale, i)));
      const auto result = kernels::merge_tokens(one_image(tokens, i), one_image(sizes, i), alone);
      CHECK(same(result.tokens, one_image(merged.tokens, i)));
      CHECK(same(result.sizes, one_image(merged.sizes, i)));
    }
    tokens = merged.tokens;
    sizes = merged.sizes;
    CHECK(sizes.gt(0).all().item<bool>());
    if (merger.conserves_size()) CHECK(test::max_difference(sizes.sum(1), at::full({kBatch}, shape.tokens)) < 1e-3);
  }
}

/// Where all tokens are alike nothing but the index can decide: the lowest go first, to the lowest.
void check_ties(const sdk::TokenMerger& merger, const Schedule& schedule, const ModelShape& shape) {
  const auto after = merger.tokens_after(schedule, shape);
  const State alike{at::full({2, shape.tokens, shape.embed_dim}, 0.7), at::ones({2, shape.tokens}),
                    at::full({2, shape.tokens, shape.embed_dim / shape.num_heads}, 0.3),
                    at::full({2, shape.tokens}, 0.01)};
  if (!merger.acts(shape.tokens, after[0])) return;
  const auto learned = trained(merger.declare(shape, schedule));
  const auto arguments = plan_of(merger, schedule, 0, shape, alike, learned);
  if (arguments.src.size(1) == 0) return;
  CHECK(arguments.src.diff(1, 1).gt(0).all().item<bool>());
  CHECK(arguments.dst.eq(arguments.dst.min()).all().item<bool>());
  CHECK(same(one_image(arguments.keep, 0), one_image(arguments.keep, 1)));
}

void check_declared(const std::vector<sdk::TensorDecl>& declared) {
  std::set<std::string> names;
  for (const auto& decl : declared) {
    CAPTURE(decl.name);
    CHECK(names.insert(decl.name).second);
    CHECK_FALSE(decl.shape.empty());
    for (const int64_t size : decl.shape) CHECK(size > 0);
    CHECK(nn::make_tensor(decl, 1).sizes() == at::IntArrayRef(decl.shape));
  }
}

std::vector<sdk::LinearSite> sites(const ModelShape& shape) {
  std::vector<sdk::LinearSite> all;
  const int64_t c = shape.embed_dim, m = shape.mlp_dim;
  for (int64_t block = 0; block < shape.depth; ++block) {
    all.push_back({block, sdk::LinearKind::qkv, c, 3 * c});
    all.push_back({block, sdk::LinearKind::proj, c, c});
    all.push_back({block, sdk::LinearKind::fc1, c, m});
    all.push_back({block, sdk::LinearKind::fc2, m, c});
  }
  return all;
}

}  // namespace

TEST_CASE("every merge plugin found keeps the contract", "[contract]") {
  const auto plugins = registry();
  const auto names = plugins.names("merge");
  REQUIRE(names.size() >= 3);
  for (const std::string& name : names) {
    for (const Given& given : settings(plugins.info("merge", name).parameters)) {
      INFO(describe(name, given));
      const auto merger = plugins.merger(name, given, "test");
      for (const int64_t protected_tokens : {1, 2, 5}) {
        const ModelShape shape = model_shape(protected_tokens);
        for (const std::vector<int64_t>& remove :
             std::vector<std::vector<int64_t>>{{12, 7, 1, 0}, {0, 3, 100, 100}, {1, 1, 1, 1}}) {
          CAPTURE(protected_tokens, remove);
          const Schedule schedule =
              merger->resolve({.text = "test", .remove = remove, .prune = {}, .merge = {}}, shape);
          CHECK(merger->resolve(schedule, shape) == schedule);
          check_declared(merger->declare(shape, schedule));
          check_blocks(*merger, schedule, shape);
          check_ties(*merger, schedule, shape);
        }
      }
    }
  }
}

TEST_CASE("every PEFT plugin found keeps the contract", "[contract]") {
  const auto plugins = registry();
  const auto names = plugins.names("peft");
  REQUIRE(names.size() >= 2);
  const ModelShape shape = model_shape(1);
  for (const std::string& name : names) {
    for (const Given& given : settings(plugins.info("peft", name).parameters)) {
      INFO(describe(name, given));
      const auto method = plugins.peft(name, given, "test");
      const auto declared = method->declare(shape);
      check_declared(declared);
      CHECK(nlohmann::json::parse(method->adapter_config(shape)).is_object());
      TensorMap fresh;
      for (const auto& decl : declared) fresh[decl.name] = nn::make_tensor(decl, 5);
      const TensorMap learned = trained(declared);
      for (const auto& site : sites(shape)) {
        CAPTURE(site.name());
        if (const auto term = method->low_rank(site, learned)) {
          CHECK(term->a.sizes() == at::IntArrayRef({term->a.size(0), site.in}));
          CHECK(term->b.sizes() == at::IntArrayRef({site.out, term->a.size(0)}));
          CHECK(method->delta(site, fresh).weight.count_nonzero().item<int64_t>() == 0);
          CHECK(test::max_difference(method->delta(site, learned).weight, at::matmul(term->b, term->a) * term->scale) <
                1e-6);
          CHECK(method->delta(site, learned).weight.count_nonzero().item<int64_t>() > 0);
        }
        if (method->adapts(site)) {
          const auto x = at::ones({2, site.in}), y = at::ones({2, site.out});
          CHECK(method->adapt(site, x, y, learned).sizes() == y.sizes());
        }
      }
    }
  }
}

TEST_CASE("DiffRate's counts are checked and cut", "[diffrate]") {
  const auto merger = registry().merger("diffrate", {}, "test");
  const ModelShape shape = model_shape(1);  // 37 tokens
  const auto resolve = [&](std::vector<int64_t> prune, std::vector<int64_t> merge) {
    return merger->resolve({.text = "f.toml", .remove = {}, .prune = std::move(prune), .merge = std::move(merge)},
                           shape);
  };
  const auto message = [&](std::vector<int64_t> prune, std::vector<int64_t> merge) -> std::string {
    try {
      (void)resolve(std::move(prune), std::move(merge));
    } catch (const Error& error) {
      CHECK(error.code() == ExitCode::usage);
      return error.what();
    }
    return "accepted";
  };
  const Schedule given = resolve({37, 30, 20, 10}, {37, 25, 18, 9});
  CHECK(given.prune == std::vector<int64_t>{37, 30, 20, 10});
  CHECK(merger->tokens_after(given, shape) == std::vector<int64_t>{37, 25, 18, 9});
  // More than enter a block: all of them stay.
  const Schedule more = resolve({37, 30, 30, 10}, {20, 25, 18, 9});
  CHECK(more.prune == std::vector<int64_t>{37, 20, 20, 10});
  CHECK(more.merge == std::vector<int64_t>{20, 20, 18, 9});
  CHECK_THAT(message({37, 30, 20}, {37, 25, 18}), Catch::Contains("3 prune and 3 merge counts; the model has 4"));
  CHECK_THAT(message({37, 30, 20, 10}, {}), Catch::Contains("4 prune and 0 merge"));
  CHECK_THAT(message({38, 30, 20, 10}, {37, 25, 18, 9}), Catch::Contains("prune[0] keeps 38 tokens; expected 2 to 37"));
  CHECK_THAT(message({37, 30, 20, 10}, {37, 25, 18, 1}), Catch::Contains("merge[3] keeps 1 tokens"));
  CHECK_THAT(message({37, 30, 20, 10}, {37, 31, 18, 9}), Catch::Contains("merge[1] keeps 31 of the 30"));

  const Schedule from_remove =
      merger->resolve({.text = "high", .remove = {9, 4, 0, 1}, .prune = {}, .merge = {}}, shape);
  CHECK(from_remove.merge == std::vector<int64_t>{28, 24, 24, 23});
  CHECK(from_remove.prune == std::vector<int64_t>{33, 26, 24, 24});
}

TEST_CASE("PYRA declares its tensors for the cut schedule", "[pyra]") {
  const auto merger = registry().merger("pyra", {}, "test");
  const ModelShape shape = model_shape(1);
  const Schedule schedule = merger->resolve({.text = "t", .remove = {5, 0, 100, 1}, .prune = {}, .merge = {}}, shape);
  std::map<std::string, std::vector<int64_t>> shapes;
  for (const auto& decl : merger->declare(shape, schedule)) shapes[decl.name] = decl.shape;
  CHECK(shapes.size() == 12);
  CHECK(shapes.count("blocks.1.a") == 0);
  CHECK(shapes.at("blocks.2.a") == std::vector<int64_t>{15, 1});
  CHECK(shapes.at("blocks.2.b") == std::vector<int64_t>{1, 24});
  CHECK(shapes.at("blocks.0.norm.weight") == std::vector<int64_t>{24});
}

TEST_CASE("LoRA on parts of qkv leaves the other rows at zero, without gradient", "[lora]") {
  const ModelShape shape = model_shape(1);
  const Given given{{"targets", std::vector<std::string>{"q", "v"}}, {"rank", int64_t{4}}, {"alpha", 8.0}};
  const auto method = registry().peft("lora", given, "test");
  TensorMap learned = trained(method->declare(shape));
  const auto site = sites(shape).front();
  learned.at("blocks.0.attn.qkv.lora_B.weight").requires_grad_();
  const auto term = method->low_rank(site, learned);
  REQUIRE(term.has_value());
  CHECK(term->scale == 2.0);
  CHECK(term->b.narrow(0, 24, 24).count_nonzero().item<int64_t>() == 0);
  CHECK(term->b.narrow(0, 0, 24).count_nonzero().item<int64_t>() == 24 * 4);
  term->b.sum().backward();
  const auto gradient = learned.at("blocks.0.attn.qkv.lora_B.weight").grad();
  CHECK(gradient.narrow(0, 24, 24).count_nonzero().item<int64_t>() == 0);
  CHECK(gradient.narrow(0, 48, 24).eq(1).all().item<bool>());
  CHECK_FALSE(method->low_rank(sites(shape)[1], learned).has_value());
  const auto config = nlohmann::json::parse(method->adapter_config(shape));
  CHECK(config.at("peft_type") == "LORA");
  CHECK(config.at("r") == 4);
  CHECK(config.at("lora_alpha") == 8);
  CHECK(config.at("target_modules") == std::vector<std::string>{"attn.qkv"});
  CHECK(config.at("use_rslora") == false);
}

TEST_CASE("LoRA's published initial values and rank-stabilised scale", "[lora]") {
  const auto method = registry().peft("lora", {{"rank", int64_t{16}}, {"rslora", true}}, "test");
  const auto declared = method->declare(model_shape(1));
  CHECK(declared.front().name == "blocks.0.attn.qkv.lora_A.weight");
  CHECK(declared.front().init == sdk::Init::kaiming_uniform);
  CHECK(declared.front().fan_in == 24);
  CHECK(declared[1].init == sdk::Init::zeros);
  CHECK(declared[1].shape == std::vector<int64_t>{72, 16});
  CHECK(method->low_rank(sites(model_shape(1)).front(), trained(declared))->scale == Approx(4.0));
}

TEST_CASE("LoRA beside any layer of a block: shapes, scale and peft's names", "[lora]") {
  struct Row {
    const char *target, *layer, *module;
    int64_t in, out;
  };
  const ModelShape shape = model_shape(2);
  for (const Row& row : {Row{"q", "attn.qkv", "attn.qkv", 24, 72}, Row{"k", "attn.qkv", "attn.qkv", 24, 72},
                         Row{"v", "attn.qkv", "attn.qkv", 24, 72}, Row{"qkv", "attn.qkv", "attn.qkv", 24, 72},
                         Row{"proj", "attn.proj", "attn.proj", 24, 24}, Row{"fc1", "mlp.fc1", "mlp.fc1", 24, 0},
                         Row{"fc2", "mlp.fc2", "mlp.fc2", 0, 24}}) {
    CAPTURE(row.target);
    const Given given{{"targets", std::vector<std::string>{row.target}},
                      {"rank", int64_t{4}},
                      {"alpha", 0.30000000000000004},
                      {"dropout", 0.25},
                      {"rslora", true}};
    const auto method = registry().peft("lora", given, "test");
    const auto declared = method->declare(shape);
    REQUIRE(declared.size() == size_t(2 * shape.depth));  // A and B in every block
    const int64_t in = row.in ? row.in : shape.mlp_dim, out = row.out ? row.out : shape.mlp_dim;
    CHECK(declared[2].name == cat("blocks.1.", row.layer, ".lora_A.weight"));
    CHECK(declared[2].shape == std::vector<int64_t>{4, in});
    CHECK(declared[3].shape == std::vector<int64_t>{out, 4});
    const TensorMap learned = trained(declared);
    int64_t terms = 0;
    for (const auto& site : sites(shape)) {
      const auto term = method->low_rank(site, learned);
      if (!term) continue;
      ++terms;
      CHECK(site.name().ends_with(row.layer));
      CHECK(term->scale == 0.30000000000000004 / 2);
      CHECK(term->dropout == 0.25);
      const auto delta = method->delta(site, learned);
      CHECK(test::max_difference(delta.weight, at::matmul(term->b, term->a) * term->scale) < 1e-6);
    }
    CHECK(terms == shape.depth);
    const auto config = nlohmann::json::parse(method->adapter_config(shape));
    CHECK(config.at("target_modules") == std::vector<std::string>{row.module});
    CHECK(config.at("lora_alpha").get<double>() == 0.30000000000000004);
    CHECK(config.at("lora_dropout").get<double>() == 0.25);
    CHECK(config.at("use_rslora") == true);
  }
}

TEST_CASE("a linear probe leaves everything but the head alone", "[linear-probe]") {
  const ModelShape shape = model_shape(2);
  const auto method = registry().peft("linear_probe", {}, "test");
  CHECK(method->declare(shape).empty());
  for (const char* name : {"cls_token", "pos_embed", "blocks.0.norm1.bias", "blocks.1.attn.qkv.weight", "norm.weight"})
    CHECK_FALSE(method->trains(name));
  for (const auto& site : sites(shape)) {
    CHECK_FALSE(method->low_rank(site, {}).has_value());
    CHECK_FALSE(method->adapts(site));
    CHECK_FALSE(method->delta(site, {}).weight.defined());
  }
  CHECK(method->mergeable());
}

TEST_CASE("Consolidator's grouped layer and the matrix it is merged as are the same map", "[consolidator]") {
  const ModelShape shape = model_shape(1);
  for (const int64_t groups : {1, 2, 4, 8, 12}) {
    CAPTURE(groups);
    const auto method = registry().peft("consolidator", {{"groups", groups}}, "test");
    const TensorMap learned = trained(method->declare(shape));
    for (const auto& site : sites(shape)) {
      REQUIRE(method->adapts(site));
      const at::Tensor x = at::rand({5, site.in}), y = at::rand({5, site.out});
      const auto delta = method->delta(site, learned);
      const at::Tensor merged = y + at::matmul(x, delta.weight.t()) + delta.bias;
      CHECK(test::max_difference(method->adapt(site, x, y, learned), merged) < 1e-4);
      // A row of the weight reads in/groups channels, `groups` apart where the shuffle spreads them.
      CHECK(delta.weight.ne(0).sum(1).max().item<int64_t>() <= site.in / groups);
    }
  }
  // By default the largest power of two up to 64 that divides: 24 and 72 by 8.
  CHECK(registry().peft("consolidator", {}, "test")->declare(shape).front().shape == std::vector<int64_t>{8, 9, 3});
  const auto odd = registry().peft("consolidator", {{"groups", int64_t{7}}}, "test");
  CHECK_THROWS_WITH(odd->declare(shape), Catch::Contains("groups = 7 does not divide") && Catch::Contains("qkv"));
}

TEST_CASE("BitFit trains every bias and nothing else", "[bitfit]") {
  const auto method = registry().peft("bitfit", {}, "test");
  for (const char* name : {"patch_embed.proj.bias", "blocks.3.attn.qkv.bias", "blocks.0.mlp.fc2.bias", "norm.bias"}) {
    CHECK(method->trains(name));
  }
  for (const char* name : {"blocks.3.attn.qkv.weight", "pos_embed", "norm.weight"}) CHECK_FALSE(method->trains(name));
  CHECK(method->mergeable());
}
