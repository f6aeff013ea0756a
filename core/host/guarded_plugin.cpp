#include "host/guarded_plugin.h"

#include <set>
#include <utility>

#include "base/error.h"
#include "base/guard.h"
#include "base/text.h"

namespace pyra::host {
namespace {

constexpr int64_t kMostElements = int64_t{1} << 31;  // of a tensor that trains

void check_declared(const std::string& who, const std::vector<sdk::TensorDecl>& declared) {
  std::set<std::string> names;
  for (const sdk::TensorDecl& decl : declared) {
    if (decl.name.empty() || !names.insert(decl.name).second)
      fail(ExitCode::plugin, who, ": declare() names a tensor '", decl.name, decl.name.empty() ? "'" : "' twice");
    int64_t room = kMostElements;
    for (const int64_t extent : decl.shape) {
      if (extent < 1 || extent > room)
        fail(ExitCode::plugin, who, ": declare() gives tensor '", decl.name, "' the shape [", join(decl.shape),
             "]; expected extents from 1 on, and up to ", kMostElements, " elements");
      room /= extent;
    }
  }
}

class GuardedMerger final : public sdk::TokenMerger {
 public:
  GuardedMerger(std::shared_ptr<const sdk::TokenMerger> merger, const std::string& name)
      : merger_(std::move(merger)), who_(cat("merger '", name, "'")) {}

  [[nodiscard]] sdk::Needs needs() const override {
    return guard(who_, "needs()", [&] { return merger_->needs(); });
  }
  [[nodiscard]] sdk::Schedule resolve(const sdk::Schedule& schedule, const sdk::ModelShape& shape) const override {
    return guard(who_, "resolve()", [&] {
      sdk::Schedule resolved = merger_->resolve(schedule, shape);
      if (merger_->resolve(resolved, shape) != resolved)
        fail(ExitCode::plugin, who_, ": resolve() of what it has resolved, '", schedule.text,
             "', is another schedule; expected the same, for a model file keeps the resolved one");
      return resolved;
    });
  }
  [[nodiscard]] std::vector<int64_t> tokens_after(const sdk::Schedule& schedule,
                                                  const sdk::ModelShape& shape) const override {
    return guard(who_, "tokens_after()", [&] { return merger_->tokens_after(schedule, shape); });
  }
  [[nodiscard]] std::vector<sdk::TensorDecl> declare(const sdk::ModelShape& shape,
                                                     const sdk::Schedule& schedule) const override {
    auto declared = guard(who_, "declare()", [&] { return merger_->declare(shape, schedule); });
    check_declared(who_, declared);
    return declared;
  }
  [[nodiscard]] bool acts(int64_t tokens_in, int64_t tokens_out) const override {
    const bool does = guard(who_, "acts()", [&] { return merger_->acts(tokens_in, tokens_out); });
    if (!does && tokens_in != tokens_out)
      fail(ExitCode::plugin, who_, ": acts() says no where ", tokens_in, " tokens become ", tokens_out);
    return does;
  }
  [[nodiscard]] std::optional<sdk::PlanRecipe> recipe(int64_t block, const sdk::Schedule& schedule,
                                                      const sdk::TensorMap& learned) const override {
    return guard(who_, cat("recipe() of block ", block), [&] { return merger_->recipe(block, schedule, learned); });
  }
  [[nodiscard]] sdk::MergePlan plan(const sdk::MergeInputs& in, const sdk::Schedule& schedule) const override {
    return guard(who_, cat("plan() of block ", in.block), [&] { return merger_->plan(in, schedule); });
  }
  [[nodiscard]] bool conserves_size() const override {
    return guard(who_, "conserves_size()", [&] { return merger_->conserves_size(); });
  }

 private:
  std::shared_ptr<const sdk::TokenMerger> merger_;
  std::string who_;
};

class GuardedPeft final : public sdk::PeftMethod {
 public:
  GuardedPeft(std::shared_ptr<const sdk::PeftMethod> method, const std::string& name)
      : method_(std::move(method)), who_(cat("peft method '", name, "'")) {}

  [[nodiscard]] std::vector<sdk::TensorDecl> declare(const sdk::ModelShape& shape) const override {
    auto declared = guard(who_, "declare()", [&] { return method_->declare(shape); });
    check_declared(who_, declared);
    return declared;
  }
  [[nodiscard]] bool trains(std::string_view parameter) const override {
    return guard(who_, "trains()", [&] { return method_->trains(parameter); });
  }
  [[nodiscard]] std::optional<sdk::LowRank> low_rank(const sdk::LinearSite& site,
                                                     const sdk::TensorMap& learned) const override {
    auto term = at(site, "low_rank()", [&] { return method_->low_rank(site, learned); });
    if (term) check(*term, site);
    return term;
  }
  [[nodiscard]] bool adapts(const sdk::LinearSite& site) const override {
    return at(site, "adapts()", [&] { return method_->adapts(site); });
  }
  [[nodiscard]] at::Tensor adapt(const sdk::LinearSite& site, const at::Tensor& x, const at::Tensor& y,
                                 const sdk::TensorMap& learned) const override {
    return at(site, "adapt()", [&] { return method_->adapt(site, x, y, learned); });
  }
  [[nodiscard]] bool mergeable() const override {
    return guard(who_, "mergeable()", [&] { return method_->mergeable(); });
  }
  [[nodiscard]] sdk::LinearDelta delta(const sdk::LinearSite& site, const sdk::TensorMap& learned) const override {
    return at(site, "delta()", [&] { return method_->delta(site, learned); });
  }
  [[nodiscard]] std::string adapter_config(const sdk::ModelShape& shape) const override {
    return guard(who_, "adapter_config()", [&] { return method_->adapter_config(shape); });
  }

 private:
  template <class Call>
  auto at(const sdk::LinearSite& site, const char* method, const Call& call) const -> decltype(call()) {
    return guard(who_, cat(method, " at ", site.name()), call);
  }
  void check(const sdk::LowRank& term, const sdk::LinearSite& site) const {
    const auto matrix = [](const at::Tensor& t) {
      return t.defined() && t.dim() == 2 && t.scalar_type() == at::kFloat;
    };
    const bool fits = matrix(term.a) && matrix(term.b) && term.a.size(1) == site.in && term.b.size(0) == site.out &&
                      term.a.size(0) == term.b.size(1);
    if (!fits)
      fail(ExitCode::plugin, who_, ": low_rank() at ", site.name(), ": expected fp32 a [rank,", site.in, "] and b [",
           site.out, ",rank]");
    if (!(term.dropout >= 0 && term.dropout < 1))
      fail(ExitCode::plugin, who_, ": low_rank() at ", site.name(), ": dropout is ", term.dropout,
           "; expected at least 0 and less than 1");
  }

  std::shared_ptr<const sdk::PeftMethod> method_;
  std::string who_;
};

}  // namespace

std::shared_ptr<const sdk::TokenMerger> guarded(std::shared_ptr<const sdk::TokenMerger> merger,
                                                const std::string& name) {
  return std::make_shared<GuardedMerger>(std::move(merger), name);
}

std::shared_ptr<const sdk::PeftMethod> guarded(std::shared_ptr<const sdk::PeftMethod> method, const std::string& name) {
  return std::make_shared<GuardedPeft>(std::move(method), name);
}

}  // namespace pyra::host
