// The forge_ functions: formats taken apart, changed and put together again.
#include <algorithm>
#include <optional>

#include "fuzz/mutator.h"
#include "io/pickle_writer.h"

namespace pyra::fuzz {
namespace {

using test::little;
using test::ZipEntry;

uint64_t number_at(std::string_view bytes, size_t at, size_t width) {
  uint64_t value = 0;
  for (size_t i = 0; i < width && at + i < bytes.size(); ++i)
    value |= uint64_t(static_cast<unsigned char>(bytes[at + i])) << (8 * i);
  return value;
}

std::string big(uint64_t value, int width) {
  std::string bytes = little(value, width);
  return {bytes.rbegin(), bytes.rend()};
}

/// The entries of an archive by its local headers; nothing where one is packed or hides its size.
std::optional<std::vector<ZipEntry>> entries_of(std::string_view bytes) {
  constexpr size_t kHeader = 30, kUnknownSize = 8;
  std::vector<ZipEntry> entries;
  for (size_t at = 0; bytes.substr(at).starts_with("PK\x03\x04");) {
    const size_t flags = number_at(bytes, at + 6, 2), method = number_at(bytes, at + 8, 2);
    const size_t size = number_at(bytes, at + 22, 4), name = number_at(bytes, at + 26, 2);
    const size_t start = at + kHeader + name + number_at(bytes, at + 28, 2);
    if (method != 0 || (flags & kUnknownSize) || start + size > bytes.size()) return {};
    entries.push_back(
        {.name = std::string(bytes.substr(at + kHeader, name)), .bytes = std::string(bytes.substr(start, size))});
    at = start + size;
  }
  return entries;
}

/// Mostly what is no tensor's data: the pickle, or a header at the start of an entry.
void damage_entry(Random& random, std::vector<ZipEntry>& entries, Words words) {
  const auto pickle = std::ranges::find_if(entries, [](const ZipEntry& e) { return e.name.ends_with(".pkl"); });
  ZipEntry& entry = pickle != entries.end() && !random.one_in(4) ? *pickle : random.choose(entries);
  constexpr size_t kNpyHeader = 128;
  if (!entry.bytes.starts_with("\x93NUMPY") || entry.bytes.size() < kNpyHeader || random.one_in(4)) {
    entry.bytes = damage(random, entry.bytes, words);
    return;
  }
  std::string header = damage_text(random, entry.bytes.substr(10, kNpyHeader - 10), words);
  const size_t length = random.one_in(8) ? size_t(random.number()) : header.size();
  entry.bytes = entry.bytes.substr(0, 8) + little(length, 2) + header + entry.bytes.substr(kNpyHeader);
}

void forge_entry(Random& random, std::vector<ZipEntry>& entries, Words words) {
  ZipEntry& entry = random.choose(entries);
  switch (random.below(7)) {
    case 0:
      entry.name = damage_text(random, entry.name, words);
      break;
    case 1:
      entries.push_back(entry);
      break;
    case 2:
      entries.erase(entries.begin() + (&entry - entries.data()));
      break;
    case 3:
      entry.stated_size = uint32_t(random.number());
      break;
    case 4:
      entry.directory_size = uint32_t(random.number());
      break;
    case 5:
      entry.flags = uint16_t(random.bits());
      break;
    default:
      entry.bytes.resize(random.one_in(2) ? random.below(entry.bytes.size() + 1) : random.below(100'000));
  }
}

struct Chunk {
  std::string type, data;
};

std::vector<Chunk> chunks_of(std::string_view bytes) {
  std::vector<Chunk> chunks;
  for (size_t at = 8; at + 12 <= bytes.size();) {
    const std::string length(bytes.rbegin() + std::ptrdiff_t(bytes.size() - at - 4),
                             bytes.rbegin() + std::ptrdiff_t(bytes.size() - at));
    const size_t size = number_at(length, 0, 4);
    if (size > bytes.size() - at - 12) break;
    chunks.push_back({std::string(bytes.substr(at + 4, 4)), std::string(bytes.substr(at + 8, size))});
    at += size + 12;
  }
  return chunks;
}

std::string tar_header(const std::string& name, size_t size, char type = '0') {
  std::string header(512, '\0');
  char octal[16] = {};
  std::snprintf(octal, sizeof octal, "%011zo", size);
  header.replace(0, std::min<size_t>(name.size(), 100), name.substr(0, 100));
  header.replace(100, 7, "0000644").replace(108, 7, "0000000").replace(116, 7, "0000000");
  header.replace(124, 11, octal).replace(136, 11, "00000000000");
  header[156] = type;
  return header.replace(257, 8, std::string("ustar\00000", 8));
}

void seal_tar_header(std::string& bytes, size_t at) {
  std::fill_n(bytes.begin() + std::ptrdiff_t(at + 148), 8, ' ');
  unsigned sum = 0;
  for (size_t i = 0; i < 512; ++i) sum += static_cast<unsigned char>(bytes[at + i]);
  char octal[8] = {};
  std::snprintf(octal, sizeof octal, "%06o", sum);
  bytes.replace(at + 148, 7, std::string(octal, 7));
}

int64_t a_size(Random& random) {
  return random.one_in(12) ? int64_t(random.number()) : int64_t(random.below(3));
}

test::pickled::Tensor a_tensor(Random& random) {
  static const std::string kStorages[] = {"FloatStorage", "HalfStorage", "BFloat16Storage", "DoubleStorage",
                                          "LongStorage",  "ByteStorage", "BoolStorage",     "CharStorage"};
  test::pickled::Tensor tensor;
  if (random.one_in(3)) tensor.storage = random.choose(kStorages);
  if (random.one_in(3)) tensor.elements = a_size(random);
  if (random.one_in(3)) tensor.offset = a_size(random);
  tensor.size.clear();
  tensor.stride.clear();
  for (size_t rank = random.below(4) + (random.one_in(20) ? 70 : 0); rank > 0; --rank) {
    tensor.size.push_back(a_size(random));
    tensor.stride.push_back(a_size(random));
  }
  if (random.one_in(20)) tensor.stride.push_back(1);
  if (random.one_in(10)) tensor.key = "1";
  return tensor;
}

}  // namespace

std::string forge_safetensors(Random& random, const std::string& bytes, Words words) {
  const size_t length = number_at(bytes, 0, 8);
  if (random.one_in(5) || length > bytes.size() - 8) return damage(random, bytes, words);
  const std::string header = damage_text(random, bytes.substr(8, length), words);
  std::string data = bytes.substr(8 + length);
  if (random.one_in(8)) data.resize(random.below(2 * data.size() + 1));
  return little(random.one_in(20) ? random.number() : header.size(), 8) + header + data;
}

std::string forge_zip(Random& random, const std::string& bytes, Words words) {
  auto entries = entries_of(bytes);
  if (!entries || entries->empty() || random.one_in(5)) return damage(random, bytes, words);
  if (random.one_in(3)) {
    forge_entry(random, *entries, words);
  } else {
    damage_entry(random, *entries, words);
  }
  std::string forged = test::zip_bytes(*entries);
  return random.one_in(8) ? damage(random, std::move(forged), words) : forged;
}

std::string forge_tar(Random& random, std::string bytes, Words words) {
  if (random.one_in(4)) return damage(random, std::move(bytes), words);
  constexpr Words::size_type kBlock = 512;
  static constexpr struct {
    size_t at, width;
  } kFields[] = {{0, 100}, {124, 12}, {156, 1}, {157, 100}, {257, 8}, {345, 155}};
  const size_t blocks = bytes.size() / kBlock;
  for (size_t times = 1 + random.below(4); times > 0 && blocks > 0; --times) {
    size_t block = random.below(blocks);
    while (block > 0 && bytes.compare(block * kBlock + 257, 5, "ustar") != 0) --block;
    const auto& field = random.choose(kFields);
    std::string text = bytes.substr(block * kBlock + field.at, field.width);
    text = random.one_in(2) ? damage(random, text, words) : damage_text(random, text, words);
    if (field.width == 1) text = std::string(1, "01234567gxLKSVAD"[random.below(16)]);
    text.resize(field.width);
    bytes.replace(block * kBlock + field.at, field.width, text);
    seal_tar_header(bytes, block * kBlock);
  }
  return bytes;
}

std::string forge_png(Random& random, const std::string& bytes, Words words) {
  std::vector<Chunk> chunks = chunks_of(bytes);
  if (chunks.empty() || random.one_in(4)) return damage(random, bytes, words);
  for (size_t times = 1 + random.below(3); times > 0; --times) {
    Chunk& chunk = random.one_in(3) ? chunks[0] : random.choose(chunks);
    if (random.one_in(6)) {
      chunks.insert(chunks.begin() + std::ptrdiff_t(random.below(chunks.size())), Chunk(chunk));
    } else if (random.one_in(8)) {
      chunk.type = random.choose(words);
    } else {
      chunk.data = damage(random, chunk.data, {});
    }
  }
  std::string forged = bytes.substr(0, 8);
  for (const Chunk& chunk : chunks) {
    const std::string body = chunk.type + chunk.data;
    forged += big(chunk.data.size(), 4) + body + big(test::crc32(body), 4);
  }
  return forged;
}

std::string forge_checkpoint(Random& random) {
  using namespace test::pickled;
  static const std::string kKeys[] = {"state_dict", "model", "model_ema", "x"};
  std::string body = "}(";
  for (size_t tensors = 1 + random.below(4); tensors > 0; --tensors)
    body += text("w" + std::to_string(random.below(5))) + tensor(a_tensor(random));
  body += "u";
  if (random.one_in(2)) body = dict(random.choose(kKeys), body);
  std::string pickle = proto(body);
  if (random.one_in(4)) pickle = damage(random, std::move(pickle), {});
  return archive(pickle, std::string(random.one_in(2) ? 16 : random.below(64), '\1'));
}

std::string tar_bytes(const std::vector<ZipEntry>& files) {
  std::string bytes;
  for (const ZipEntry& file : files) {
    const size_t at = bytes.size();
    bytes += tar_header(file.name, file.bytes.size());
    seal_tar_header(bytes, at);
    bytes += file.bytes;
    bytes.resize((bytes.size() + 511) / 512 * 512);
  }
  return bytes.append(1024, '\0');
}

}  // namespace pyra::fuzz
