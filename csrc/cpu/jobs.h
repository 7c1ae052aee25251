// Jobs over torch's threads. Which thread takes a job is left to chance, what a job computes is not.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include "../arguments.h"
#include "kernels.h"

namespace deft {

struct Aligned {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t(64)); }
};
using Memory = std::unique_ptr<float[], Aligned>;
inline Memory floats(int64_t count) { return Memory(new (std::align_val_t(64)) float[count]); }

// That torch's threads begin after the caller and end before it goes on is the OpenMP runtime's doing, which
// ThreadSanitizer does not see: it is told. What the jobs do to one another it judges for itself.
#if defined(__SANITIZE_THREAD__)
extern "C" void __tsan_acquire(void*);
extern "C" void __tsan_release(void*);
#else
inline void __tsan_acquire(void*) {}
inline void __tsan_release(void*) {}
#endif
inline char fork, join;  // two, so that what one thread did before it ended is not taken to come before another's beginning

// f(job, scratch) for every job; each thread has `scratch` floats of its own. Below `work` multiply-adds for a second
// thread, waking it costs more than it saves.
template <class F>
void run(int64_t jobs, int64_t scratch, double work, const F& f) {
  std::atomic<int64_t> next{0};
  int64_t threads = std::min<int64_t>({jobs, torch::stable::get_num_threads(), int64_t(work / 50000) + 1});
  auto take = [&](int64_t, int64_t) {
    __tsan_acquire(&fork);
    Memory own;
    for (int64_t job; (job = next.fetch_add(1, std::memory_order_relaxed)) < jobs;) {
      if (!own) own = floats(scratch);
      f(job, own.get());
    }
    __tsan_release(&join);
  };
  __tsan_release(&fork);
  if (threads <= 1) take(0, 1);
  else torch::stable::parallel_for(0, threads, 1, take);
  __tsan_acquire(&join);
}

// Layers cut into strips of columns, each a job.
struct Strip { size_t layer; int64_t first, width; };

inline void cut(std::vector<Strip>& strips, size_t layer, int64_t n, int64_t width) {
  for (int64_t c = 0; c < n; c += width) strips.push_back({layer, c, std::min(width, n - c)});
}

// f(T{}) with T the type of a weight.
template <class F>
void with_type(const Tensor& t, Argument arg, const F& f) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::BFloat16: return f(bfloat16{});
    case ScalarType::Half: return f(float16{});
    default: STD_TORCH_CHECK(false, arg.text(), " is not float32, bfloat16 or float16");
  }
}

template <class Layer> using weight_type = std::remove_cv_t<std::remove_pointer_t<decltype(Layer::W)>>;

}  // namespace deft
