// Run an AOTInductor package (.aoti.pt2) without Python: run_package small.aoti.pt2 1x3x224x224 < input.f32 > output.f32
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include "tensors.h"

int main(int count, char** values) {
  try {
    const Options options = parse(count, values);
    torch::InferenceMode no_gradients;
    // One runner for each thread: a runner's calls wait for each other.
    torch::inductor::AOTIModelPackageLoader program(options.path, "model", false, options.threads);
    const torch::Tensor input = read_input(options.shape);
    write_output(run_and_time([&] { return program.run({input}).at(0); }, options));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
  return 0;
}
