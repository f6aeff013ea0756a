// Wants a function that nobody has.
extern "C" int pyra_test_function_that_nobody_has();

extern "C" __attribute__((visibility("default"))) const void* pyra_plugin_entry() {
  static int value = pyra_test_function_that_nobody_has();
  return &value;
}
