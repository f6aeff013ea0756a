#include "engine/cuda/train_memory.h"

#include "base/error.h"
#include "engine/cuda/span_plan.h"

namespace pyra::engine {

namespace cuda = kernels::cuda;

/// When a part of a step runs: a step is the embedding, the blocks' parts, the head, and all of it backward.
class TrainMemory::Timeline {
 public:
  /// The parts of a block's forward pass, in order; its way back takes them in the opposite one.
  enum Part { kNorm1, kQkv, kAttention, kProjection, kMerge, kFc1, kFc2, kParts };
  explicit Timeline(int depth) : depth_(depth) {}
  [[nodiscard]] int embed() const { return 0; }
  [[nodiscard]] int forward(int block, Part part) const { return 1 + block * kParts + part; }
  [[nodiscard]] int head() const { return forward(depth_, kNorm1); }
  [[nodiscard]] int backward(int block, Part part) const { return 2 * head() - forward(block, part); }
  [[nodiscard]] int end() const { return 2 * head(); }

 private:
  int depth_;
};

bool gradients_aside(const TrainModel& model, int block) {
  return model.blocks[size_t(block)].qkv.lora && block + 1 < int(model.blocks.size());
}

/// Says of every buffer how large it is and when it is needed.
class TrainMemory::Planner {
 public:
  Planner(TrainMemory& memory, const TrainModel& model, int images)
      : memory_(memory),
        model_(model),
        time_(int(model.config.depth)),
        images_(size_t(images)),
        channels_(size_t(model.config.embed_dim)),
        compute_(cuda::size_of(model.types.compute)) {
    memory_.blocks.resize(model.blocks.size());
    add_embedding();
    for (int i = 0; i < int(model.blocks.size()); ++i) add_block(i);
    add_streams();
    add_head();
    plan_.place();
  }

  [[nodiscard]] size_t bytes() const { return plan_.bytes(); }
  void hand_out(char* memory) const { plan_.hand_out(memory); }

 private:
  using enum Timeline::Part;
  using Part = Timeline::Part;

  void add(DeviceSpan& span, size_t bytes, int first, int last) { plan_.add(span, bytes, first, last); }

  void add_embedding() {
    const nn::VitConfig& config = model_.config;
    const size_t rows = images_ * size_t(config.patches()), patch = size_t(3 * config.patch_size * config.patch_size);
    add(memory_.patches, rows * patch * compute_, time_.embed(), time_.embed());
    add(memory_.embedded, rows * channels_ * compute_, time_.embed(), time_.embed());
    if (model_.patch_embed.bias_slot) add(memory_.patch_gradient, rows * channels_ * 4, time_.end(), time_.end());
  }

  void add_block(int i) {
    add_attention(i);
    add_plan(i);
    add_mlp(i);
  }

  void add_attention(int i) {
    const TrainBlock& block = model_.blocks[size_t(i)];
    BlockMemory& m = memory_.blocks[size_t(i)];
    const size_t rows = images_ * size_t(block.tokens), row = rows * channels_ * compute_;
    const size_t heads = rows * size_t(model_.config.num_heads) * 4;
    const auto of = [&](Part part) { return time_.forward(i, part); };
    const auto back = [&](Part part) { return time_.backward(i, part); };
    const int last_read = gradients_aside(model_, i) ? time_.end() : back(kNorm1);
    // The embedding makes the first block's norm1.
    add(m.input1, rows * size_t(block.qkv.stride) * compute_, i == 0 ? time_.embed() : of(kNorm1), of(kQkv));
    add(m.normalised1, row, of(kNorm1), last_read);
    add(m.inverse1, rows * 4, of(kNorm1), back(kNorm1));
    add(m.qkv, 3 * row, of(kQkv), back(kAttention));
    add(m.attended, row, of(kAttention), back(kAttention));
    add(m.log_sum, heads, of(kAttention), back(kAttention));
    add(m.class_rows, heads, of(kAttention), of(kMerge));
    add(m.attention_branch, row, of(kProjection), of(kMerge));
    add(m.d_attention_branch, row, back(kMerge), back(kProjection));
    add(m.d_attended, rows * size_t(block.proj.stride) * compute_, back(kProjection), back(kAttention));
    add(m.d_qkv, 3 * row, back(kAttention), last_read);
    add(m.d_input1, rows * size_t(block.qkv.stride) * compute_, back(kQkv), last_read);
    if (block.qkv.lora) add(m.low[0], rows * size_t(block.qkv.lora->padded) * compute_, of(kNorm1), last_read);
    if (!block.proj.lora) return;
    add(m.low[1], rows * size_t(block.proj.lora->padded) * compute_, of(kProjection), back(kProjection));
    add(m.proj_input, rows * size_t(block.proj.stride) * compute_, of(kProjection), of(kProjection));
    add(m.packed_attended, row, back(kAttention), back(kAttention));
  }

  void add_plan(int i) {
    const TrainBlock& block = model_.blocks[size_t(i)];
    BlockMemory& m = memory_.blocks[size_t(i)];
    if (!block.merge) return;
    // Matching begins beside attention.
    for (DeviceSpan* span : {&m.keep, &m.src, &m.dst, &m.cosine})
      add(*span, images_ * size_t(block.tokens) * 4, time_.forward(i, kAttention), time_.backward(i, kMerge));
  }

  void add_mlp(int i) {
    const TrainBlock& block = model_.blocks[size_t(i)];
    BlockMemory& m = memory_.blocks[size_t(i)];
    const size_t rows = images_ * size_t(block.tokens_after()), row = rows * channels_ * compute_;
    const size_t wide = rows * size_t(block.fc2.stride) * compute_, input = rows * size_t(block.fc1.stride) * compute_;
    const auto of = [&](Part part) { return time_.forward(i, part); };
    const auto back = [&](Part part) { return time_.backward(i, part); };
    const bool last = i + 1 == int(model_.blocks.size());
    add(m.normalised2, row, of(kMerge), back(kMerge));
    add(m.inverse2, rows * 4, of(kMerge), back(kMerge));
    add(m.input2, input, of(kMerge), of(kFc1));
    add(m.hidden, wide, of(kFc1), back(kFc1));
    add(m.activated, wide, of(kFc1), of(kFc2));
    // It joins the stream in the next block's norm1, and its gradient comes from there.
    add(m.hidden_branch, row, of(kFc2), time_.forward(i + 1, kNorm1));
    add(m.d_hidden_branch, row, last ? time_.head() : time_.backward(i + 1, kNorm1), back(kFc2));
    add(m.d_hidden, wide, back(kFc2), back(kFc1));
    add(m.d_input2, input, back(kFc1), back(kMerge));
    if (block.fc1.lora) add(m.low[2], rows * size_t(block.fc1.lora->padded) * compute_, of(kFc1), back(kFc1));
    if (!block.fc2.lora) return;
    add(m.low[3], rows * size_t(block.fc2.lora->padded) * compute_, of(kFc2), back(kFc2));
    add(m.fc2_input, wide, back(kFc2), back(kFc2));
  }

  /// A stream is needed until the next takes its place, and on the way back where a merge asks for it again; its
  /// gradient from where the next one's is brought back to it to where it is brought back itself.
  void add_streams() {
    const int depth = int(model_.blocks.size());
    std::vector<int> ends;  // the blocks that end a stream
    for (int i = 0; i < depth; ++i)
      if (model_.blocks[size_t(i)].merge || model_.blocks[size_t(i)].class_alone) ends.push_back(i);
    memory_.stream.resize(ends.size() + 1);
    memory_.d_stream.resize(ends.size() + 1);
    memory_.sizes.resize(ends.size());
    for (size_t s = 0; s <= ends.size(); ++s) {
      const int before = s == 0 ? -1 : ends[s - 1];  // the block that begins it
      const bool last = s == ends.size();
      const int tokens = before < 0 ? model_.blocks[0].tokens : model_.blocks[size_t(before)].tokens_after();
      const size_t rows = images_ * size_t(tokens), bytes = rows * channels_ * 4;
      const int begin = before < 0 ? time_.embed() : time_.forward(before, kMerge);
      const int back = before < 0 ? time_.end() : time_.backward(before, kMerge);
      int last_read = time_.head(), returned = time_.head();
      if (!last) {
        returned = time_.backward(ends[s], kMerge);
        last_read = model_.blocks[size_t(ends[s])].merge ? returned : time_.forward(ends[s], kMerge);
      }
      add(memory_.stream[s], bytes, begin, last_read);
      add(memory_.d_stream[s], bytes, returned, back);
      if (s > 0) add(memory_.sizes[s - 1], rows * 4, begin, time_.end());
    }
  }

  void add_head() {
    const size_t features = images_ * channels_ * 4, logits = images_ * size_t(model_.config.num_classes) * 4;
    for (DeviceSpan* span : {&memory_.pooled, &memory_.features_normalised, &memory_.features, &memory_.d_features})
      add(*span, features, time_.head(), time_.end());
    add(memory_.features_inverse, images_ * 4, time_.head(), time_.end());
    for (DeviceSpan* span : {&memory_.logits, &memory_.d_logits}) add(*span, logits, time_.head(), time_.end());
  }

  TrainMemory& memory_;
  const TrainModel& model_;
  Timeline time_;
  size_t images_, channels_, compute_;
  SpanPlan plan_;
};

TrainMemory::TrainMemory(const TrainModel& model, int images) : batch(images) {
  const Planner planner(*this, model, images);
  bytes = planner.bytes();
  arena_ = DeviceMemory(bytes);
  // Not a number in every type: what is read before anyone wrote it shows.
  PYRA_CUDA(cudaMemset(arena_.get(), 0xff, bytes));
  PYRA_CUDA(cudaDeviceSynchronize());  // the step's streams would not wait for it
  planner.hand_out(arena_.get<char>());
}

size_t TrainMemory::bytes_for(const TrainModel& model, int batch) {
  TrainMemory unused;
  return Planner(unused, model, batch).bytes();
}

}  // namespace pyra::engine
