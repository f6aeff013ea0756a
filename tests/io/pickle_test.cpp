// The pickle machine, on its own and against everything that a pickle must not be able to do.
#include "io/pickle.h"

#include "io/io_support.h"
#include "io/pickle_writer.h"

using namespace pyra;
using namespace pyra::io;
using test::check_error;
using test::little;
using namespace test::pickled;

namespace {

Pickle parse(std::string_view bytes) {
  return parse_pickle(bytes, "m.pth", [](const std::string& name) {
    return name == "collections.OrderedDict" || name == "argparse.Namespace";
  });
}

const Pickle::Value& root_of(const Pickle& pickle) {
  return pickle.at(pickle.root);
}

void refused_pickle(const std::string& bytes, const std::vector<std::string>& words) {
  std::vector<std::string> all = words;
  all.push_back("m.pth");
  check_error(ExitCode::input, all, [&] { (void)parse(bytes); });
}

std::string repeated(const std::string& piece, size_t times) {
  std::string all;
  for (size_t i = 0; i < times; ++i) all += piece;
  return all;
}

}  // namespace

TEST_CASE("a pickle's values", "[pickle]") {
  CHECK(root_of(parse(proto("N"))).kind == Pickle::Kind::none);
  CHECK(root_of(parse(proto("\x88"))).integer == 1);
  CHECK(root_of(parse(proto("K\xff"))).integer == 255);
  CHECK(root_of(parse(proto("M\x01\x02"))).integer == 513);
  CHECK(root_of(parse(proto(integer(-5)))).integer == -5);
  CHECK(root_of(parse(proto("\x8a\x01\xfe"))).integer == -2);
  CHECK(root_of(parse(proto(integer(int64_t{1} << 40)))).integer == int64_t{1} << 40);
  CHECK(root_of(parse(proto("\x8a\x0a" + std::string(10, 'x')))).kind == Pickle::Kind::big);
  CHECK(root_of(parse(proto("G\x3f\xf8" + std::string(6, '\0')))).real == 1.5);
  CHECK(root_of(parse(proto(text("ü")))).text == "ü");
  CHECK(root_of(parse(proto("\x8c\x02hi"))).text == "hi");
  CHECK(root_of(parse(proto("C\x02hi"))).kind == Pickle::Kind::bytes);
  CHECK(root_of(parse(proto("NN\x86"))).items.size() == 2);
  CHECK(root_of(parse(proto("](NNNe"))).items.size() == 3);
  // A value that is put and got is one value, seen twice.
  const Pickle shared = parse(proto("]q\x05h\x05\x86"));
  CHECK(root_of(shared).items[0] == root_of(shared).items[1]);
  // Protocol 4: frames, and a memo that counts by itself.
  const Pickle framed = parse("\x80\x04\x95" + little(100, 8) + "\x8c\x01k\x94h" + std::string(1, '\0') + "\x86.");
  CHECK(root_of(framed).items[0] == root_of(framed).items[1]);
}

TEST_CASE("dicts, what is called, and what is left after it", "[pickle]") {
  const Pickle pickle = parse(proto(global("collections", "OrderedDict") + ")R(" + text("a") + "K\x01" + text("a") +
                                    "K\x02u" + dict("_metadata", "N") + "b") +
                              "more");
  const Pickle::Value* found = pickle.find(root_of(pickle), "a");
  REQUIRE(found);
  CHECK(found->integer == 2);
  CHECK(pickle.find(root_of(pickle), "b") == nullptr);
  CHECK(pickle.find(*found, "a") == nullptr);

  const std::string bytes = proto(global("argparse", "Namespace") + ")\x81" + dict("lr", "N") + "b");
  const Pickle arguments = parse(bytes + "left alone");
  CHECK(arguments.bytes == bytes.size());
  CHECK(root_of(arguments).kind == Pickle::Kind::object);
  REQUIRE(root_of(arguments).items.size() == 3);
  CHECK(arguments.find(arguments.at(root_of(arguments).items[2]), "lr") != nullptr);
}

TEST_CASE("a pickle that would run something is refused by the name of it", "[pickle]") {
  refused_pickle(proto(global("os", "system") + "(" + text("touch pwned") + "tR"), {"'os.system'", "nothing was run"});
  refused_pickle(proto(global("builtins", "eval") + "(" + text("1") + "tR"), {"'builtins.eval'"});
  refused_pickle(proto(global("collections\nos", "x")), {"'collections.os'"});
  refused_pickle(proto(text("posix") + text("system") + "\x93"), {"'posix.system'"});
  refused_pickle(proto("(S'id'\nios\nsystem\n"), {"0x53 ('S')"});
  refused_pickle(proto("(" + text("id") + "ios\nsystem\n"), {"0x69 ('i')"});
  refused_pickle(proto("(cos\nsystem\no"), {"'os.system'"});
  refused_pickle(proto("\x82\x01"), {"0x82"});
  refused_pickle(proto(text("os") + "K\x01\x93"), {"STACK_GLOBAL without two texts"});
  refused_pickle(proto("NNR"), {"REDUCE of what is no name"});
  refused_pickle(proto(global("collections", "OrderedDict") + "NR"), {"without a tuple"});
  refused_pickle(proto("NNb"), {"BUILD of what takes no state"});
}

TEST_CASE("a broken pickle is an error with its place", "[pickle]") {
  refused_pickle("", {"cut"});
  refused_pickle("\x80", {"cut"});
  refused_pickle("\x80\x02", {"cut"});
  refused_pickle("N.", {"does not open with PROTO"});
  refused_pickle("\x80\x06N.", {"protocol 6"});
  refused_pickle("\x80\x01N.", {"protocol 1"});
  refused_pickle(proto(""), {"its stack is empty"});
  refused_pickle(proto("NN"), {"values are left"});
  refused_pickle(proto("N("), {"its stack is empty"});
  refused_pickle(proto("t"), {"no mark"});
  refused_pickle(proto("N(\x85"), {"its stack is empty"});
  refused_pickle(proto("]Ns"), {"its stack is empty"});
  refused_pickle(proto("NNNs"), {"SETITEM in what is no dict"});
  refused_pickle(proto("}Na"), {"APPEND to what is no list"});
  refused_pickle(proto("}(Nu"), {"a key without a value"});
  refused_pickle(proto("h\x01"), {"memo 1 was never put"});
  refused_pickle(proto("q\x01"), {"its stack is empty"});
  refused_pickle(proto("X" + little(0xffffffff, 4) + "x"), {"at byte 2", "it is cut: 4294967295 more bytes"});
  refused_pickle(proto("\x8d" + little(~uint64_t{0}, 8)), {"it is cut"});
  refused_pickle(
      "\x80\x02"
      "cos",
      {"a name does not end"});
  const std::string whole = proto(dict("w", tensor({})));
  for (size_t length = 0; length < whole.size(); ++length) {
    CAPTURE(length);
    CHECK(test::error_of(
        [&] { (void)parse_pickle(whole.substr(0, length), "m.pth", [](const std::string&) { return true; }); }));
  }
}

TEST_CASE("bombs cost neither memory nor stack", "[pickle]") {
  // Each list holds the one before twice: 2^200 leaves, 400 opcodes.
  std::string doubling = "Nq" + std::string(1, '\0');
  for (int i = 1; i <= 200; ++i) doubling += "h" + std::string(1, char(i - 1)) + "h" + char(i - 1) + "\x86q" + char(i);
  const Pickle shared = parse(proto("(" + doubling + "t"));
  CHECK(shared.values.size() < 300);
  // A list that holds itself is a value like others.
  CHECK(root_of(parse(proto("]q\x01h\x01"
                            "a")))
            .items.size() == 1);
  // 50 000 tuples inside each other: nothing walks them, and nothing dies of taking them down.
  CHECK(parse(proto("N" + repeated("\x85", 50'000))).values.size() > 50'000);

  refused_pickle(proto(repeated("(", kMaxPickleMarks + 1)), {"nested deeper"});
  refused_pickle(proto(repeated("]", kMaxPickleStack + 1)), {"on its stack"});
  refused_pickle(proto("N" + repeated("\x85", kMaxPickleValues)), {"more than", "values"});
  refused_pickle(proto("Nr" + little(kMaxPickleMemo, 4)), {"memo 2000000, the limit"});
  refused_pickle(proto("Nr" + little(0xffffffff, 4)), {"memo 4294967295, the limit"});
}
