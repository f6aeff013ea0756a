#include "host/elf_check.h"

#include <elf.h>

#include <cstring>
#include <fstream>

#include "base/text.h"

namespace pyra::host {
namespace {

#if defined(__x86_64__)
constexpr uint16_t kMachine = EM_X86_64;
#elif defined(__aarch64__)
constexpr uint16_t kMachine = EM_AARCH64;
#endif

template <class T>
bool read_at(std::ifstream& file, uint64_t offset, T& value) {
  file.seekg(std::streamoff(offset));
  return bool(file.read(reinterpret_cast<char*>(&value), sizeof(T)));
}

/// Whether [offset, offset + length) lies within a file of `size` bytes.
bool within(uint64_t offset, uint64_t length, uint64_t size) {
  return offset <= size && length <= size - offset;
}

std::string cut(uint64_t size, const char* part) {
  return cat("it is truncated: it has ", size, " bytes and its ", part, " lies beyond them");
}

}  // namespace

std::string check_elf(const std::filesystem::path& path) {
  std::error_code error;
  if (!std::filesystem::is_regular_file(path, error)) {
    return std::filesystem::exists(path, error) ? "it is not a file" : "there is no such file";
  }
  const uint64_t size = std::filesystem::file_size(path, error);
  std::ifstream file(path, std::ios::binary);
  if (error || !file) return "it cannot be read";

  Elf64_Ehdr header;
  if (size < sizeof(header)) return cut(size, "ELF header");
  if (!read_at(file, 0, header)) return "it cannot be read";
  if (std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0) return "it is not an ELF shared object";
  if (header.e_ident[EI_CLASS] != ELFCLASS64 || header.e_ident[EI_DATA] != ELFDATA2LSB ||
      header.e_machine != kMachine) {
    return "it was built for another machine";
  }
  if (header.e_type != ET_DYN) return "it is an ELF file, but not a shared object";
  if (header.e_phentsize != sizeof(Elf64_Phdr) || header.e_phnum == 0) return "its ELF header is damaged";
  if (!within(header.e_phoff, uint64_t(header.e_phnum) * sizeof(Elf64_Phdr), size)) return cut(size, "program headers");
  if (header.e_shnum > 0 && !within(header.e_shoff, uint64_t(header.e_shnum) * header.e_shentsize, size)) {
    return cut(size, "section headers");
  }
  for (uint64_t i = 0; i < header.e_phnum; ++i) {
    Elf64_Phdr segment;
    if (!read_at(file, header.e_phoff + i * sizeof(segment), segment)) return "it cannot be read";
    if (!within(segment.p_offset, segment.p_filesz, size)) return cut(size, "program segments");
  }
  return {};
}

}  // namespace pyra::host
