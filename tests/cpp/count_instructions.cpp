// Counts the instructions that the CPU kernels take, by single steps of a child process: no processor counter is needed,
// every instruction set works, and the count is the same on every run.
//
//   count_instructions ISA ROWS CLASSES [CLASSES ...]     prints a line "CLASSES COUNT" for loss and gradient, float32
#include <signal.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "check.h"
#include "cpu/kernels.h"

namespace drsl {
namespace {

// Run the kernels on each number of classes, between two signals to the parent.
void run_between_signals(const Kernels& kernels, int64_t rows, const std::vector<int64_t>& all_classes) {
  check::Random random(1);
  ptrace(PTRACE_TRACEME, 0, nullptr, nullptr);
  for (const int64_t classes : all_classes) {
    std::vector<float> logits(rows * classes), grad(rows * classes);
    std::vector<int64_t> labels(rows);
    for (float& z : logits) z = static_cast<float>(random.uniform(-2, 2));
    for (int64_t& y : labels) y = random.below(classes);
    Task task{};
    task.distance = Distance::uniform;
    task.scale = task.grad_scale = 1;
    task.q = 0.7;
    task.tau = 0.5;
    task.rows = rows;
    task.classes = classes;
    task.ignore_index = -100;
    task.layout = {1, &rows, &classes, &classes, 1, 1};
    task.logits = logits.data();
    task.labels = labels.data();
    task.grad = grad.data();
    void* const scratch = std::aligned_alloc(64, (kernels.scratch_bytes(task) + 63) / 64 * 64);
    kernels.run(task, 0, rows, scratch);  // what is looked up once is looked up here
    raise(SIGSTOP);
    kernels.run(task, 0, rows, scratch);
    raise(SIGSTOP);
    std::free(scratch);
  }
}

// Let the child go on until its next SIGSTOP; true unless it ended.
bool next_stop(pid_t child, bool step_by_step, int64_t* steps) {
  for (int status = 0;;) {
    if (ptrace(step_by_step ? PTRACE_SINGLESTEP : PTRACE_CONT, child, nullptr, nullptr) != 0) return false;
    if (waitpid(child, &status, 0) != child || !WIFSTOPPED(status)) return false;
    if (WSTOPSIG(status) == SIGSTOP) return true;
    ++*steps;
  }
}

int count(const Kernels& kernels, int64_t rows, const std::vector<int64_t>& all_classes) {
  const pid_t child = fork();
  if (child == 0) {
    run_between_signals(kernels, rows, all_classes);
    _exit(0);
  }
  int status = 0;
  int64_t ignored = 0;
  bool stopped = waitpid(child, &status, 0) == child && WIFSTOPPED(status);
  for (const int64_t classes : all_classes) {
    int64_t steps = 0;
    if (!stopped || !next_stop(child, true, &steps)) return 1;
    std::printf("%lld %lld\n", static_cast<long long>(classes), static_cast<long long>(steps));
    stopped = next_stop(child, false, &ignored);
  }
  return 0;
}

}  // namespace
}  // namespace drsl

int main(int argc, char** argv) {
  const drsl::Kernels* const kernels = argc > 3 ? drsl::kernels_for(argv[1]) : nullptr;
  if (!kernels) {
    std::fprintf(stderr, "usage: count_instructions ISA ROWS CLASSES..., with an ISA that this machine has\n");
    return 77;
  }
  std::vector<int64_t> all_classes;
  for (int i = 3; i < argc; ++i) all_classes.push_back(std::atoll(argv[i]));
  return drsl::count(*kernels, std::atoll(argv[2]), all_classes);
}
