/* embed_c MODEL IMAGE: prints the label and its logit. */
#include <stdio.h>
#include <stdlib.h>

#include "api/pyra.h"

static int fail(int code) {
  fprintf(stderr, "%s\n", pyra_last_error());
  return code;
}

int main(int argc, char** argv) {
  pyra_engine* engine = NULL;
  static uint8_t encoded[1 << 20];
  FILE* file;
  size_t size;
  int64_t side, classes, label = 0, i;
  uint8_t* image;
  float* logits;
  int code;
  if (argc != 3) return 2;
  if ((code = pyra_engine_load(argv[1], "cpu", "fp32", &engine)) != 0) return fail(code);
  if ((file = fopen(argv[2], "rb")) == NULL) return 3;
  size = fread(encoded, 1, sizeof encoded, file);
  fclose(file);
  side = pyra_engine_image_size(engine);
  classes = pyra_engine_num_classes(engine);
  image = malloc((size_t)(side * side * 3));
  logits = malloc(sizeof(float) * (size_t)classes);
  if (image == NULL || logits == NULL) return 1;
  if ((code = pyra_engine_prepare(engine, encoded, size, image)) != 0) return fail(code);
  if ((code = pyra_engine_run(engine, image, 1, logits)) != 0) return fail(code);
  for (i = 1; i < classes; ++i)
    if (logits[i] > logits[label]) label = i;
  printf("%d %.5f\n", (int)label, (double)logits[label]);
  pyra_engine_free(engine);
  free(image);
  free(logits);
  return 0;
}
