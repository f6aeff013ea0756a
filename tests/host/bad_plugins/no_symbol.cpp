// A shared object like any other, and no plugin.
extern "C" __attribute__((visibility("default"))) int answer() {
  return 42;
}
