// Run a TorchScript file (.pt) with libtorch alone: run_torchscript small.pt 1x3x224x224 < input.f32 > output.f32
#include <torch/script.h>

#include "tensors.h"

int main(int count, char** values) {
  try {
    const Options options = parse(count, values);
    torch::InferenceMode no_gradients;
    torch::jit::ExtraFilesMap extra{{"rescompress.json", ""}};
    torch::jit::Module program = torch::jit::load(options.path, torch::kCPU, extra);
    std::fprintf(stderr, "%s: header of %zu bytes\n", options.path.c_str(), extra["rescompress.json"].size());
    const torch::Tensor input = read_input(options.shape);
    write_output(run_and_time([&] { return program.forward({input}).toTensor(); }, options));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
  return 0;
}
