// What the kernels use of CUDA, in few words, so that tests can put the CPU in a GPU's place (tests/deft_kernels/on_cpu.h).
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <mma.h>

namespace deft {

using bfloat16 = __nv_bfloat16;
namespace wmma = nvcuda::wmma;

extern __shared__ float4 shared_memory[];
__device__ inline char* shared() { return reinterpret_cast<char*>(shared_memory); }

// Where several blocks form a cluster they wait for one another and read each other's shared memory.
__device__ inline void sync_cluster(int blocks) {
#if __CUDA_ARCH__ >= 900
  if (blocks > 1) {
    cooperative_groups::this_cluster().sync();
    return;
  }
#endif
  __syncthreads();
}
template <class T>
__device__ inline const T* of_block(const T* mine, int block, int blocks) {
#if __CUDA_ARCH__ >= 900
  if (blocks > 1) return cooperative_groups::this_cluster().map_shared_rank(const_cast<T*>(mine), block);
#endif
  return mine;
}

// 16 bytes from global to shared memory, on the way while the threads go on: copies are committed in groups, and waited for
// until at most `pending` groups are left.
__device__ inline void copy_async(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(uint32_t(__cvta_generic_to_shared(to))), "l"(from));
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;"); }
template <int pending>
__device__ inline void wait_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory"); }

}  // namespace deft
#else
#include "on_cpu.h"
#endif
