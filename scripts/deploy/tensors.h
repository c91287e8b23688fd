// Raw float32 tensors on standard input and output, a shape written as 1x3x224x224, and a clock: what both programs need.
#pragma once

#include <torch/torch.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <functional>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

struct Options {
  std::string path;
  std::vector<int64_t> shape;
  int repeat = 0;
  int threads = 1;
};

inline Options parse(int count, char** values) {
  const char* const usage =
      "usage: PROGRAM FILE SHAPE [REPEAT] [--threads N] < input.f32 > output.f32, SHAPE like 1x3x224x224";
  Options options;
  std::vector<std::string> given(values + 1, values + count);
  if (given.size() >= 2 && given[given.size() - 2] == "--threads") {
    options.threads = std::stoi(given.back());
    given.resize(given.size() - 2);
  }
  if ((given.size() != 2 && given.size() != 3) || options.threads < 1) {
    throw std::invalid_argument(usage);
  }
  options.path = given[0];
  std::stringstream sides(given[1]);
  for (std::string side; std::getline(sides, side, 'x');) {
    options.shape.push_back(std::stoll(side));
  }
  if (given.size() == 3) {
    options.repeat = std::stoi(given[2]);
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

// Runs once for the result, and `repeat` times more in each thread for the clock; all outputs must be the same.
inline torch::Tensor run_and_time(const std::function<torch::Tensor()>& run, const Options& options) {
  for (int i = 0; i < 3 && options.threads > 1; ++i) {
    run();  // TorchScript rewrites itself in its first runs, which can change the last bits
  }
  const torch::Tensor output = run();
  std::atomic<int> different{0};
  std::string failure;
  std::mutex failing;
  const auto repeated = [&] {
    try {
      torch::InferenceMode no_gradients;  // of this thread
      for (int i = 0; i < options.repeat; ++i) {
        const torch::Tensor again = run();
        if (options.threads > 1 && !torch::equal(again, output)) {  // alone, the clock is for the runs only
          ++different;
        }
      }
    } catch (const std::exception& error) {
      const std::lock_guard<std::mutex> one_at_a_time(failing);
      failure = error.what();
    }
  };
  const auto start = std::chrono::steady_clock::now();
  std::vector<std::thread> threads;
  for (int i = 0; i < options.threads; ++i) {
    threads.emplace_back(repeated);
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  const std::chrono::duration<double, std::milli> spent = std::chrono::steady_clock::now() - start;
  if (!failure.empty()) {
    throw std::runtime_error(failure);
  }
  if (different > 0) {
    throw std::runtime_error(std::to_string(different) + " outputs differ between the threads");
  }
  if (options.repeat > 0) {
    std::fprintf(stderr, "%.3f ms a run\n", spent.count() / options.repeat / options.threads);
  }
  return output;
}
