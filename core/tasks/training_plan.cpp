#include "tasks/training_plan.h"

#include "base/error.h"

namespace pyra::tasks {
namespace {

constexpr int64_t kPaperEvalEvery = 10;

}  // namespace

std::string need_split(const data::Dataset& dataset, const std::vector<std::string>& names, const char* purpose) {
  for (const std::string& name : names) {
    if (dataset.has_split(name)) return name;
  }
  fail(ExitCode::input, dataset.path().string(), ": no split to ", purpose, ": expected ", join(names, " or "),
       "; there are: ", join(dataset.splits()));
}

std::vector<Training> plan_trainings(const io::Recipe& recipe, const data::Dataset& dataset) {
  const std::vector<double>& rates = recipe.train.lr;
  if (rates.empty()) fail(ExitCode::usage, "train.lr is empty: expected at least one learning rate");
  Training last{.name = "train",
                .train_split = need_split(dataset, {"train800val200", "train"}, "train on"),
                .eval_split = need_split(dataset, {"test", "val"}, "report on"),
                .lr = rates.size() == 1 ? rates[0] : 0};
  if (recipe.protocol == "paper") {
    if (rates.size() > 1) {
      fail(ExitCode::usage, "protocol 'paper' takes one learning rate, train.lr has ", rates.size(),
           "; protocol 'vtab' chooses between several on val200");
    }
    last.eval_every = recipe.train.eval_every > 0 ? recipe.train.eval_every : kPaperEvalEvery;
    last.keep_best = true;
    return {last};
  }
  if (recipe.protocol != "vtab") {
    fail(ExitCode::usage, "protocol '", recipe.protocol, "' is unknown; there are: vtab, paper");
  }
  std::vector<Training> plan;
  if (rates.size() > 1) {
    const bool vtab = dataset.has_split("train800") && dataset.has_split("val200");
    const std::string train = vtab ? "train800" : "train";
    const std::string choose = vtab ? "val200" : need_split(dataset, {"val"}, "choose a learning rate on");
    if (choose == last.eval_split) {
      fail(ExitCode::input, dataset.path().string(), ": split '", choose,
           "' cannot both choose the learning rate and give the result; add a test split or give one train.lr");
    }
    for (const double lr : rates) {
      plan.push_back({.name = cat("lr ", lr),
                      .train_split = train,
                      .eval_split = choose,
                      .lr = lr,
                      .eval_every = recipe.train.eval_every,
                      .trial = true});
    }
  }
  plan.push_back(last);
  return plan;
}

}  // namespace pyra::tasks
