#include "io/file_kind.h"

#include <algorithm>
#include <cctype>

namespace pyra::io {
namespace {

using namespace std::string_view_literals;

struct Magic {
  size_t offset;
  std::string_view bytes, kind;
};

constexpr Magic kMagics[] = {
    {0, "version https://git-lfs"sv, "a Git LFS pointer, not the file itself; run 'git lfs pull' to fetch it"},
    {0, "PK\x03\x04"sv,
     "a zip archive: a PyTorch .pth or .pt, which 'pyractl convert FILE --out MODEL.safetensors' reads, or a damaged "
     ".npz"},
    {0, "\x1f\x8b"sv, "gzip-compressed; unpack it first"},
    {0, "BZh"sv, "bzip2-compressed; unpack it first"},
    {0, "\xfd\x37zXZ"sv, "xz-compressed; unpack it first"},
    {0, "\x28\xb5\x2f\xfd"sv, "zstd-compressed; unpack it first"},
    {257, "ustar"sv, "a tar archive"},
    {0, "\x89HDF"sv, "an HDF5 file (Keras?)"},
    {0, "\x93NUMPY"sv, "a NumPy array"},
    {0, "GGUF"sv, "a GGUF file"},
    {0, "\x89PNG"sv, "a PNG image"},
    {0, "\xff\xd8\xff"sv, "a JPEG image"},
    {0,
     "\x7f"
     "ELF"sv,
     "a program or a shared library"},
};

bool opens_with(std::string_view text, std::string_view lower_case_word) {
  return text.size() >= lower_case_word.size() &&
         std::equal(lower_case_word.begin(), lower_case_word.end(), text.begin(),
                    [](char word, char letter) { return word == std::tolower(static_cast<unsigned char>(letter)); });
}

}  // namespace

std::string foreign_kind(std::string_view first_bytes) {
  for (const Magic& magic : kMagics) {
    if (first_bytes.size() > magic.offset && first_bytes.substr(magic.offset).starts_with(magic.bytes)) {
      return std::string(magic.kind);
    }
  }
  // A pickle opens with PROTO and its version; torch.save wrote bare pickles before 1.6.
  if (first_bytes.size() >= 2 && first_bytes[0] == '\x80' && first_bytes[1] >= 2 && first_bytes[1] <= 5) {
    return "a Python pickle (an old PyTorch file?); 'pyractl convert FILE --out MODEL.safetensors' reads torch.save's "
           "files";
  }
  const size_t start = std::min(first_bytes.find_first_not_of(" \t\r\n"), first_bytes.size());
  const std::string_view text = first_bytes.substr(start);
  if (opens_with(text, "<!doctype html") || opens_with(text, "<html") || opens_with(text, "<head")) {
    return "an HTML page (an error page saved by a download?)";
  }
  if (text.starts_with('{') || text.starts_with("[")) return "JSON text";
  return "";
}

}  // namespace pyra::io
