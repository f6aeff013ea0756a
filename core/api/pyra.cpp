#include "api/pyra.h"

#include <algorithm>

#include "api/engine.h"
#include "base/error.h"
#include "base/no_memory.h"

struct pyra_engine {
  pyra::Engine engine;
};

namespace {

thread_local std::string last_error;

/// Runs `body`; no exception passes into C.
template <class Body>
int guarded(Body&& body) {
  try {
    body();
    return 0;
  } catch (const pyra::Error& error) {
    last_error = error.what();
    return int(error.code());
  } catch (const std::bad_alloc&) {
    last_error = "there is not enough memory";
    return int(pyra::ExitCode::device);
  } catch (const c10::Error& error) {
    last_error = error.what_without_backtrace();
    if (pyra::means_no_memory(error)) return int(pyra::ExitCode::device);
  } catch (const std::exception& error) {
    last_error = error.what();
  } catch (...) {
    last_error = "an exception of an unknown kind";
  }
  return int(pyra::ExitCode::internal);
}

}  // namespace

int pyra_engine_load(const char* file, const char* device, const char* dtype, pyra_engine** engine) {
  return guarded([&] {
    *engine = new pyra_engine{
        pyra::Engine::load(file, {.device = device, .dtype = dtype, .plugin_path = {}, .exact_gelu = false})};
  });
}

void pyra_engine_free(pyra_engine* engine) {
  delete engine;
}

int64_t pyra_engine_image_size(const pyra_engine* engine) {
  return engine->engine.image_size();
}

int64_t pyra_engine_num_classes(const pyra_engine* engine) {
  return engine->engine.num_classes();
}

const char* pyra_engine_class_name(const pyra_engine* engine, int64_t label) {
  const auto& names = engine->engine.class_names();
  return label >= 0 && label < int64_t(names.size()) ? names[size_t(label)].c_str() : nullptr;
}

int pyra_engine_prepare(const pyra_engine* engine, const uint8_t* encoded, size_t size, uint8_t* image) {
  return guarded([&] { std::ranges::copy(engine->engine.prepare({encoded, size}), image); });
}

int pyra_engine_run(const pyra_engine* engine, const uint8_t* images, int64_t batch, float* logits) {
  return guarded([&] {
    const int64_t side = engine->engine.image_size();
    const int64_t most = INT64_MAX / (side * side * 3);
    if (batch < 1 || batch > most)
      pyra::fail(pyra::ExitCode::usage, "pyra_engine_run: batch is ", batch, ", expected 1 to ", most);
    std::ranges::copy(engine->engine.run({images, size_t(batch * side * side * 3)}), logits);
  });
}

const char* pyra_last_error(void) {
  return last_error.c_str();
}
