// Times the CPU kernels of several builds against each other, interleaved in one process. compare_kernels.py builds them,
// each as a library with one function, and starts this program.
//
//   compare_kernels ISA THREADS SECONDS N C FORMAT GRADIENT LIBRARY...     prints "MEDIAN RATIO" per library: nanoseconds
//   per logit and thread, and the median over the rounds of the ratio to the first library
#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "cpu/kernels.h"

namespace {

using drsl::Kernels;
using drsl::Task;

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

double median(std::vector<double> x) {
  std::sort(x.begin(), x.end());
  return x[x.size() / 2];
}

void* aligned(int64_t bytes) { return std::aligned_alloc(64, (bytes + 127) / 64 * 64); }

// The rows in equal parts, one per thread, `calls` times.
void run(const Kernels& kernels, const Task& task, int threads, int calls, const std::vector<void*>& scratch) {
  const auto part = [&](int i) {
    for (int call = 0; call < calls; ++call) {
      kernels.run(task, task.rows * i / threads, task.rows * (i + 1) / threads, scratch[i]);
    }
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(part, i);
  part(0);
  for (std::thread& t : others) t.join();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 9) return 2;
  const char* const isa = argv[1];
  const int threads = std::atoi(argv[2]);
  const double seconds = std::atof(argv[3]);
  const int64_t rows = std::atoll(argv[4]), classes = std::atoll(argv[5]);
  const bool narrow = !std::strcmp(argv[6], "bfloat16"), grad = !std::strcmp(argv[7], "gradient");
  std::vector<const Kernels*> builds;
  for (int i = 8; i < argc; ++i) {
    void* const library = dlopen(argv[i], RTLD_NOW | RTLD_LOCAL);
    void* const found = library ? dlsym(library, "drsl_kernels_for") : nullptr;
    builds.push_back(found ? reinterpret_cast<const Kernels* (*)(const char*)>(found)(isa) : nullptr);
    if (!builds.back()) return std::fprintf(stderr, "%s: no kernels for %s\n", argv[i], isa), 1;
  }

  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  auto* const logits = static_cast<float*>(aligned(rows * classes * 4));
  for (int64_t i = 0; i < rows * classes; ++i) {
    logits[i] = normal(random);
    if (narrow) std::memcpy(reinterpret_cast<char*>(logits) + 2 * i, reinterpret_cast<char*>(logits + i) + 2, 2);
  }
  std::vector<int64_t> labels(rows);
  for (int64_t& y : labels) y = static_cast<int64_t>(random() % static_cast<uint64_t>(classes));
  Task task{};
  task.dtype = narrow ? drsl::DType::bfloat16 : drsl::DType::float32;
  task.distance = drsl::Distance::uniform;
  task.scale = task.grad_scale = 1;
  task.q = 0.7;
  task.tau = 0.5;
  task.rows = rows;
  task.classes = classes;
  task.ignore_index = -100;
  task.layout = {1, &rows, &classes, &classes, 1, 1};
  task.logits = logits;
  task.labels = labels.data();
  task.grad = grad ? aligned(rows * classes * 4) : nullptr;
  if (grad) std::memset(task.grad, 0, rows * classes * 4);

  int64_t bytes = 0;
  for (const Kernels* build : builds) bytes = std::max(bytes, build->scratch_bytes(task));
  std::vector<void*> scratch;
  for (int i = 0; i < threads; ++i) scratch.push_back(aligned(bytes));

  const int calls = static_cast<int>(std::max<int64_t>(1, 1000000 / (rows * classes)));  // a thread takes time to start
  std::vector<std::vector<double>> samples(builds.size());
  std::vector<size_t> order(builds.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  const double end = now() + seconds;
  for (int round = 0; round < 15 || now() < end; ++round) {
    std::shuffle(order.begin(), order.end(), random);
    for (const size_t i : order) {
      const double begin = now();
      run(*builds[i], task, threads, calls, scratch);
      samples[i].push_back((now() - begin) / calls * 1e9 / static_cast<double>(rows * classes) * threads);
    }
  }
  for (const std::vector<double>& of : samples) {
    std::vector<double> ratios;
    for (size_t i = 0; i < of.size(); ++i) ratios.push_back(of[i] / samples[0][i]);
    std::printf("%.4f %.4f\n", median(of), median(ratios));
  }
}
