// Zip archives made byte by byte, nothing compressed, with every lie that a test wants to tell.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace pyra::test {

struct ZipEntry {
  std::string name, bytes;
  uint32_t stated_size = 0;     ///< 0: the truth
  uint32_t directory_size = 0;  ///< what the directory alone states; 0: the same
  bool bad_checksum = false;
  uint16_t flags = 0;  ///< bit 0: encrypted
};

inline std::string little(uint64_t value, int bytes) {
  std::string text;
  for (int i = 0; i < bytes; ++i) text += char(i < 8 ? value >> (8 * i) : 0);
  return text;
}

inline uint32_t crc32(std::string_view bytes) {
  uint32_t crc = ~0u;
  for (const char byte : bytes) {
    crc ^= static_cast<unsigned char>(byte);
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (0xedb88320u & (~(crc & 1) + 1));
  }
  return ~crc;
}

inline std::string zip_bytes(const std::vector<ZipEntry>& entries) {
  std::string file, directory;
  for (const ZipEntry& entry : entries) {
    const uint32_t size = entry.stated_size ? entry.stated_size : uint32_t(entry.bytes.size());
    // Version, flags, stored, time, date, checksum, packed size, size, length of the name, of what else.
    const auto facts = [&](uint32_t stated) {
      return little(20, 2) + little(entry.flags, 2) + little(0, 6) +
             little(crc32(entry.bytes) ^ (entry.bad_checksum ? 1u : 0u), 4) + little(entry.bytes.size(), 4) +
             little(stated, 4) + little(entry.name.size(), 2) + little(0, 2);
    };
    directory += "PK\x01\x02" + little(20, 2) + facts(entry.directory_size ? entry.directory_size : size) +
                 little(0, 10) + little(file.size(), 4) + entry.name;
    file += "PK\x03\x04" + facts(size) + entry.name + entry.bytes;
  }
  const size_t start = file.size();
  return file + directory + "PK\x05\x06" + little(0, 4) + little(entries.size(), 2) + little(entries.size(), 2) +
         little(directory.size(), 4) + little(start, 4) + little(0, 2);
}

}  // namespace pyra::test
