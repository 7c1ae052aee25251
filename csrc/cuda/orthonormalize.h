// orthonormalize: Householder's thin QR of every layer in one launch, a cluster of blocks per layer, which holds the layer's
// rows in its shared memory from the first step to the last; rows that do not fit stay in Q's own memory.
//
// The steps of csrc/cpu/orthonormalize.h, in one panel: a pass over the rows applies a reflector and sums the products
// for the next, so that a column costs one reduction; then Q = [I; 0] - V T V_top^T at once. LAPACK's signs, any P.
#pragma once

#include "device.h"

namespace deft {

constexpr int LAYERS = 1024;  // of a launch, described by its arguments: no table to upload, none to go stale

struct QrLayers {
  const float* P[LAYERS];
  float* Q[LAYERS];
  int m[LAYERS], r[LAYERS];
};

template <int R, int THREADS>
struct QrShared {
  static constexpr int LANES = R < 32 ? R : 32;       // threads of a row
  static constexpr int GROUPS = THREADS / LANES;      // rows at a time
  float partial[GROUPS][2 * R], mine[2][2 * R], sums[2 * R];
  float T[R][R], top[R][R], X[R][R];                  // V's first R rows, and what V is multiplied by
  float through[R], head[R], scale[R];
};

template <int R, int THREADS>
struct Qr {
  using Shared = QrShared<R, THREADS>;
  static constexpr int LANES = Shared::LANES, GROUPS = Shared::GROUPS, COLUMNS = R / LANES;
  Shared& s;
  int blocks, parity = 0;

  // Sums of one vector (2R) a group over the groups and blocks, in their order, into s.sums. `largest`: the maximum instead.
  __device__ void reduce(const float (&a)[COLUMNS], const float (&b)[COLUMNS], bool largest = false) {
    const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
    for (int c = 0; c < COLUMNS; ++c) {
      s.partial[group][lane + c * LANES] = a[c];
      s.partial[group][R + lane + c * LANES] = b[c];
    }
    __syncthreads();
    for (int e = threadIdx.x; e < 2 * R; e += THREADS) {
      float total = 0;
      for (int g = 0; g < GROUPS; ++g) total = largest ? fmaxf(total, s.partial[g][e]) : total + s.partial[g][e];
      s.mine[parity][e] = total;
    }
    sync_cluster(blocks);
    for (int e = threadIdx.x; e < 2 * R; e += THREADS) {
      float total = 0;
      for (int b = 0; b < blocks; ++b) {
        const float other = of_block(&s.mine[parity][0], b, blocks)[e];
        total = largest ? fmaxf(total, other) : total + other;
      }
      s.sums[e] = total;
    }
    __syncthreads();
    parity ^= 1;  // whoever is late still reads the other
  }
};

// The power of two of x's magnitude; 1 where x is 0 or not finite.
__device__ inline float power_of_two(float x) {
  union { float f; uint32_t u; } bits;
  bits.f = x;
  bits.u &= 0x7f800000;
  if (bits.u == 0 || bits.u == 0x7f800000) return 1;
  if (bits.u > 0x7e000000) bits.u = 0x7e000000;
  return bits.f;
}

// `rows_shared`: rows of a block that its shared memory holds; 0: none, they stay in Q.
template <int R, int THREADS>
__device__ void orthonormalize_layer(const QrLayers& layers, int layer, int block, int blocks, int rows_shared) {
  using Engine = Qr<R, THREADS>;
  constexpr int LANES = Engine::LANES, GROUPS = Engine::GROUPS, COLUMNS = Engine::COLUMNS;
  auto& s = *reinterpret_cast<typename Engine::Shared*>(shared());
  Engine engine{s, blocks};

  const float* P = layers.P[layer];
  float* Q = layers.Q[layer];
  const int m = layers.m[layer], r = layers.r[layer], chunk = (m + blocks - 1) / blocks;
  const int first = block * chunk, end = min(m, first + chunk);
  const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
  const bool here = rows_shared >= chunk;
  float* rows = here ? reinterpret_cast<float*>(shared() + sizeof(typename Engine::Shared)) : Q + int64_t(first) * r;
  const int ld = here ? R : r, width = here ? R : r;
  auto row = [&](int i) { return rows + int64_t(i - first) * ld; };
  float a[COLUMNS], b[COLUMNS];

  // columns scaled to about 1: Q stays as it is, and squares stay in range
  for (int c = 0; c < COLUMNS; ++c) a[c] = b[c] = 0;
  for (int i = first + group; i < end; i += GROUPS)
    for (int c = 0; c < COLUMNS; ++c) {
      const int l = lane + c * LANES;
      if (l < r) a[c] = fmaxf(a[c], fabsf(P[int64_t(i) * r + l]));
    }
  engine.reduce(a, b, true);
  for (int e = threadIdx.x; e < R; e += THREADS) s.scale[e] = 1 / power_of_two(s.sums[e]);
  for (int e = threadIdx.x; e < R * R; e += THREADS) s.T[e / R][e % R] = s.top[e / R][e % R] = 0;
  __syncthreads();

  // the products of column 0 with all, below the diagonal, and the diagonal's row
  for (int c = 0; c < COLUMNS; ++c) a[c] = b[c] = 0;
  for (int i = first + group; i < end; i += GROUPS) {
    const float next = P[int64_t(i) * r] * s.scale[0];
    for (int c = 0; c < COLUMNS; ++c) {
      const int l = lane + c * LANES;
      const float x = l < r ? P[int64_t(i) * r + l] * s.scale[l] : 0;
      if (l < width) row(i)[l] = x;
      if (i > 0) a[c] += next * x;
      else b[c] = x;
    }
  }
  engine.reduce(a, b);

  for (int j = 0; j < r; ++j) {
    const float *below = s.sums, *diagonal = s.sums + R;
    const float alpha = diagonal[j], norm2 = below[j];
    const bool identity = norm2 == 0 || alpha * alpha + norm2 < 1e-30f;  // as on the CPU
    const float beta = -copysignf(sqrtf(alpha * alpha + norm2), alpha);
    const float head = identity ? 1 : alpha - beta, tau = identity ? 0 : -1 / (beta * head);
    for (int l = threadIdx.x; l < R; l += THREADS) {
      s.through[l] = l > j && l < r ? tau * (head * diagonal[l] + below[l]) : 0;
      float sum = 0;
      for (int k = l; k < j; ++k) sum += s.T[l][k] * (head * diagonal[k] + below[k]);
      s.T[l][j] = l < j ? -tau * sum : l == j ? tau : 0;
      if (l == j) s.head[j] = head;
    }
    __syncthreads();
    if (j + 1 == r) break;

    for (int c = 0; c < COLUMNS; ++c) a[c] = b[c] = 0;
    for (int base = max(first, j + 1) / GROUPS * GROUPS; base < end; base += GROUPS) {
      const int i = base + group;  // as many turns for every thread of a warp
      const bool inside = i > j && i >= first && i < end;
      float x[COLUMNS], v = 0, next = 0;
      if (inside) {
        v = row(i)[j];
        next = row(i)[j + 1] - v * s.through[j + 1];
        for (int c = 0; c < COLUMNS; ++c) {
          const int l = lane + c * LANES;
          x[c] = l < width ? row(i)[l] - v * s.through[l] : 0;
        }
      }
      __syncwarp();  // all of a row is read before any of it is written
      if (inside)
        for (int c = 0; c < COLUMNS; ++c) {
          const int l = lane + c * LANES;
          if (l < width) row(i)[l] = x[c];
          if (i > j + 1) a[c] += next * x[c];
          else b[c] = x[c];
        }
    }
    engine.reduce(a, b);
  }

  // V's first rows to every block, by way of Q
  for (int i = first + group; i < min(end, r); i += GROUPS)
    for (int c = 0; c < COLUMNS; ++c) {
      const int l = lane + c * LANES;
      if (l < r) Q[int64_t(i) * r + l] = l < i ? row(i)[l] : l == i ? s.head[i] : 0;
    }
  __threadfence();
  sync_cluster(blocks);
  for (int e = threadIdx.x; e < r * r; e += THREADS) s.top[e / r][e % r] = Q[e];
  __threadfence();
  sync_cluster(blocks);
  for (int e = threadIdx.x; e < R * R; e += THREADS) {
    const int l = e / R, c = e % R;
    float sum = 0;
    for (int k = l; k < r; ++k) sum -= s.T[l][k] * s.top[c][k];
    s.X[l][c] = sum;
  }
  __syncthreads();

  for (int base = first; base < end; base += GROUPS) {
    const int i = base + group;
    float q[COLUMNS] = {};
    if (i < end) {
      const float* v = i < r ? s.top[i] : row(i);
      for (int k = 0; k < r; ++k)
        for (int c = 0; c < COLUMNS; ++c) q[c] += v[k] * s.X[k][lane + c * LANES];
    }
    __syncwarp();
    if (i < end)
      for (int c = 0; c < COLUMNS; ++c) {
        const int l = lane + c * LANES;
        if (l < r) Q[int64_t(i) * r + l] = q[c] + (i == l);
      }
  }
}

}  // namespace deft
