#pragma once

#include <cstdint>

namespace moraine::kernels {

/// Threads a task may be numbered with; fixes the scratch size.
int max_task_threads();

/// Calls body(context, task, thread) once for every task in [0, count), over all cores; small work (below about two
/// MFLOP) stays on the calling thread, since waking a team costs more. Which thread runs a task must not change its
/// result.
void run_tasks(int64_t count, double flops, void (*body)(const void* context, int64_t task, int thread),
               const void* context);

/// run_tasks for a lambda (task, thread).
template <class Body>
inline void for_each_task(int64_t count, double flops, const Body& body) {
  run_tasks(
      count, flops,
      [](const void* context, int64_t task, int thread) { (*static_cast<const Body*>(context))(task, thread); }, &body);
}

}  // namespace moraine::kernels
