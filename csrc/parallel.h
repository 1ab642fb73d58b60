// parallel_for: the one place with threads. No parallel region at one thread, so that forked children never
// hang.
#pragma once

#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace conelens {
namespace {  // internal linkage: each ISA's objects keep their own copy

// body(begin, end) over [0, n), at most `threads` ranges of at least `grain`. Ranges depend on n, grain,
// threads only.
template <class Body>
void parallel_for(int64_t n, int64_t grain, int threads, const Body& body) {
  if (n <= 0) return;
  int64_t ranges = n / (grain < 1 ? 1 : grain);
  ranges = ranges > threads ? threads : ranges;
#if defined(_OPENMP)
  if (ranges > 1) {
#pragma omp parallel num_threads(static_cast<int>(ranges))
    {
      const int64_t count = omp_get_num_threads(), id = omp_get_thread_num();
      body(n * id / count, n * (id + 1) / count);
    }
    return;
  }
#endif
  body(int64_t{0}, n);
}

}  // namespace
}  // namespace conelens
