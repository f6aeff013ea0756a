#include "tasks/teacher.h"

#include <ATen/Functions.h>

#include "base/error.h"
#include "tasks/finetune_options.h"
#include "tasks/run_model.h"
#include "tasks/tuned_model.h"

namespace pyra::tasks {
namespace {

constexpr int64_t kLookBatch = 64;

void check_pupil(const io::ModelFile& teacher, const io::ModelFile& student, const std::string& where, bool augmented) {
  const auto& [t, s] = std::tie(teacher.config, student.config);
  if (t.num_classes != s.num_classes)
    fail(ExitCode::usage, where, ": tells ", t.num_classes, " classes apart, the data has ", s.num_classes);
  const auto &names = teacher.class_names, &wanted = student.class_names;
  if (!names.empty() && !wanted.empty() && !are_numbered(names) && !are_numbered(wanted) && names != wanted)
    fail(ExitCode::usage, where, ": was trained for other classes, or in another order, than the data's");
  const nn::Preprocess &p = teacher.preprocess, &q = student.preprocess;
  if (p.size != q.size || p.mode != q.mode || (p.mode == nn::ResizeMode::crop && p.shorter != q.shorter))
    fail(ExitCode::usage, where, ": sees images of ", p.size, " px, prepared otherwise than the student's of ", q.size,
         " px; both have to see the same image (preprocess.size, preprocess.resize)");
  if (augmented && (p.mean != q.mean || p.std != q.std))
    fail(ExitCode::usage, where,
         ": normalises images otherwise than the student; with augmentation both see one image:",
         " set preprocess.mean and preprocess.std to the teacher's, or train without hflip and random_resized_crop");
}

}  // namespace

Teacher::Teacher(const io::Recipe& recipe, const io::ModelFile& student, const std::string& device,
                 const host::PluginRegistry& plugins)
    : model_(load_model(recipe.train.teacher, plugins)),
      augmented_(recipe.train.hflip || recipe.train.random_resized_crop) {
  const std::string where = cat("train.teacher '", recipe.train.teacher, "'");
  check_finite(model_, recipe.train.teacher);
  check_pupil(model_.file, student, where, augmented_);
  engine_ = make_engine(model_, device, precision_of(recipe, device), false, recipe.deterministic);
  // Its memory is taken before the student's is planned.
  const int64_t size = model_.file.preprocess.size;
  if (device != "cpu" && augmented_) (void)engine_->run(at::zeros({kLookBatch, 3, size, size}));
}

Teacher::~Teacher() = default;

at::Tensor Teacher::look(const at::Tensor& images) {
  return run_in_batches(*engine_, images, kLookBatch, "the teacher's look at the images");
}

std::function<at::Tensor(const engine::TrainStep&)> Teacher::over(const data::StoredSet& set) {
  if (augmented_)  // not look(): a signal must not end a step before the loop could save
    return [this](const engine::TrainStep& step) {
      std::vector<at::Tensor> pieces;
      for (const at::Tensor& piece : step.images.split(kLookBatch)) pieces.push_back(engine_->run(piece.contiguous()));
      return at::cat(pieces);
    };
  std::vector<at::Tensor> pieces;
  for (int64_t first = 0, total = set.images.count(); first < total; first += kLookBatch)
    pieces.push_back(look(set.images.range(first, std::min(kLookBatch, total - first))));
  return [table = at::cat(pieces)](const engine::TrainStep& step) {
    return table.index_select(0, at::tensor(step.indices, at::kLong));
  };
}

int64_t Teacher::device_bytes() const {
  return engine_->device_bytes(kLookBatch, 1);
}

std::string Teacher::identity() const {
  sdk::TensorMap tensors = model_.file.weights;
  if (const auto& merge = model_.file.merge)
    for (const auto& [name, tensor] : merge->learned) tensors.emplace("merge." + name, tensor);
  const auto& merge = model_.file.merge;
  return cat(fingerprint(tensors), " ", merge_label(model_), " ", join(tokens_after(model_)),
             merge && !merge->proportional_attention ? " not proportional, " : " ",
             statistics_text(model_.file.preprocess));
}

}  // namespace pyra::tasks
