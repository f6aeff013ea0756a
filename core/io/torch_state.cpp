#include "io/torch_state.h"

#include <algorithm>
#include <limits>

#include "base/error.h"

namespace pyra::io {
namespace {

using Kind = Pickle::Kind;
using Value = Pickle::Value;

constexpr size_t kMaxTensorRank = 64;
constexpr std::string_view kTensor = "torch._utils._rebuild_tensor_v2", kParameter = "torch._utils._rebuild_parameter";

struct StorageType {
  std::string_view name;
  at::ScalarType dtype;
};
// Truth values are read as the bytes they are.
constexpr StorageType kStorages[] = {{"torch.FloatStorage", at::kFloat},       {"torch.HalfStorage", at::kHalf},
                                     {"torch.BFloat16Storage", at::kBFloat16}, {"torch.DoubleStorage", at::kDouble},
                                     {"torch.LongStorage", at::kLong},         {"torch.IntStorage", at::kInt},
                                     {"torch.ShortStorage", at::kShort},       {"torch.CharStorage", at::kChar},
                                     {"torch.ByteStorage", at::kByte},         {"torch.BoolStorage", at::kByte}};

// What training programs leave beside the tensors. Its arguments are kept as data and never looked at, but for
// Namespace's.
constexpr std::string_view kInert[] = {"argparse.Namespace",
                                       "collections.OrderedDict",
                                       "collections.defaultdict",
                                       "pathlib.PosixPath",
                                       "pathlib._local.PosixPath",
                                       "torch.device",
                                       "torch.Size",
                                       "numpy.dtype",
                                       "numpy.core.multiarray.scalar",
                                       "numpy._core.multiarray.scalar",
                                       "_codecs.encode",
                                       "builtins.set",
                                       "__builtin__.set"};

const StorageType* find_storage(std::string_view name) {
  const auto* found = std::find_if(std::begin(kStorages), std::end(kStorages),
                                   [&](const StorageType& type) { return type.name == name; });
  return found == std::end(kStorages) ? nullptr : found;
}

class StateReader {
 public:
  StateReader(const Pickle& pickle, const std::string& where) : pickle_(pickle), where_(where) {}

  TorchState read() {
    const Value& root = pickle_.at(pickle_.root);
    if (root.kind != Kind::dict) refuse("what was saved is no dict of tensors; save model.state_dict()");
    for (const Value& value : pickle_.values)
      if (value.kind == Kind::persistent) add_storage(value);
    const Value& dict = state_dict(root);
    for (size_t i = 0; i + 1 < dict.items.size(); i += 2) add_entry(dict.items[i], dict.items[i + 1]);
    if (state_.tensors.empty())
      refuse(cat("no tensors in ", state_.key.empty() ? "it" : "'" + state_.key + "'",
                 ", nor a dict of them under state_dict_ema, model_ema, state_dict or model"));
    state_.arch = architecture(root);
    return std::move(state_);
  }

 private:
  [[noreturn]] void refuse(const std::string& reason) const { fail(ExitCode::input, where_, ": ", reason); }

  const Value& state_dict(const Value& root) {
    for (const char* key : {"state_dict_ema", "model_ema", "state_dict", "model"}) {
      const Value* found = pickle_.find(root, key);
      if (!found || found->kind != Kind::dict) continue;
      state_.key = key;
      return *found;
    }
    return root;
  }

  void add_storage(const Value& persistent);
  std::string storage_key(const Value& tuple, const std::string& tensor) const;
  void add_entry(Pickle::Ref key, Pickle::Ref ref);
  const Value* call_arguments(const Value& value, std::string_view global, size_t least) const;
  TorchTensor tensor(const Value& arguments, const std::string& name);
  int64_t integer(const Value& value, const std::string& name, const char* what) const;
  std::vector<int64_t> integers(const Value& value, const std::string& name, const char* what) const;
  void check_inside(const TorchTensor& tensor, const std::string& name);
  std::string architecture(const Value& root) const;

  const Pickle& pickle_;
  const std::string& where_;
  TorchState state_;
};

/// ('storage', torch.FloatStorage, '0', 'cpu', 1024[, None])
void StateReader::add_storage(const Value& persistent) {
  const Value& id = pickle_.at(persistent.items.at(0));
  const auto item = [&](size_t i) -> const Value& { return pickle_.at(id.items[i]); };
  const bool known = id.kind == Kind::tuple && (id.items.size() == 5 || id.items.size() == 6) &&
                     item(0).kind == Kind::text && item(0).text == "storage" && item(1).kind == Kind::global &&
                     item(2).kind == Kind::text && item(4).kind == Kind::integer;
  if (!known) refuse("it names something outside of itself that is no storage of torch.save's");
  const std::string key = printable(item(2).text);
  const StorageType* type = find_storage(item(1).text);
  if (!type) refuse(cat("storage '", key, "' is of type '", printable(item(1).text), "', expected numbers"));
  if (id.items.size() == 6 && item(5).kind != Kind::none)
    refuse(cat("storage '", key, "' is a view of another, as old versions of torch wrote; load and save it again"));
  TorchStorage storage{.dtype = type->dtype, .elements = item(4).integer};
  const auto most = std::numeric_limits<int64_t>::max() / int64_t(c10::elementSize(type->dtype));
  if (storage.elements < 0 || storage.elements > most)
    refuse(cat("storage '", key, "' has ", storage.elements, " elements"));
  const auto [place, fresh] = state_.storages.emplace(item(2).text, storage);
  if (!fresh && !(place->second == storage)) refuse(cat("storage '", key, "' is described in two ways"));
}

/// The arguments when the value is a call of that name with at least so many.
const Value* StateReader::call_arguments(const Value& value, std::string_view global, size_t least) const {
  if (value.kind != Kind::object || pickle_.at(value.items[0]).text != global) return nullptr;
  const Value& arguments = pickle_.at(value.items[1]);
  if (arguments.items.size() < least)
    refuse(cat(global, " with ", arguments.items.size(), " arguments, expected ", least));
  return &arguments;
}

void StateReader::add_entry(Pickle::Ref key, Pickle::Ref ref) {
  const Value& name = pickle_.at(key);
  if (name.kind != Kind::text) refuse("the dict of tensors has a key that is no text");
  const Value* value = &pickle_.at(ref);
  if (const Value* parameter = call_arguments(*value, kParameter, 1)) value = &pickle_.at(parameter->items[0]);
  const Value* arguments = call_arguments(*value, kTensor, 6);
  if (!arguments) return;  // an epoch, a name: no tensor
  TorchTensor found = tensor(*arguments, printable(name.text));
  if (!state_.tensors.insert_or_assign(name.text, std::move(found)).second)
    refuse(cat("tensor '", printable(name.text), "' stands twice"));
}

int64_t StateReader::integer(const Value& value, const std::string& name, const char* what) const {
  if (value.kind != Kind::integer || value.integer < 0)
    refuse(cat("tensor '", name, "': its ", what, " is ",
               value.kind == Kind::integer ? std::to_string(value.integer) : "no integer", ", expected 0 or more"));
  return value.integer;
}

std::vector<int64_t> StateReader::integers(const Value& value, const std::string& name, const char* what) const {
  if (value.kind != Kind::tuple || value.items.size() > kMaxTensorRank)
    refuse(cat("tensor '", name, "': its ", what, " is no tuple of at most ", kMaxTensorRank, " numbers"));
  std::vector<int64_t> numbers;
  for (const Pickle::Ref item : value.items) numbers.push_back(integer(pickle_.at(item), name, what));
  return numbers;
}

/// (storage, offset, size, stride, requires_grad, hooks[, metadata])
TorchTensor StateReader::tensor(const Value& arguments, const std::string& name) {
  const auto item = [&](size_t i) -> const Value& { return pickle_.at(arguments.items[i]); };
  if (item(0).kind != Kind::persistent) refuse(cat("tensor '", name, "' has no storage"));
  // The id's form was checked when all storages were listed.
  const Value& id = pickle_.at(item(0).items[0]);
  TorchTensor tensor{.storage = pickle_.at(id.items[2]).text,
                     .offset = integer(item(1), name, "offset"),
                     .shape = integers(item(2), name, "size"),
                     .strides = integers(item(3), name, "stride")};
  if (tensor.shape.size() != tensor.strides.size())
    refuse(cat("tensor '", name, "' has ", tensor.shape.size(), " sizes and ", tensor.strides.size(), " strides"));
  check_inside(tensor, name);
  return tensor;
}

void StateReader::check_inside(const TorchTensor& tensor, const std::string& name) {
  const TorchStorage& storage = state_.storages.find(tensor.storage)->second;
  int64_t elements = 1, last = tensor.offset;
  bool empty = false, overflow = false;
  for (size_t i = 0; i < tensor.shape.size(); ++i) {
    int64_t reach = 0;
    empty |= tensor.shape[i] == 0;
    const int64_t size = std::max<int64_t>(tensor.shape[i], 1);
    overflow |= __builtin_mul_overflow(elements, size, &elements) ||
                __builtin_mul_overflow(size - 1, tensor.strides[i], &reach) ||
                __builtin_add_overflow(last, reach, &last);
  }
  const std::string described =
      cat("size [", join(tensor.shape), "], stride [", join(tensor.strides), "], offset ", tensor.offset);
  if (overflow) refuse(cat("tensor '", name, "': ", described, " is no size that can be held in memory"));
  if (!empty && last >= storage.elements)
    refuse(cat("tensor '", name, "': ", described, " reaches element ", last, " of a storage of ", storage.elements));
  // More elements than numbers means strides of 0: a tensor expanded, and a way to make much of little.
  if (!empty && elements > storage.elements)
    refuse(cat("tensor '", name, "': ", described, " has ", elements, " elements, more than its storage of ",
               storage.elements, "; save it contiguous"));
  if (!empty && __builtin_add_overflow(state_.elements, elements, &state_.elements))
    refuse("its tensors together are no size that can be held in memory");
}

/// timm writes 'arch'; others leave their program's arguments in 'args', a Namespace or a dict, with a 'model' in it.
std::string StateReader::architecture(const Value& root) const {
  const Value* said = pickle_.find(root, "arch");
  if (!said) {
    const Value* arguments = pickle_.find(root, "args");
    if (arguments && arguments->kind == Kind::object && arguments->items.size() == 3)
      arguments = &pickle_.at(arguments->items[2]);
    if (arguments) said = pickle_.find(*arguments, "model");
  }
  return said && said->kind == Kind::text ? said->text : "";
}

}  // namespace

bool allowed_torch_global(const std::string& name) {
  return name == kTensor || name == kParameter || find_storage(name) ||
         std::find(std::begin(kInert), std::end(kInert), name) != std::end(kInert);
}

TorchState read_torch_state(const Pickle& pickle, const std::string& where) {
  return StateReader(pickle, where).read();
}

}  // namespace pyra::io
