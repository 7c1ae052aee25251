// A GPU played by the CPU, for csrc/cuda: a thread for each thread, barriers for barriers, so that the kernels' own code runs,
// and ThreadSanitizer sees a barrier that is missing. What a copy or a matrix product does late on a GPU happens late here.
#pragma once

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <limits>
#include <memory>
#include <thread>
#include <vector>

#define __device__
#define __global__

namespace deft {

using std::max;
using std::min;

struct float4 { float x, y, z, w; };

struct bfloat16 { uint16_t bits; };
inline bfloat16 __float2bfloat16(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return {uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
inline float __bfloat162float(bfloat16 h) {
  uint32_t u = uint32_t(h.bits) << 16;
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

struct Block {
  std::vector<char> memory;
  std::barrier<> all;
  std::deque<std::barrier<>> warps;
  Block(int threads, size_t bytes) : memory(bytes, char(0xff)), all(threads) {
    for (int w = 0; w < threads / 32; ++w) warps.emplace_back(32);
  }
};
struct Cluster {
  std::deque<Block> blocks;
  std::barrier<> all;
  Cluster(int count, int threads, size_t bytes) : all(count * threads) {
    for (int b = 0; b < count; ++b) blocks.emplace_back(threads, bytes);
  }
};

inline thread_local struct { int x; } threadIdx;
inline thread_local Cluster* cluster;
inline thread_local Block* own;

inline char* shared() { return own->memory.data(); }
inline void __syncthreads() { own->all.arrive_and_wait(); }
inline void __syncwarp() { own->warps[threadIdx.x / 32].arrive_and_wait(); }
inline void __threadfence() {}
inline void sync_cluster(int blocks) { blocks > 1 ? cluster->all.arrive_and_wait() : __syncthreads(); }
template <class T>
const T* of_block(const T* mine, int block, int) {
  return reinterpret_cast<const T*>(cluster->blocks[block].memory.data() + (reinterpret_cast<const char*>(mine) - shared()));
}

struct Copy { void* to; const void* from; };
inline thread_local std::deque<std::vector<Copy>> groups;
inline thread_local std::vector<Copy> group;
inline void copy_async(void* to, const void* from) { group.push_back({to, from}); }
inline void commit_copies() { groups.push_back(std::move(group)), group.clear(); }
template <int pending>
void wait_copies() {
  for (; groups.size() > pending; groups.pop_front())
    for (const Copy& c : groups.front()) std::memcpy(c.to, c.from, 16);
}

namespace wmma {
struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major };

template <class Use, int, int, int, class T, class Layout = row_major>
struct fragment { float v[16][16]; };  // all of it, in every thread of the warp

template <class F> void fill_fragment(F& f, float x) { std::fill_n(&f.v[0][0], 256, x); }
template <class Use, class T, class Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout>& f, const T* p, int ld) {
  constexpr bool by_row = std::is_same_v<Layout, row_major>;
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) f.v[i][j] = __bfloat162float(by_row ? p[i * ld + j] : p[j * ld + i]);
}
template <class A, class B, class C>
void mma_sync(C& d, const A& a, const B& b, const C& c) {
  C sum = c;
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < 16; ++j) sum.v[i][j] += a.v[i][k] * b.v[k][j];
  d = sum;
}
template <class F>
void store_matrix_sync(float* p, const F& f, int ld, layout_t) {
  for (int e = threadIdx.x % 32; e < 256; e += 32) p[e / 16 * ld + e % 16] = f.v[e / 16][e % 16];
}
}  // namespace wmma

// A cluster of `blocks` blocks of `threads` threads: f(block) in each.
template <class F>
void run_cluster(int blocks, int threads, size_t shared_bytes, const F& f) {
  Cluster all(blocks, threads, shared_bytes);
  std::vector<std::thread> running;
  for (int b = 0; b < blocks; ++b)
    for (int t = 0; t < threads; ++t)
      running.emplace_back([&, b, t] {
        threadIdx.x = t, cluster = &all, own = &all.blocks[b];
        f(b);
      });
  for (auto& thread : running) thread.join();
}

}  // namespace deft
