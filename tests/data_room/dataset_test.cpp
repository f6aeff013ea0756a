#include "data/dataset.h"

#include <set>

#include "data_support.h"
#include "support.h"

namespace pyra::data {
namespace {

using test::check_error;
using test::get;
using test::kDemo;
using test::put;
using test::TempDir;
using Files = std::vector<std::pair<std::string, std::string>>;

void write_folder(const std::filesystem::path& root, const Files& files) {
  for (const auto& [name, bytes] : files) {
    std::filesystem::create_directories((root / name).parent_path());
    put(root / name, bytes);
  }
}

/// One ustar member, header and padded bytes; `link` makes it a symbolic link.
std::string tar_member(const std::string& name, const std::string& bytes, const std::string& link) {
  std::string header(512, '\0');
  const auto field = [&](size_t at, const std::string& text) { header.replace(at, text.size(), text); };
  const auto octal = [](uint64_t value) {
    std::string digits(11, '0');
    for (size_t i = 11; i-- > 0; value /= 8) digits[i] = char('0' + value % 8);
    return digits;
  };
  field(0, name);
  field(100, "0000644");
  field(124, octal(bytes.size()));
  field(136, octal(0));
  field(148, "        ");
  field(156, link.empty() ? "0" : "2");
  field(157, link);
  field(257, std::string("ustar\00000", 8));
  uint64_t sum = 0;
  for (const char c : header) sum += uint8_t(c);
  field(148, octal(sum).substr(5));
  header[154] = '\0';
  return header + bytes + std::string((512 - bytes.size() % 512) % 512, '\0');
}

/// A ustar archive; a name ending in "->x" is a link to x.
void write_tar(const std::filesystem::path& path, const Files& files) {
  std::string archive;
  for (const auto& [name, bytes] : files) {
    const size_t arrow = name.find("->");
    archive += tar_member(name.substr(0, arrow), bytes, arrow == std::string::npos ? "" : name.substr(arrow + 2));
  }
  put(path, archive + std::string(1024, '\0'));
}

std::string text_of(const std::vector<uint8_t>& bytes) {
  return {bytes.begin(), bytes.end()};
}

std::vector<std::string> paths_of(const std::vector<Sample>& samples) {
  std::vector<std::string> paths;
  for (const Sample& sample : samples) paths.push_back(sample.path);
  return paths;
}

TEST_CASE("the demo's data set opens in place") {
  const Dataset dataset = Dataset::open(kDemo);
  CHECK(dataset.num_classes() == 10);
  CHECK(dataset.class_names().front() == "t-shirt");
  CHECK(dataset.class_names().back() == "ankle-boot");
  CHECK(dataset.splits() == std::vector<std::string>{"train800", "val200", "train800val200", "test"});
  CHECK(dataset.split("train800").size() == 800);
  CHECK(dataset.split("val200").size() == 200);
  CHECK(&dataset.split("train") == &dataset.split("train800val200"));
  CHECK(dataset.split("test").size() == 1000);
  CHECK_FALSE(dataset.has_split("val"));
  check_error(ExitCode::input, {"fashion_mnist_1k.tar", "'val'", "train800, val200, train800val200, test"},
              [&] { (void)dataset.split("val"); });
  std::set<std::string> train;
  for (const Sample& sample : dataset.split("train")) train.insert(sample.path);
  for (const Sample& sample : dataset.split("test")) {
    REQUIRE_FALSE(train.contains(sample.path));
    const Image image = decode(dataset.read(sample), sample.path);
    REQUIRE((image.height == 28 && image.width == 28));
  }
}

TEST_CASE("list files: spaces in paths, CRLF, blank lines, labels without names") {
  const TempDir folder;
  write_folder(folder.path(), {{"test.txt", "images/a b.png 3\r\n\r\n\n./images//c.png 0  \n"},
                               {"images/a b.png", "first"},
                               {"images/c.png", "second"}});
  const Dataset dataset = Dataset::open(folder.path());
  CHECK(dataset.class_names() == std::vector<std::string>{"0", "1", "2", "3"});
  const auto& samples = dataset.split("test");
  REQUIRE(samples.size() == 2);
  CHECK(samples[0].path == "images/a b.png");
  CHECK(samples[0].label == 3);
  CHECK(samples[0].origin == "test.txt:1");
  CHECK(samples[1].origin == "test.txt:4");
  CHECK(text_of(dataset.read(samples[1])) == "second");
}

TEST_CASE("every fault of a list file is named by file and line") {
  const TempDir folder;
  const auto refuse = [&](const std::string& list, const std::vector<std::string>& words) {
    CAPTURE(list);
    write_folder(folder.path(), {{"classes.txt", "cat\ndog\n"}, {"val200.txt", list}});
    check_error(ExitCode::input, words, [&] { (void)Dataset::open(folder.path()); });
  };
  refuse("a.png 0\na.png 2\n", {"val200.txt:2", "label 2", "0 to 1"});
  refuse("a.png 0\n\nb.png -1\n", {"val200.txt:3", "label -1"});
  refuse("a.png cat\n", {"val200.txt:1", "'cat'", "path label"});
  refuse("a.png 1x\n", {"val200.txt:1", "'1x'"});
  refuse("a.png 99999999999999999999\n", {"val200.txt:1", "99999999999999999999"});
  refuse("a.png\n", {"val200.txt:1", "'a.png'", "path label"});
  refuse("/etc/passwd 0\n", {"val200.txt:1", "/etc/passwd", "out of the data set"});
  refuse("images/../../x 0\n", {"val200.txt:1", "out of the data set"});
  refuse(" 0\n", {"val200.txt:1"});
  refuse("\n\r\n", {"val200.txt", "no image"});
  refuse("", {"val200.txt", "no image"});
  write_folder(folder.path(), {{"val200.txt", "a.png 0\n"}, {"classes.txt", "cat\n\ndog\n"}});
  check_error(ExitCode::input, {"classes.txt:2", "blank"}, [&] { (void)Dataset::open(folder.path()); });
  write_folder(folder.path(), {{"classes.txt", "\n"}});
  check_error(ExitCode::input, {"classes.txt", "0 classes"}, [&] { (void)Dataset::open(folder.path()); });
  std::filesystem::remove(folder / "classes.txt");
  write_folder(folder.path(), {{"val200.txt", "a.png 1048576\n"}});
  check_error(ExitCode::input, {"val200.txt:1", "1048575"}, [&] { (void)Dataset::open(folder.path()); });
}

TEST_CASE("names and lines that others wrote are shown without their control characters, and not at any length") {
  const TempDir folder;
  const auto message = [&](const Files& files) {
    write_tar(folder / "set.tar", files);
    const auto error = test::error_of([&] {
      const Dataset dataset = Dataset::open(folder / "set.tar");
      (void)dataset.read(dataset.split("test")[0]);
    });
    return error ? std::string(error->what()) : "";
  };
  const std::string image = "a\x1b[2J\n.png", shown = "a\\x1b[2J\\x0a.png";
  CHECK(message({{"test.txt", "a\x1b[2J.png 0\n"}}).find("set.tar: a\\x1b[2J.png (test.txt:1)") != std::string::npos);
  CHECK(message({{"test.txt", "/\x1b[2J.png 0\n"}}).find("'/\\x1b[2J.png' leads") != std::string::npos);
  CHECK(message({{"test.txt", "a.png \x1b\n"}}).find("label '\\x1b'") != std::string::npos);
  CHECK(message({{"test.txt", "\x1b" + std::string(100'000, 'x') + "\n"}}).size() < 1000);
  CHECK(message({{"b/" + image, ""}, {"c/d/e.png", ""}}).find(shown + " does not lie as deep") != std::string::npos);
  put(folder / "cut.tar", tar_member(image, std::string(2000, 'a'), "").substr(0, 1024));
  test::check_error(ExitCode::input, {"member " + shown}, [&] { (void)Dataset::open(folder / "cut.tar"); });
}

TEST_CASE("faults of list files are collected where they are asked for") {
  const TempDir folder;
  write_folder(folder.path(), {{"classes.txt", "cat\ndog\n"},
                               {"train.txt", "a.png 0\na.png 2\n/etc/passwd 0\nb.png x\nb.png 1\n"},
                               {"test.txt", "c.png 7\n"},
                               {"more/mine.txt", "d.png 1\ne.png -1\n"}});
  std::vector<std::string> faults;
  const Dataset dataset = Dataset::open(folder.path(), {.list = folder / "more/mine.txt", .faults = &faults});
  CHECK(dataset.splits() == std::vector<std::string>{"train", "test", "mine"});
  CHECK(paths_of(dataset.split("train")) == std::vector<std::string>{"a.png", "b.png"});
  CHECK(dataset.split("test").empty());
  CHECK(paths_of(dataset.split("mine")) == std::vector<std::string>{"d.png"});
  CHECK(dataset.split("mine")[0].origin == "mine.txt:1");
  REQUIRE(faults.size() == 6);
  const std::vector<std::pair<std::string, std::string>> expected{
      {"train.txt:2", "label 2"}, {"train.txt:3", "/etc/passwd"}, {"train.txt:4", "'x'"},
      {"test.txt:1", "label 7"},  {"test.txt", "no image"},       {"mine.txt:2", "label -1"}};
  for (size_t i = 0; i < faults.size(); ++i) {
    CAPTURE(faults[i]);
    CHECK(faults[i].find(expected[i].first) != std::string::npos);
    CHECK(faults[i].find(expected[i].second) != std::string::npos);
  }
  write_folder(folder.path(), {{"train.txt", "a.png 0\n"}, {"test.txt", "c.png 1\n"}});
  check_error(ExitCode::input, {"none.txt", "no such list"},
              [&] { (void)Dataset::open(folder.path(), {.list = folder / "none.txt"}); });
  check_error(ExitCode::input, {"mine.txt:2", "label -1"},
              [&] { (void)Dataset::open(folder / "more/..", {.list = folder / "more/mine.txt"}); });
}

TEST_CASE("one more list names images of an image folder by the number of their class") {
  const TempDir folder;
  write_folder(folder.path(), {{"set/ant/1.png", "1"}, {"set/bee/2.png", "2"}, {"few.txt", "bee/2.png 1\n"}});
  const Dataset dataset = Dataset::open(folder / "set", {.list = folder / "few.txt"});
  REQUIRE(dataset.has_split("few"));
  CHECK(text_of(dataset.read(dataset.split("few")[0])) == "2");
  write_folder(folder.path(), {{"few.txt", "bee/2.png 2\n"}});
  check_error(ExitCode::input, {"few.txt:1", "0 to 1"},
              [&] { (void)Dataset::open(folder / "set", {.list = folder / "few.txt"}); });
}

TEST_CASE("a task of VTAB is found under either of its names") {
  for (const auto& [asked, there] : {std::pair<std::string, std::string>{"cifar", "cifar100"},
                                     {"cifar100", "cifar"},
                                     {"oxford_pet", "oxford_iiit_pet"},
                                     {"oxford_iiit_pet", "oxford_pet"}}) {
    CAPTURE(asked);
    const TempDir folder;
    const Files files{{"test.txt", "a.png 0\n"}, {"a.png", "there"}};
    write_folder(folder / there, files);
    write_tar(folder / (there + ".tar"), files);
    for (const std::string end : {"", "/", ".tar"}) {
      const Dataset dataset = Dataset::open(folder / (asked + end));
      CHECK(text_of(dataset.read(dataset.split("test")[0])) == "there");
      CHECK(dataset.path() == folder / (end == ".tar" ? there + end : there));
    }
    // What is there under the name that was asked for is never exchanged.
    write_folder(folder / asked, {{"test.txt", "a.png 0\n"}, {"a.png", "asked"}});
    const Dataset dataset = Dataset::open(folder / asked);
    CHECK(text_of(dataset.read(dataset.split("test")[0])) == "asked");
    check_error(ExitCode::input, {"cifar10", "no such file"}, [&] { (void)Dataset::open(folder / "cifar10"); });
  }
}

TEST_CASE("a missing image is named by list, line and path, in a folder and in a tar") {
  const TempDir folder;
  const Files files{{"set/test.txt", "images/here.png 0\nimages/gone.png 1\n"}, {"set/images/here.png", "here"}};
  write_folder(folder / "root", files);
  write_tar(folder / "set.tar", files);
  for (const char* name : {"root", "set.tar"}) {
    const Dataset dataset = Dataset::open(folder / name);
    const auto& samples = dataset.split("test");
    CHECK(text_of(dataset.read(samples[0])) == "here");
    check_error(ExitCode::input, {name, "set/images/gone.png", "test.txt:2", "missing"},
                [&] { (void)dataset.read(samples[1]); });
  }
}

TEST_CASE("members of every tar dialect are found where they lie") {
  const TempDir folder;
  const std::string unicode = "na\xc3\xafve/\xe5\x9b\xbe.png";
  for (const std::string dialect : {"ustar", "gnu", "pax"}) {
    CAPTURE(dialect);
    // Longer than any ustar field: GNU and pax put such names in a member of their own before the file's.
    const std::string deep =
        dialect == "ustar" ? "d/short.png" : std::string(90, 'd') + "/" + std::string(150, 'n') + ".png";
    const Files files{{deep, std::string(1000, 'l')}, {unicode, "unicode"}, {"empty.png", ""}};
    write_folder(folder / dialect, files);
    put(folder / dialect / "test.txt", deep + " 0\n" + unicode + " 1\nempty.png 0\n");
    const auto made =
        test::run({"tar", "--format=" + dialect, "-cf", (folder / "set.tar").string(), dialect}, folder.path());
    CAPTURE(made.err);
    REQUIRE(made.exit_code == 0);
    const Dataset dataset = Dataset::open(folder / "set.tar");
    const auto& samples = dataset.split("test");
    REQUIRE(samples.size() == 3);
    for (size_t i = 0; i < 3; ++i) CHECK(text_of(dataset.read(samples[i])) == files[i].second);
  }
}

TEST_CASE("what a hostile tar holds beside plain files inside it is not there") {
  const TempDir folder;
  put(folder / "secret", "secret");
  const Files files{{"../secret", "1"},
                    {"/absolute", "2"},
                    {"set/link.png->" + (folder / "secret").string(), ""},
                    {"set/a/../../up.png", "3"},
                    {"set/twice.png", "old"},
                    {"set/twice.png", "new"},
                    {"set/test.txt", "link.png 0\ntwice.png 0\n"}};
  write_tar(folder / "set.tar", files);
  const Dataset dataset = Dataset::open(folder / "set.tar");
  const auto& samples = dataset.split("test");
  check_error(ExitCode::input, {"link.png", "missing"}, [&] { (void)dataset.read(samples[0]); });
  CHECK(text_of(dataset.read(samples[1])) == "new");
  // ... and is told: the three names that lead out, and the link.
  const std::vector<std::string> left_out = dataset.left_out();
  REQUIRE(left_out.size() == 4);
  for (const char* name : {"../secret", "/absolute", "set/a/../../up.png", "set/link.png"})
    CHECK(std::ranges::any_of(left_out, [&](const std::string& told) { return told.ends_with(name); }));
}

TEST_CASE("a damaged archive is refused wherever it is damaged") {
  const TempDir folder;
  const std::string whole = get(kDemo).substr(0, 60'000);
  for (size_t size = 0; size < whole.size(); size += 997) {
    CAPTURE(size);
    put(folder / "cut.tar", whole.substr(0, size));
    check_error(ExitCode::input, {"cut.tar"}, [&] { (void)Dataset::open(folder / "cut.tar"); });
  }
  write_tar(folder / "set.tar", {{"test.txt", "a.png 0\n"}, {"a.png", std::string(700, 'a')}});
  const std::string good = get(folder / "set.tar");
  for (size_t at = 0; at < 2048; ++at) {
    CAPTURE(at);
    std::string bad = good;
    bad[at] = char(~bad[at]);
    put(folder / "bad.tar", bad);
    const auto error = test::error_of([&] { (void)Dataset::open(folder / "bad.tar"); });
    if (error) REQUIRE(error->code() == ExitCode::input);
  }
}

TEST_CASE("what is no data set is refused by name") {
  const TempDir folder;
  const auto refuse = [&](const std::filesystem::path& path, const std::vector<std::string>& words) {
    check_error(ExitCode::input, words, [&] { (void)Dataset::open(path); });
  };
  refuse(folder / "nowhere", {"nowhere", "no such file"});
  refuse("/dev/null", {"/dev/null", "neither a folder nor a .tar"});
  refuse(folder.path(), {folder.path().string(), "train800.txt", "<class>/<image>"});
  put(folder / "set.tar.gz", "\x1f\x8b\x08\x00rest");
  refuse(folder / "set.tar.gz", {"set.tar.gz", "gzip", "unpack"});
  put(folder / "text", "hello");
  refuse(folder / "text", {"text", "not a readable .tar"});
  put(folder / "empty", "");
  refuse(folder / "empty", {"empty", "not a readable .tar"});
}

TEST_CASE("an image folder with splits takes its classes from all of them, sorted") {
  const TempDir folder;
  const Files files{{"set/train/zebra/1.jpg", "1"}, {"set/train/ant/2.PNG", "2"},   {"set/val/ant/3.bmp", "3"},
                    {"set/val/bee/4.ppm", "4"},     {"set/val/.hidden/5.png", "5"}, {"set/val/bee/.6.png", "6"},
                    {"set/val/bee/notes.txt", "7"}, {"set/README", "not an image"}};
  write_folder(folder / "root", files);
  write_tar(folder / "set.tar", files);
  for (const auto& path : {folder / "root", folder / "root/set", folder / "set.tar"}) {
    const Dataset dataset = Dataset::open(path);
    CHECK(dataset.class_names() == std::vector<std::string>{"ant", "bee", "zebra"});
    CHECK(dataset.splits() == std::vector<std::string>{"train", "val"});
    const auto& train = dataset.split("train");
    REQUIRE(train.size() == 2);
    CHECK(train[0].label == 0);
    CHECK(text_of(dataset.read(train[0])) == "2");
    CHECK(train[1].label == 2);
    REQUIRE(dataset.split("val").size() == 2);
    CHECK(dataset.split("val")[1].label == 1);
  }
  write_folder(folder / "root", {{"set/stray.png", ""}});
  check_error(ExitCode::input, {"stray.png", "<class>/<image>"}, [&] { (void)Dataset::open(folder / "root"); });
}

TEST_CASE("an image folder without splits is split 80/20 in every class, always alike") {
  const TempDir folder;
  Files files;
  for (int i = 0; i < 50; ++i) files.push_back({cat("b/", i, ".png"), "b"});
  for (int i = 0; i < 13; ++i) files.push_back({cat("a/", i, ".png"), "a"});
  files.push_back({"c/only.png", "c"});
  write_folder(folder / "plain", files);
  write_folder(folder / "again/data", files);
  write_tar(folder / "set.tar", files);
  const auto test_paths = [](const Dataset& dataset) { return paths_of(dataset.split("test")); };
  const Dataset dataset = Dataset::open(folder / "plain");
  CHECK(dataset.class_names() == std::vector<std::string>{"a", "b", "c"});
  std::array<int, 3> train{}, test{};
  std::set<std::string> seen;
  for (const Sample& sample : dataset.split("train")) ++train.at(size_t(sample.label)), seen.insert(sample.path);
  for (const Sample& sample : dataset.split("test")) ++test.at(size_t(sample.label)), seen.insert(sample.path);
  CHECK(train == std::array<int, 3>{10, 40, 1});
  CHECK(test == std::array<int, 3>{3, 10, 0});
  CHECK(seen.size() == 64);
  CHECK(test_paths(dataset) == test_paths(Dataset::open(folder / "plain")));
  CHECK(test_paths(dataset) == test_paths(Dataset::open(folder / "set.tar")));
  CHECK(Dataset::open(folder / "again").class_names() == dataset.class_names());
}

TEST_CASE("a set without labels is every image of a folder or .tar, those below it too, and nothing else") {
  const TempDir folder;
  write_folder(folder.path(), {{"b.JPG", ""}, {"a.png", ""}, {"sub/c.bmp", ""}, {"d.txt", ""}, {".e.png", ""}});
  const auto paths = [](const Dataset& dataset) {
    std::vector<std::string> found;
    for (const Sample& sample : dataset.split(Dataset::kUnlabelled)) found.push_back(sample.path);
    return found;
  };
  CHECK(paths(Dataset::unlabelled(folder.path())) == std::vector<std::string>{"a.png", "b.JPG", "sub/c.bmp"});
  const TempDir other;
  write_tar(other / "set.tar", {{"b.JPG", ""}, {"a.png", ""}, {"d.txt", ""}});
  CHECK(paths(Dataset::unlabelled(other / "set.tar")) == std::vector<std::string>{"a.png", "b.JPG"});
  const TempDir empty;
  check_error(ExitCode::input, {empty.path().string(), "no image", ".jpg"},
              [&] { (void)Dataset::unlabelled(empty.path()); });
  check_error(ExitCode::input, {"none", "no such file"}, [&] { (void)Dataset::unlabelled(empty / "none"); });
}

}  // namespace
}  // namespace pyra::data
