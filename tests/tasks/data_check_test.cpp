#include "tasks/data_check.h"

#include "io/io_support.h"
#include "support.h"
#include "tasks/tiny_task.h"

using namespace pyra;
using tasks::DataCheck;
using test::put;
using test::TempDir;
namespace fs = std::filesystem;

namespace {

/// Two classes, four splits as VTAB's, all sound: 1.ppm … 8.ppm.
struct Task {
  TempDir folder;
  Task() {
    fs::create_directories(folder / "images");
    for (int i = 1; i <= 8; ++i) put(image(i), test::tiny_image(uint64_t(i), i % 2));
    list("train800", {1, 2, 3});
    list("val200", {4});
    list("train800val200", {1, 2, 3, 4});
    list("test", {5, 6, 7, 8});
    put(folder / "classes.txt", "even\nodd\n");
  }
  [[nodiscard]] fs::path image(int number) const { return folder / cat("images/", number, ".ppm"); }
  void list(const std::string& split, const std::vector<int>& numbers, const std::string& more = "") const {
    std::string lines;
    for (const int number : numbers) lines += cat("images/", number, ".ppm ", number % 2, "\n");
    put(folder / (split + ".txt"), lines + more);
  }
  [[nodiscard]] DataCheck check(const fs::path& list = {}) const {
    return tasks::check_data({.data = folder.path(), .list = list});
  }
};

bool says(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

}  // namespace

TEST_CASE("a sound data set is clean, though VTAB's splits are made of one another", "[data-check]") {
  const Task task;
  const DataCheck check = task.check();
  CHECK_FALSE(check.has_faults());
  CHECK(check.warnings() == 0);
  CHECK(check.files == 8);
  REQUIRE(check.splits.size() == 4);
  CHECK(check.splits[2].name == "train800val200");
  CHECK(check.splits[2].by_class == std::vector<int64_t>{2, 2});
  CHECK(check.of_common_size == 8);
  CHECK(check.common_width == 16);
}

TEST_CASE("what is there and not looked at is told", "[data-check]") {
  const Task task;
  fs::create_symlink("nowhere", task.folder / "images/9.ppm");
  fs::create_symlink("1.ppm", task.folder / "images/10.ppm");  // a file like any other
  const DataCheck check = task.check();
  CHECK_FALSE(check.has_faults());
  CHECK(check.left_out == std::vector<std::string>{(task.folder / "images/9.ppm").string()});
  CHECK(check.warnings() == 1);
}

TEST_CASE("unreadable images are all named with their reason", "[data-check]") {
  const Task task;
  put(task.image(2), "GIF89a");
  fs::remove(task.image(6));
  const DataCheck check = task.check();
  CHECK(check.has_faults());
  REQUIRE(check.unreadable.size() == 2);
  CHECK(says(check.unreadable[0].image, "2.ppm (train800.txt:2)"));
  CHECK_FALSE(says(check.unreadable[0].text, "2.ppm"));
  CHECK_FALSE(check.unreadable[0].text.empty());
  CHECK(says(check.unreadable[1].text, "missing"));
  CHECK(check.splits[0].unreadable == 1);
  CHECK(check.splits[2].unreadable == 1);
  CHECK(check.splits[3].unreadable == 1);
  CHECK(check.warnings() == 0);
}

TEST_CASE("wrong lines and images with two labels are faults", "[data-check]") {
  const Task task;
  task.list("test", {5, 6, 7, 8}, "images/5.ppm 2\nnonsense\n../../etc/passwd 0\n");
  task.list("val200", {}, "images/4.ppm 1\n");
  const DataCheck check = task.check();
  CHECK(check.has_faults());
  REQUIRE(check.wrong_lines.size() == 3);
  CHECK(says(check.wrong_lines[0], "test.txt:5"));
  CHECK(says(check.wrong_lines[0], "label 2"));
  REQUIRE(check.two_labels.size() == 1);
  CHECK(says(check.two_labels[0], "4.ppm"));
  CHECK(says(check.two_labels[0], "train800val200.txt:4"));
}

TEST_CASE("images that test and training share are leaks, those of one split duplicates", "[data-check]") {
  const Task task;
  SECTION("the same file") {
    task.list("test", {5, 6, 7, 8, 1});
    const DataCheck check = task.check();
    REQUIRE(check.leaks.size() == 1);
    CHECK(check.leaks[0].splits == std::vector<std::string>{"test", "train800", "train800val200"});
    CHECK(check.duplicates.empty());
  }
  SECTION("the same pixels") {
    fs::copy_file(task.image(1), task.image(7), fs::copy_options::overwrite_existing);
    const DataCheck check = task.check();
    REQUIRE(check.leaks.size() == 1);
    CHECK(check.leaks[0].images.size() == 2);
    CHECK_FALSE(check.leaks[0].labels_differ);
    CHECK_FALSE(check.has_faults());
  }
  SECTION("validation and training") {
    fs::copy_file(task.image(4), task.image(3), fs::copy_options::overwrite_existing);
    const DataCheck check = task.check();
    REQUIRE(check.leaks.size() == 1);
    CHECK(check.leaks[0].labels_differ);
  }
  SECTION("within training") {
    fs::copy_file(task.image(1), task.image(3), fs::copy_options::overwrite_existing);
    const DataCheck check = task.check();
    CHECK(check.leaks.empty());
    REQUIRE(check.duplicates.size() == 1);
    CHECK(check.duplicates[0].splits == std::vector<std::string>{"train800", "train800val200"});
  }
  SECTION("a line twice") {
    task.list("test", {5, 6, 7, 8, 8});
    const DataCheck check = task.check();
    CHECK(check.leaks.empty());
    CHECK(check.duplicates.empty());
    REQUIRE(check.listed_twice.size() == 1);
    CHECK(says(check.listed_twice[0], "test.txt:5"));
  }
  SECTION("a list of one's own") {
    put(task.folder / "mine.txt", "images/2.ppm 0\nimages/8.ppm 0\n");
    const DataCheck check = task.check(task.folder / "mine.txt");
    REQUIRE(check.leaks.size() == 2);
    CHECK(check.leaks[1].splits == std::vector<std::string>{"mine", "test"});
  }
}

TEST_CASE("odd sizes, one colour, and classes without images are warned of", "[data-check]") {
  const Task task;
  put(task.folder / "classes.txt", "even\nodd\nthird\nfourth\n");
  std::string extra;
  const auto add = [&](int number, int width, int height, char fill) {
    std::string pixels(size_t(width * height * 3), fill);
    pixels[0] = char(fill + (fill != '7'));
    put(task.image(number), cat("P6\n", width, " ", height, "\n255\n", pixels));
    extra += cat("images/", number, ".ppm 2\n");
  };
  add(10, 4, 8, 'a');
  add(11, 10, 41, 'b');
  add(12, 10, 40, 'c');
  add(13, 16, 16, '7');
  task.list("test", {5, 6, 7, 8}, extra);
  const DataCheck check = task.check();
  CHECK_FALSE(check.has_faults());
  REQUIRE(check.odd_sizes.size() == 2);
  CHECK(says(check.odd_sizes[0].text, "4 x 8"));
  CHECK(says(check.odd_sizes[1].text, "10 x 41"));
  REQUIRE(check.one_colour.size() == 1);
  CHECK(says(check.one_colour[0], "13.ppm"));
  CHECK(check.empty_classes == std::vector<std::string>{"fourth"});
  CHECK(check.splits[3].not_in_train == std::vector<std::string>{"third"});
  CHECK(check.warnings() == 5);
  CHECK(check.smallest_side == 4);
  CHECK(check.largest_side == 41);
}

TEST_CASE("one image of another size among many of one size is odd", "[data-check]") {
  const TempDir folder;
  std::string lines;
  for (int i = 0; i < 20; ++i) {
    put(folder / cat(i, ".ppm"), i == 7 ? cat("P6\n12 16\n255\n", std::string(12 * 16 * 3 - 1, 'a'), "b")
                                        : test::tiny_image(uint64_t(i), i % 3));
    lines += cat(i, ".ppm ", i % 3, "\n");
  }
  put(folder / "train.txt", lines);
  const DataCheck check = tasks::check_data({.data = folder.path(), .list = {}});
  REQUIRE(check.odd_sizes.size() == 1);
  CHECK(says(check.odd_sizes[0].image, "7.ppm"));
  CHECK(says(check.odd_sizes[0].text, "others have 16 x 16"));
  CHECK(check.warnings() == 1);
}

TEST_CASE("image folders and archives are checked as they lie", "[data-check]") {
  const TempDir folder;
  for (const char* split : {"train", "test"})
    for (int label = 0; label < 3; ++label) {
      const fs::path place = folder / "set" / split / cat("class-", label);
      fs::create_directories(place);
      const uint64_t number = uint64_t(label) + (std::string(split) == "train" ? 10 : 0);
      put(place / "1.ppm", test::tiny_image(number, label));
    }
  CHECK(tasks::check_data({.data = folder / "set", .list = {}}).warnings() == 0);
  fs::remove(folder / "set/train/class-1/1.ppm");
  fs::copy(folder / "set/train/class-2/1.ppm", folder / "set/test/class-2/2.ppm");
  REQUIRE(test::run({"tar", "-cf", "set.tar", "set"}, folder.path()).exit_code == 0);
  for (const char* data : {"set", "set.tar"}) {
    CAPTURE(data);
    const DataCheck check = tasks::check_data({.data = folder / data, .list = {}});
    CHECK_FALSE(check.has_faults());
    REQUIRE(check.leaks.size() == 1);
    CHECK(check.leaks[0].splits == std::vector<std::string>{"test", "train"});
    CHECK(check.splits[0].not_in_train == std::vector<std::string>{"class-1"});
  }
}
