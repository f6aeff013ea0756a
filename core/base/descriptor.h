// A file descriptor that closes itself, and reads that are whole or an error.
#pragma once
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>

namespace pyra {

class Descriptor {
 public:
  Descriptor() = default;
  explicit Descriptor(int number) : number_(number) {}
  ~Descriptor();
  Descriptor(Descriptor&& other) noexcept : number_(other.release()) {}
  Descriptor& operator=(Descriptor&& other) noexcept;
  [[nodiscard]] int get() const { return number_; }
  int release();

 private:
  int number_ = -1;
};

/// Opens for reading; a folder, or anything that cannot be opened, is Error(input) with the system's reason.
[[nodiscard]] Descriptor open_for_reading(const std::filesystem::path& path);

/// The size of a regular file; Error(input) for pipes and devices, which have none.
[[nodiscard]] uint64_t regular_size(const Descriptor& file, const std::filesystem::path& path);

/// Fills `bytes` from `offset`. pread, not a mapping: a file that shrinks meanwhile is Error(input), not SIGBUS.
void read_at(const Descriptor& file, const std::filesystem::path& path, uint64_t offset, std::span<char> bytes);

/// "No such file or directory" for errno.
[[nodiscard]] std::string system_reason(int error_number);

}  // namespace pyra
