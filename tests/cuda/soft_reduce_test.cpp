// DiffRate's reduction under masks on the GPU, and its way back, against train::RateMasks.
#include "kernels/cuda/soft_reduce.h"

#include "cuda/device.h"
#include "cuda/small_vit.h"
#include "io/io_support.h"
#include "kernels/cuda/masked_attention.h"
#include "kernels/cuda/rank.h"
#include "kernels/tensors.h"
#include "support.h"
#include "train/rate_search.h"

using namespace pyra;
using namespace pyra::test;
using kernels::SoftCounts;
using kernels::cuda::DType;
using train::KeptCounts;

namespace {

constexpr int64_t kBatch = 3;

/// What a block's reduction has on the device.
struct Block {
  explicit Block(const nn::VitConfig& config)
      : sizes({kBatch, config.tokens()}, at::kFloat),
        mask({kBatch, config.tokens()}, at::kFloat),
        keep({kBatch, config.tokens()}, at::kInt),
        src({kBatch, config.tokens()}, at::kInt),
        dst({kBatch, config.tokens()}, at::kInt),
        cosine({kBatch, config.tokens()}, at::kFloat),
        out({kBatch, config.tokens(), config.embed_dim}, at::kFloat) {}
  OnDevice sizes, mask, keep, src, dst, cosine, out;  // sizes and mask: of the tokens that leave
};

/// Attention for the ranking alone, the ranking, and the reduction.
void reduce(const nn::VitConfig& config, const at::Tensor& qkv, const at::Tensor& x, const OnDevice& sizes,
            const OnDevice& mask, const SoftCounts& counts, const Block& block) {
  const int tokens = int(config.tokens()), heads = int(config.num_heads), channels = int(config.embed_dim);
  const std::vector<int64_t> queries{kBatch, heads, tokens};
  const OnDevice qkv_there(qkv), x_there(x.detach()), attended({kBatch, tokens, channels}, at::kFloat);
  const OnDevice class_rows(queries, at::kFloat), top(queries, at::kFloat), inverse(queries, at::kFloat),
      peak(queries, at::kInt), value_mean({kBatch, channels}, at::kFloat), attention({kBatch, tokens}, at::kFloat);
  kernels::cuda::masked_attention({.qkv = qkv_there.get(),
                                   .sizes = sizes.get<float>(),
                                   .mask = mask.get<float>(),
                                   .out = attended.get(),
                                   .class_rows = class_rows.get<float>(),
                                   .top = top.get<float>(),
                                   .inverse = inverse.get<float>(),
                                   .peak = peak.get<int32_t>(),
                                   .value_mean = value_mean.get<float>(),
                                   .batch = kBatch,
                                   .tokens = tokens,
                                   .heads = heads,
                                   .head_dim = channels / heads,
                                   .dtype = DType::fp32},
                                  nullptr);
  kernels::cuda::ranking_attention(class_rows.get<float>(), mask.get<float>(), kBatch, heads, tokens,
                                   attention.get<float>(), nullptr);
  kernels::cuda::rank_tokens({.tokens = x_there.get(),
                              .class_rows = attention.get<float>(),
                              .batch = kBatch,
                              .token_count = tokens,
                              .heads = 1,
                              .channels = channels,
                              .dtype = DType::fp32,
                              .prune = tokens,
                              .merge = counts.kept,
                              .protected_tokens = int(config.protected_tokens()),
                              .keep = block.keep.get<int32_t>(),
                              .src = block.src.get<int32_t>(),
                              .dst = block.dst.get<int32_t>(),
                              .cosine = block.cosine.get<float>()},
                             nullptr);
  kernels::cuda::soft_reduce({.x = x_there.get<float>(),
                              .sizes = sizes.get<float>(),
                              .mask = mask.get<float>(),
                              .keep = block.keep.get<int32_t>(),
                              .src = block.src.get<int32_t>(),
                              .dst = block.dst.get<int32_t>(),
                              .cosine = block.cosine.get<float>(),
                              .counts = counts,
                              .batch = kBatch,
                              .tokens = tokens,
                              .channels = channels,
                              .x_out = block.out.get<float>(),
                              .sizes_out = block.sizes.get<float>(),
                              .mask_out = block.mask.get<float>()},
                             nullptr);
  PYRA_CUDA(cudaDeviceSynchronize());  // what it read goes now
}

train::Rates rates_for(const nn::VitConfig& config, const KeptCounts& counts) {
  train::Rates rates;
  const auto add = [&](std::vector<train::Rate>& to, int64_t count) {
    const int64_t patches = config.patches(), prefix = config.protected_tokens();
    const at::Tensor logits = count == config.tokens() ? at::zeros({1}) : train::logits_for(count, patches, prefix);
    to.push_back(train::rate_of(logits.set_requires_grad(true), patches, prefix));
    // A leaf, so that its gradient can be asked for wherever it comes from.
    to.back().survival = to.back().survival.detach().set_requires_grad(true);
  };
  for (size_t block = 0; block < counts.prune.size(); ++block) {
    add(rates.prune, counts.prune[block]);
    add(rates.merge, counts.merge[block]);
  }
  return rates;
}

struct Reference {
  std::vector<at::Tensor> x, out, d_x, d_prune, d_merge;
};

at::Tensor or_zeros(const at::Tensor& gradient, const at::Tensor& like) {
  return gradient.defined() ? gradient : at::zeros_like(like);
}

}  // namespace

TEST_CASE("reducing under masks on the GPU is what RateMasks does, and so is its way back", "[gpu][soft_reduce]") {
  PYRA_NEEDS_GPU();
  const nn::VitConfig config = small_config(5);
  const KeptCounts counts = GENERATE(
      KeptCounts{.prune = {37, 30, 24, 17, 10}, .merge = {37, 22, 24, 9, 3}},  // the third merges nothing of its own
      KeptCounts{.prune = {37, 20, 37, 12, 12}, .merge = {37, 20, 14, 12, 5}},
      KeptCounts{.prune = {37, 37, 37, 3, 3}, .merge = {37, 4, 30, 3, 3}});
  const int64_t tokens = config.tokens(), channels = config.embed_dim, heads = config.num_heads;
  const train::Rates rates = rates_for(config, counts);
  const auto blocks = train::soft_counts(train::kept_counts(rates, tokens), tokens);
  CAPTURE(counts.prune, counts.merge);

  train::RateMasks masks(config, rates, kBatch);
  const OnDevice ones(at::ones({kBatch, tokens}));
  std::vector<std::unique_ptr<Block>> there;
  for (size_t i = 0; i < blocks.size(); ++i) {
    CAPTURE(i, blocks[i].present, blocks[i].pruned, blocks[i].kept);
    const at::Tensor qkv = seeded({kBatch, tokens, 3 * channels}, 10 + i);
    const at::Tensor x = seeded({kBatch, tokens, channels}, 20 + i).set_requires_grad(true);
    (void)masks.attend(int64_t(i), qkv);
    const at::Tensor out = masks.reduce(int64_t(i), x);
    there.push_back(std::make_unique<Block>(config));
    reduce(config, qkv, x, i == 0 ? ones : there[i - 1]->sizes, i == 0 ? ones : there[i - 1]->mask, blocks[i],
           *there[i]);
    CHECK(max_difference(there[i]->out.cpu(), out.detach()) < 1e-5);
    CHECK(relative_difference(there[i]->sizes.cpu(), masks.sizes()) < 1e-5);
    CHECK(at::equal(there[i]->mask.cpu(), masks.mask().detach()));

    const at::Tensor d_out = seeded({kBatch, tokens, channels}, 30 + i);
    const at::Tensor wanted = gradients_of(out, d_out, {x})[0];
    const OnDevice d_out_there(d_out), d_x(d_out.sizes(), at::kFloat), d_branch(d_out.sizes(), at::kBFloat16);
    kernels::cuda::soft_reduce_backward({.keep = there[i]->keep.get<int32_t>(),
                                         .src = there[i]->src.get<int32_t>(),
                                         .dst = there[i]->dst.get<int32_t>(),
                                         .counts = blocks[i],
                                         .batch = kBatch,
                                         .tokens = int(tokens),
                                         .channels = int(channels),
                                         .d_out = d_out_there.get<float>(),
                                         .d_x = d_x.get<float>(),
                                         .d_branch = d_branch.get(),
                                         .compute = DType::bf16},
                                        nullptr);
    CHECK(max_difference(d_x.cpu(), wanted) < 1e-5);
    CHECK(at::equal(d_branch.cpu(), d_x.cpu().to(at::kBFloat16)));
  }

  // The last mask's gradient, back through all of them.
  const at::Tensor d_last = seeded({kBatch, tokens}, 40), d_rows = seeded({kBatch, heads, tokens}, 41);
  std::vector<at::Tensor> survivals;
  for (size_t i = 0; i < blocks.size(); ++i)
    survivals.insert(survivals.end(), {rates.prune[i].survival, rates.merge[i].survival});
  const auto wanted =
      torch::autograd::grad({masks.mask()}, survivals, {d_last + d_rows.sum(1)}, {}, false, /*allow_unused=*/true);
  const OnDevice rows(d_rows), d_ranks({kBatch, tokens}, at::kFloat);
  std::unique_ptr<OnDevice> d_mask = std::make_unique<OnDevice>(d_last);
  for (size_t i = blocks.size(); i-- > 0;) {
    CAPTURE(i, blocks[i].present, blocks[i].pruned, blocks[i].kept);
    const OnDevice d_prune({tokens}, at::kFloat), d_merge({tokens}, at::kFloat);
    auto before = std::make_unique<OnDevice>(at::IntArrayRef({kBatch, tokens}), at::kFloat);
    const auto back = [&] {
      kernels::cuda::soft_mask_backward({.mask = (i == 0 ? ones : there[i - 1]->mask).get<float>(),
                                         .keep = there[i]->keep.get<int32_t>(),
                                         .src = there[i]->src.get<int32_t>(),
                                         .counts = blocks[i],
                                         .batch = kBatch,
                                         .tokens = int(tokens),
                                         .heads = int(heads),
                                         .d_mask_rows = i + 1 == blocks.size() ? rows.get<float>() : nullptr,
                                         .d_mask_out = d_mask->get<float>(),
                                         .d_ranks = d_ranks.get<float>(),
                                         .d_mask = before->get<float>(),
                                         .d_prune = d_prune.get<float>(),
                                         .d_merge = d_merge.get<float>()},
                                        nullptr);
      return at::stack({d_prune.cpu(), d_merge.cpu()});
    };
    const at::Tensor found = back();
    CHECK(at::equal(found, back()));
    CHECK(max_difference(found[0], or_zeros(wanted[2 * i], survivals[2 * i])) < 1e-5);
    CHECK(max_difference(found[1], or_zeros(wanted[2 * i + 1], survivals[2 * i + 1])) < 1e-5);
    d_mask = std::move(before);
  }
}

TEST_CASE("pooling what is left on the GPU, and its way back", "[gpu][soft_reduce]") {
  PYRA_NEEDS_GPU();
  const int64_t batch = GENERATE(1, 4), tokens = GENERATE(2, 37, 197), channels = GENERATE(64, 768);
  const int64_t first = 1;
  const at::Tensor x = seeded({batch, tokens, channels}, 1).set_requires_grad(true);
  at::Tensor mask = (seeded({batch, tokens}, 2) > 0).to(at::kFloat);
  mask.select(1, 1).fill_(1);
  mask.set_requires_grad(true);
  const at::Tensor kept = mask.slice(1, first).unsqueeze(-1);
  const at::Tensor mean = (x.slice(1, first) * kept).sum(1) / kept.sum(1);
  const at::Tensor d_mean = seeded({batch, channels}, 3);
  const auto wanted = gradients_of(mean, d_mean, {x, mask});
  const OnDevice x_there(x.detach()), mask_there(mask.detach()), d_mean_there(d_mean);
  const OnDevice found({batch, channels}, at::kFloat), d_x(x.sizes(), at::kFloat), d_mask(mask.sizes(), at::kFloat);
  kernels::cuda::masked_mean(x_there.get<float>(), mask_there.get<float>(), int(batch), int(tokens), int(first),
                             int(channels), found.get<float>(), nullptr);
  kernels::cuda::masked_mean_backward({.x = x_there.get<float>(),
                                       .mask = mask_there.get<float>(),
                                       .mean = found.get<float>(),
                                       .d_mean = d_mean_there.get<float>(),
                                       .batch = int(batch),
                                       .tokens = int(tokens),
                                       .first = int(first),
                                       .channels = int(channels),
                                       .d_x = d_x.get<float>(),
                                       .d_mask = d_mask.get<float>()},
                                      nullptr);
  CAPTURE(batch, tokens, channels);
  CHECK(max_difference(found.cpu(), mean.detach()) < 1e-5);
  CHECK(max_difference(d_x.cpu(), wanted[0]) < 1e-5);
  CHECK(relative_difference(d_mask.cpu(), wanted[1]) < 1e-4);
}

TEST_CASE("a reduction on the GPU refuses counts that rise and pointers that are null", "[gpu][soft_reduce]") {
  PYRA_NEEDS_GPU();
  kernels::cuda::SoftReduceCall call{
      .counts = {.present = 10, .pruned = 12, .kept = 5}, .batch = 1, .tokens = 20, .channels = 64};
  const auto refused = [&](const std::vector<std::string>& says) {
    check_error(ExitCode::usage, says, [&] { kernels::cuda::soft_reduce(call, nullptr); });
  };
  refused({"soft_reduce", "pruned 12", "present 10"});
  call.counts.pruned = 8;
  refused({"soft_reduce", "keep is null"});
  call.channels = 30;
  refused({"30 channels"});
  call.channels = 64;
  call.tokens = 1025;
  refused({"1025 tokens"});
}
