// Labelled images in folders or in a .tar: VTAB-1k list files, or ImageFolder.
#pragma once
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

namespace pyra::data {

struct Sample {
  std::string path;  ///< inside the data set
  int64_t label = 0;
  std::string origin;  ///< "test.txt:17": the line that names it; empty in an ImageFolder
};

/// At an image that does not decode.
enum class BadImages { fail, skip };

/// One that was skipped.
struct BadImage {
  std::string path, reason;
};

/// For looking into a data set that may be at fault.
struct OpenOptions {
  /// One more list file, `path label` by the data set's root; its split is called by the file's name without ".txt".
  std::filesystem::path list{};
  /// Where given: lines of list files that are wrong, and lists without a good line, are named here (as the error would
  /// be) and left out.
  std::vector<std::string>* faults = nullptr;
};

/// A data set's table of contents; bytes are read on demand, thread-safe. In a .tar nothing is unpacked: members are
/// found by one pass over the headers and read in place, so a compressed one is refused. Links, absolute names and
/// ".." in a .tar are ignored; in a list file the latter two are errors.
///
/// List files hold lines `path label`, split at the last space; blank lines and CRLF are fine. Every fault of a line
/// is Error(input) naming list and line when the data set is opened, a missing image when it is read.
class Dataset {
 public:
  /// `path` is a folder or a .tar holding train800.txt … test.txt (and maybe classes.txt) at its root or in its only
  /// folder, or an ImageFolder: <split>/<class>/<image>, or <class>/<image>, where a fifth of each class, always the
  /// same, becomes "test" and the rest "train". Classes are sorted by name. Error(input).
  ///
  /// Two of VTAB's tasks go by two names: where `path` is missing, "cifar" and "cifar100", "oxford_pet" and
  /// "oxford_iiit_pet" stand for one another (with ".tar" too), and path() says which was found.
  [[nodiscard]] static Dataset open(const std::filesystem::path& path);
  [[nodiscard]] static Dataset open(const std::filesystem::path& path, const OpenOptions& options);
  /// Every image in or below `path`, a folder (at most 8 folders deep, links to folders followed) or a .tar, that is
  /// not hidden, whatever else lies there, sorted: the one split kUnlabelled, all of label 0. Error(input), also when
  /// there are none.
  [[nodiscard]] static Dataset unlabelled(const std::filesystem::path& path);
  static constexpr const char* kUnlabelled = "images";
  ~Dataset();
  Dataset(Dataset&&) noexcept;
  Dataset& operator=(Dataset&&) noexcept;

  [[nodiscard]] const std::filesystem::path& path() const;
  [[nodiscard]] const std::vector<std::string>& class_names() const;  ///< by label; "0", "1", … when unnamed
  [[nodiscard]] int64_t num_classes() const;
  /// "train800", "val200", "train800val200" (also called "train"), "train", "val", "test", or an ImageFolder's own.
  [[nodiscard]] std::vector<std::string> splits() const;
  /// Error(input) naming the splits that exist.
  [[nodiscard]] const std::vector<Sample>& split(const std::string& name) const;
  [[nodiscard]] bool has_split(const std::string& name) const;
  /// How messages name what is there and is no file of the data set: links that lead nowhere, folders that lie too
  /// deep, in a .tar all links.
  [[nodiscard]] std::vector<std::string> left_out() const;
  /// The encoded bytes of a sample; Error(input) naming list file and line when it is missing, and when it is larger
  /// than kMaxImageBytes (data/image.h).
  [[nodiscard]] std::vector<uint8_t> read(const Sample& sample) const;
  /// How messages name a sample: "set.tar: images/1.png (test.txt:17)".
  [[nodiscard]] std::string describe(const Sample& sample) const;

 private:
  struct State;
  explicit Dataset(std::shared_ptr<State> state);
  std::shared_ptr<State> state_;
};

}  // namespace pyra::data
