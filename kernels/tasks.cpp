#include "kernels/tasks.h"

#include <omp.h>

namespace moraine::kernels {
namespace {
constexpr double kParallelFlops = 2e6;  // below, an OpenMP fork costs more than it saves
}

int max_task_threads() { return omp_get_max_threads(); }

void run_tasks(int64_t count, double flops, void (*body)(const void*, int64_t, int), const void* context) {
  if (count <= 1 || flops < kParallelFlops || omp_get_max_threads() == 1) {
    for (int64_t task = 0; task < count; ++task) body(context, task, 0);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t task = 0; task < count; ++task) body(context, task, omp_get_thread_num());
}

}  // namespace moraine::kernels
