// embed_cpp MODEL IMAGE: prints the label and its logit, of the image alone and beside its mirror in one batch.
#include <algorithm>
#include <cstdio>
#include <fstream>
#include <iterator>

#include "api/engine.h"
#include "base/error.h"

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  try {
    const pyra::Engine engine = pyra::Engine::load(argv[1], {.device = "cpu", .dtype = "fp32", .plugin_path = {}});
    std::ifstream in(argv[2], std::ios::binary);
    const std::vector<char> text{std::istreambuf_iterator<char>(in), {}};
    const std::vector<uint8_t> image = engine.prepare({reinterpret_cast<const uint8_t*>(text.data()), text.size()});
    const std::vector<float> logits = engine.run(image);
    std::vector<uint8_t> batch(image.rbegin(), image.rend());
    batch.insert(batch.end(), image.begin(), image.end());
    const std::vector<float> both = engine.run(batch);
    if (!std::equal(logits.begin(), logits.end(), both.begin() + engine.num_classes())) return 1;
    const auto best = std::max_element(logits.begin(), logits.end());
    std::printf("%d %.5f\n", int(best - logits.begin()), double(*best));
    return 0;
  } catch (const pyra::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return int(error.code());
  }
}
