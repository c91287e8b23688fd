// Raw float32 tensors on standard input and output, a shape written as 1x3x224x224, and a clock: what both programs need.
#pragma once

#include <torch/torch.h>

#include <chrono>
#include <cstdio>
#include <functional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

struct Options {
  std::string path;
  std::vector<int64_t> shape;
  int repeat = 0;
};

inline Options parse(int count, char** values) {
  if (count != 3 && count != 4) {
    throw std::invalid_argument("usage: PROGRAM FILE SHAPE [REPEAT] < input.f32 > output.f32, SHAPE like 1x3x224x224");
  }
  Options options;
  options.path = values[1];
  std::stringstream sides(values[2]);
  for (std::string side; std::getline(sides, side, 'x');) {
    options.shape.push_back(std::stoll(side));
  }
  if (count == 4) {
    options.repeat = std::stoi(values[3]);
  }
  return options;
}

inline torch::Tensor read_input(const std::vector<int64_t>& shape) {
  torch::Tensor input = torch::empty(shape, torch::kFloat32);
  const size_t wanted = input.numel();
  const size_t found = std::fread(input.data_ptr<float>(), sizeof(float), wanted, stdin);
  if (found != wanted) {
    throw std::runtime_error(
        "standard input holds " + std::to_string(found) + " numbers, the shape asks for " + std::to_string(wanted));
  }
  return input;
}

inline void write_output(const torch::Tensor& output) {
  const torch::Tensor plain = output.to(torch::kCPU, torch::kFloat32).contiguous();
  const size_t count = plain.numel();
  if (std::fwrite(plain.data_ptr<float>(), sizeof(float), count, stdout) != count || std::fflush(stdout) != 0) {
    throw std::runtime_error("the output cannot be written");
  }
}

// Runs once for the result, and `repeat` times more for the clock.
inline torch::Tensor run_and_time(const std::function<torch::Tensor()>& run, int repeat) {
  torch::Tensor output = run();
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < repeat; ++i) {
    run();
  }
  if (repeat > 0) {
    const std::chrono::duration<double, std::milli> spent = std::chrono::steady_clock::now() - start;
    std::fprintf(stderr, "%.3f ms a run\n", spent.count() / repeat);
  }
  return output;
}
