#include "io/pickle.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>

#include "base/error.h"

namespace pyra::io {
namespace {

using Kind = Pickle::Kind;
using Ref = Pickle::Ref;
constexpr Ref kUnset = std::numeric_limits<Ref>::max();

/// Opcodes by pickletools' names; those not here are refused.
enum Op : unsigned char {
  MARK = '(',
  STOP = '.',
  BINFLOAT = 'G',
  BININT = 'J',
  BININT1 = 'K',
  BININT2 = 'M',
  NONE = 'N',
  BINPERSID = 'Q',
  REDUCE = 'R',
  BINSTRING = 'T',
  SHORT_BINSTRING = 'U',
  BINUNICODE = 'X',
  EMPTY_LIST = ']',
  APPEND = 'a',
  BUILD = 'b',
  GLOBAL = 'c',
  APPENDS = 'e',
  BINGET = 'h',
  LONG_BINGET = 'j',
  BINPUT = 'q',
  LONG_BINPUT = 'r',
  SETITEM = 's',
  TUPLE = 't',
  SETITEMS = 'u',
  EMPTY_DICT = '}',
  EMPTY_TUPLE = ')',
  BINBYTES = 'B',
  SHORT_BINBYTES = 'C',
  PROTO = 0x80,
  NEWOBJ = 0x81,
  TUPLE1 = 0x85,
  TUPLE2 = 0x86,
  TUPLE3 = 0x87,
  NEWTRUE = 0x88,
  NEWFALSE = 0x89,
  LONG1 = 0x8a,
  SHORT_BINUNICODE = 0x8c,
  BINUNICODE8 = 0x8d,
  BINBYTES8 = 0x8e,
  EMPTY_SET = 0x8f,
  ADDITEMS = 0x90,
  STACK_GLOBAL = 0x93,
  MEMOIZE = 0x94,
  FRAME = 0x95,
};

class Machine {
 public:
  Machine(std::string_view text, const std::string& where, const std::function<bool(const std::string&)>& allowed)
      : text_(text.substr(0, kMaxPickleBytes)), where_(where), allowed_(allowed) {
    // The three constants are shared: an opcode of one byte must not cost a hundred.
    none_ = make(Kind::none);
    false_ = make(Kind::boolean);
    true_ = make(Kind::boolean, 1);
  }

  Pickle run() {
    if (number<1>() != PROTO) refuse("it does not open with PROTO, as protocols from 2 on do");
    if (const uint64_t protocol = number<1>(); protocol < 2 || protocol > 5)
      refuse(cat("protocol ", protocol, ", expected 2 to 5"));
    for (;;) {
      op_at_ = at_;
      const auto op = static_cast<unsigned char>(number<1>());
      if (op == STOP) break;
      step(op);
    }
    pickle_.root = pop();
    if (!stack_.empty() || !marks_.empty()) refuse("values are left when it stops");
    pickle_.bytes = at_;
    return std::move(pickle_);
  }

 private:
  [[noreturn]] void refuse(const std::string& reason) const {
    fail(ExitCode::input, where_, ": broken or foreign pickle, at byte ", op_at_, ": ", reason);
  }

  // Text -------------------------------------------------------------------------------------------------------------
  std::string_view take(uint64_t count) {
    if (count > text_.size() - at_) {
      refuse(text_.size() == kMaxPickleBytes
                 ? cat("it is longer than ", kMaxPickleBytes, " bytes, the limit")
                 : cat("it is cut: ", count, " more bytes expected, got ", text_.size() - at_));
    }
    const std::string_view taken = text_.substr(at_, count);
    at_ += count;
    return taken;
  }
  template <size_t Bytes>
  uint64_t number() {
    uint64_t value = 0;
    const std::string_view bytes = take(Bytes);
    for (size_t i = 0; i < Bytes; ++i) value |= uint64_t(static_cast<unsigned char>(bytes[i])) << (8 * i);
    return value;
  }
  std::string line() {
    const size_t end = text_.find('\n', at_);
    if (end == text_.npos) refuse("a name does not end");
    std::string found(take(end - at_));
    ++at_;
    return found;
  }

  // Values -----------------------------------------------------------------------------------------------------------
  Ref make(Kind kind, int64_t integer = 0) {
    if (pickle_.values.size() == kMaxPickleValues) refuse(cat("more than ", kMaxPickleValues, " values"));
    pickle_.values.emplace_back();
    pickle_.values.back().kind = kind;
    pickle_.values.back().integer = integer;
    return Ref(pickle_.values.size() - 1);
  }
  Ref make(Kind kind, std::string_view text) {
    const Ref ref = make(kind);
    pickle_.values[ref].text = text;
    return ref;
  }
  Ref make(Kind kind, std::vector<Ref> items) {
    const Ref ref = make(kind);
    pickle_.values[ref].items = std::move(items);
    return ref;
  }
  Ref make_real(uint64_t big_endian) {
    const Ref ref = make(Kind::real);
    pickle_.values[ref].real = std::bit_cast<double>(__builtin_bswap64(big_endian));
    return ref;
  }
  Ref make_long(std::string_view bytes) {
    if (bytes.size() > sizeof(int64_t)) return make(Kind::big, bytes);
    uint64_t value = !bytes.empty() && (bytes.back() & 0x80) ? ~uint64_t{0} : 0;  // the sign, which the bytes replace
    std::memcpy(&value, bytes.data(), bytes.size());
    return make(Kind::integer, int64_t(value));
  }
  Ref make_global(const std::string& module, const std::string& name) {
    const std::string full = cat(module, ".", name);
    if (!allowed_(full))
      refuse(cat("it names '", printable(full),
                 "', which is none of the names that a file of tensors needs; it was "
                 "not looked up and nothing was run. If you trust the file, open it in Python and save its tensors"));
    return make(Kind::global, full);
  }

  // Stack ------------------------------------------------------------------------------------------------------------
  void push(Ref ref) {
    if (stack_.size() == kMaxPickleStack) refuse(cat("more than ", kMaxPickleStack, " values on its stack"));
    stack_.push_back(ref);
  }
  /// The depth below which an opcode must not reach: the last mark.
  [[nodiscard]] size_t floor() const { return marks_.empty() ? 0 : marks_.back(); }
  Ref pop() {
    if (stack_.size() <= floor()) refuse("its stack is empty");
    const Ref ref = stack_.back();
    stack_.pop_back();
    return ref;
  }
  Pickle::Value& top() {
    if (stack_.size() <= floor()) refuse("its stack is empty");
    return pickle_.values[stack_.back()];
  }
  std::vector<Ref> pop_to_mark() {
    if (marks_.empty()) refuse("no mark on its stack");
    std::vector<Ref> items(stack_.begin() + std::ptrdiff_t(marks_.back()), stack_.end());
    stack_.resize(marks_.back());
    marks_.pop_back();
    return items;
  }
  std::vector<Ref> pop_some(size_t count) {
    std::vector<Ref> items(count);
    while (count > 0) items[--count] = pop();
    return items;
  }
  std::string pop_text() {
    const Pickle::Value& value = pickle_.at(pop());
    if (value.kind != Kind::text) refuse("STACK_GLOBAL without two texts");
    return value.text;
  }

  // Memo -------------------------------------------------------------------------------------------------------------
  void put(uint64_t index) {
    if (index >= kMaxPickleMemo) refuse(cat("memo ", index, ", the limit is ", kMaxPickleMemo));
    (void)top();
    if (index >= memo_.size()) memo_.resize(index + 1, kUnset);
    memo_[index] = stack_.back();
    ++memo_count_;
  }
  void get(uint64_t index) {
    if (index >= memo_.size() || memo_[index] == kUnset) refuse(cat("memo ", index, " was never put"));
    push(memo_[index]);
  }

  void step(unsigned char op);
  bool step_value(unsigned char op);
  bool step_container(unsigned char op);
  bool step_object(unsigned char op);
  void add(const std::vector<Ref>& items, Kind kind, const char* what);
  void reduce();
  void build();

  std::string_view text_;
  const std::string& where_;
  const std::function<bool(const std::string&)>& allowed_;
  size_t at_ = 0, op_at_ = 0;
  Pickle pickle_;
  Ref none_, false_, true_;
  std::vector<Ref> stack_, memo_;
  std::vector<size_t> marks_;
  uint64_t memo_count_ = 0;
};

void Machine::step(unsigned char op) {
  if (step_value(op) || step_container(op) || step_object(op)) return;
  static constexpr char kHex[] = "0123456789abcdef";
  refuse(cat("opcode 0x", kHex[op >> 4], kHex[op & 15], op > 32 && op < 127 ? cat(" ('", char(op), "')") : "",
             ", which torch.save does not write"));
}

/// Numbers, texts and what the memo keeps.
bool Machine::step_value(unsigned char op) {
  switch (op) {
    case NONE:
      return push(none_), true;
    case NEWTRUE:
      return push(true_), true;
    case NEWFALSE:
      return push(false_), true;
    case BININT:
      return push(make(Kind::integer, int32_t(number<4>()))), true;
    case BININT1:
      return push(make(Kind::integer, int64_t(number<1>()))), true;
    case BININT2:
      return push(make(Kind::integer, int64_t(number<2>()))), true;
    case LONG1:
      return push(make_long(take(number<1>()))), true;
    case BINFLOAT:
      return push(make_real(number<8>())), true;
    case SHORT_BINSTRING:
    case SHORT_BINUNICODE:
      return push(make(Kind::text, take(number<1>()))), true;
    case BINSTRING:
    case BINUNICODE:
      return push(make(Kind::text, take(number<4>()))), true;
    case BINUNICODE8:
      return push(make(Kind::text, take(number<8>()))), true;
    case SHORT_BINBYTES:
      return push(make(Kind::bytes, take(number<1>()))), true;
    case BINBYTES:
      return push(make(Kind::bytes, take(number<4>()))), true;
    case BINBYTES8:
      return push(make(Kind::bytes, take(number<8>()))), true;
    case BINPUT:
      return put(number<1>()), true;
    case LONG_BINPUT:
      return put(number<4>()), true;
    case MEMOIZE:
      return put(memo_count_), true;
    case BINGET:
      return get(number<1>()), true;
    case LONG_BINGET:
      return get(number<4>()), true;
    case FRAME:
      // Only a hint to read ahead; the opcodes inside are checked one by one.
      return (void)number<8>(), true;
    default:
      return false;
  }
}

bool Machine::step_container(unsigned char op) {
  switch (op) {
    case MARK:
      if (marks_.size() == kMaxPickleMarks) refuse(cat("nested deeper than ", kMaxPickleMarks));
      return marks_.push_back(stack_.size()), true;
    case EMPTY_TUPLE:
      return push(make(Kind::tuple)), true;
    case EMPTY_LIST:
    case EMPTY_SET:
      return push(make(Kind::list)), true;
    case EMPTY_DICT:
      return push(make(Kind::dict)), true;
    case TUPLE:
      return push(make(Kind::tuple, pop_to_mark())), true;
    case TUPLE1:
    case TUPLE2:
    case TUPLE3:
      return push(make(Kind::tuple, pop_some(size_t(op - TUPLE1) + 1))), true;
    case APPEND:
      return add(pop_some(1), Kind::list, "APPEND to what is no list"), true;
    case APPENDS:
    case ADDITEMS:
      return add(pop_to_mark(), Kind::list, "APPENDS to what is no list"), true;
    case SETITEM:
      return add(pop_some(2), Kind::dict, "SETITEM in what is no dict"), true;
    case SETITEMS:
      return add(pop_to_mark(), Kind::dict, "SETITEMS in what is no dict"), true;
    default:
      return false;
  }
}

bool Machine::step_object(unsigned char op) {
  switch (op) {
    case GLOBAL: {
      const std::string module = line();
      return push(make_global(module, line())), true;
    }
    case STACK_GLOBAL: {
      const std::string name = pop_text();
      return push(make_global(pop_text(), name)), true;
    }
    case BINPERSID:
      return push(make(Kind::persistent, pop_some(1))), true;
    case REDUCE:
    case NEWOBJ:
      return reduce(), true;
    case BUILD:
      return build(), true;
    default:
      return false;
  }
}

void Machine::add(const std::vector<Ref>& items, Kind kind, const char* what) {
  Pickle::Value& container = top();
  if (container.kind != kind) refuse(what);
  if (kind == Kind::dict && items.size() % 2 != 0) refuse("a key without a value");
  container.items.insert(container.items.end(), items.begin(), items.end());
}

/// What Python would call becomes a note of the call; only an OrderedDict, which starts empty, becomes what it is.
void Machine::reduce() {
  std::vector<Ref> call = pop_some(2);
  if (pickle_.at(call[0]).kind != Kind::global) refuse("REDUCE of what is no name");
  if (pickle_.at(call[1]).kind != Kind::tuple) refuse("REDUCE without a tuple of arguments");
  if (pickle_.at(call[0]).text == "collections.OrderedDict" && pickle_.at(call[1]).items.empty())
    return push(make(Kind::dict));
  push(make(Kind::object, std::move(call)));
}

void Machine::build() {
  const Ref state = pop();
  Pickle::Value& target = top();
  // Attributes of a dict (a state_dict's _metadata) are of no use here.
  if (target.kind == Kind::dict) return;
  if (target.kind != Kind::object || target.items.size() != 2) refuse("BUILD of what takes no state");
  target.items.push_back(state);
}

}  // namespace

const Pickle::Value* Pickle::find(const Value& dict, std::string_view key) const {
  if (dict.kind != Kind::dict) return nullptr;
  const Value* found = nullptr;
  for (size_t i = 0; i + 1 < dict.items.size(); i += 2)
    if (const Value& name = at(dict.items[i]); name.kind == Kind::text && name.text == key)
      found = &at(dict.items[i + 1]);
  return found;  // the last one, as in Python
}

Pickle parse_pickle(std::string_view text, const std::string& where,
                    const std::function<bool(const std::string&)>& allowed) {
  return Machine(text, where, allowed).run();
}

}  // namespace pyra::io
