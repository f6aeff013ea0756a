#include "sdk/token_merger.h"

#include "base/error.h"

namespace pyra::sdk {

// Out of line, so that one vtable and one typeinfo, the core's, serve every plugin.
TokenMerger::~TokenMerger() = default;

Schedule TokenMerger::resolve(const Schedule& schedule, const ModelShape& shape) const {
  return cut_to_half(schedule, shape);
}

std::vector<int64_t> TokenMerger::tokens_after(const Schedule& schedule, const ModelShape& shape) const {
  std::vector<int64_t> after;
  int64_t tokens = shape.tokens;
  for (const int64_t removed : schedule.remove) after.push_back(tokens -= removed);
  return after;
}

std::vector<TensorDecl> TokenMerger::declare(const ModelShape&, const Schedule&) const {
  return {};
}

std::optional<PlanRecipe> TokenMerger::recipe(int64_t, const Schedule&, const TensorMap&) const {
  return std::nullopt;
}

MergePlan TokenMerger::plan(const MergeInputs& in, const Schedule& schedule) const {
  const auto made_of = recipe(in.block, schedule, in.learned);
  if (!made_of) fail(ExitCode::plugin, "the merger has neither a recipe() nor a plan()");
  return make_plan(*made_of, in);
}

Schedule cut_to_half(const Schedule& schedule, const ModelShape& shape) {
  if (schedule.remove.empty() && !(schedule.prune.empty() && schedule.merge.empty())) {
    fail(ExitCode::usage, "schedule '", schedule.text,
         "' gives kept counts (prune, merge); this merger wants the number of tokens that leave each block: "
         "'low', 'high', a number, a list, or a file with 'remove = [...]'");
  }
  if (int64_t(schedule.remove.size()) != shape.depth) {
    fail(ExitCode::usage, "schedule '", schedule.text, "' has ", schedule.remove.size(), " entries; the model has ",
         shape.depth, " blocks");
  }
  Schedule cut = schedule;
  int64_t tokens = shape.tokens;
  for (size_t block = 0; block < cut.remove.size(); ++block) {
    int64_t& removed = cut.remove[block];
    if (removed < 0) {
      fail(ExitCode::usage, "schedule '", schedule.text, "': block ", block, " removes ", removed,
           " tokens; expected 0 or more");
    }
    removed = std::min(removed, std::max<int64_t>(0, (tokens - shape.protected_tokens) / 2));
    tokens -= removed;
  }
  return cut;
}

}  // namespace pyra::sdk
