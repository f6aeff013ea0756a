/* The C side of api/engine.h, for programs in C and for other languages' foreign-function interfaces.
 *
 * Functions that can fail return 0, or the exit code that pyractl would end with (README); pyra_last_error() then holds
 * the sentence, of the calling thread. Pointers must not be null. An engine may be used from several threads; its calls
 * take turns. */
#ifndef PYRA_API_PYRA_H
#define PYRA_API_PYRA_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct pyra_engine pyra_engine;

/* device: "auto", "cpu", "cuda:0"; dtype: "auto", "fp32", "tf32", "bf16", "fp16". *engine is set on success alone. */
int pyra_engine_load(const char* file, const char* device, const char* dtype, pyra_engine** engine);
void pyra_engine_free(pyra_engine* engine); /* null is fine */

int64_t pyra_engine_image_size(const pyra_engine* engine);  /* S */
int64_t pyra_engine_num_classes(const pyra_engine* engine); /* logits an image */
/* Null where the model has no names, or no such label; lives as long as the engine. */
const char* pyra_engine_class_name(const pyra_engine* engine, int64_t label);

/* A JPEG, PNG, BMP or PNM of `size` bytes -> S*S*3 bytes at `image`. */
int pyra_engine_prepare(const pyra_engine* engine, const uint8_t* encoded, size_t size, uint8_t* image);
/* batch*S*S*3 bytes -> batch*num_classes floats at `logits`. */
int pyra_engine_run(const pyra_engine* engine, const uint8_t* images, int64_t batch, float* logits);

/* Of this thread's last call that failed; "" before the first. */
const char* pyra_last_error(void);

#ifdef __cplusplus
}
#endif

#endif
