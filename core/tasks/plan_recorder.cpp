#include "tasks/plan_recorder.h"

namespace pyra::tasks {

sdk::Schedule PlanRecorder::resolve(const sdk::Schedule& schedule, const sdk::ModelShape& shape) const {
  return merger_->resolve(schedule, shape);
}

std::vector<int64_t> PlanRecorder::tokens_after(const sdk::Schedule& schedule, const sdk::ModelShape& shape) const {
  return merger_->tokens_after(schedule, shape);
}

std::vector<sdk::TensorDecl> PlanRecorder::declare(const sdk::ModelShape& shape, const sdk::Schedule& schedule) const {
  return merger_->declare(shape, schedule);
}

sdk::MergePlan PlanRecorder::plan(const sdk::MergeInputs& in, const sdk::Schedule& schedule) const {
  sdk::MergePlan plan = merger_->plan(in, schedule);
  if (!moved_) {
    plans_[in.block] = plan;
    return plan;
  }
  const auto found = plans_.find(in.block);
  if (found == plans_.end()) return plan;
  const sdk::MergePlan& before = found->second;
  if (at::equal(plan.keep, before.keep) && at::equal(plan.src, before.src) && at::equal(plan.dst, before.dst)) {
    return plan;
  }
  ++*moved_;
  sdk::MergePlan followed = before;
  followed.gate = plan.gate;  // its tensors are the file's, and have to be compared
  return followed;
}

nn::Vit observed(const nn::Vit& model, Plans& plans, int64_t* moved) {
  nn::Vit copy(model.config(), model.weights());
  if (const nn::PeftSetup* peft = model.peft()) copy.set_peft(std::make_unique<nn::PeftSetup>(*peft));
  if (const nn::MergeSetup* merge = model.merge()) {
    auto setup = std::make_unique<nn::MergeSetup>(*merge);
    setup->merger = std::make_shared<PlanRecorder>(merge->merger, plans, moved);
    copy.set_merge(std::move(setup));
  }
  return copy;
}

}  // namespace pyra::tasks
