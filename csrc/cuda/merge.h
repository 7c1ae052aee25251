// merge of tall bfloat16 layers: a cluster of blocks holds a strip of W in its shared memory, so that W crosses device
// memory twice, once each way, where a strip would leave the L2 cache before it is read again.
//
// Products run on the matrix units: bfloat16 takes W as it is, and float32 in three pieces that together are exact.
#pragma once

#include "device.h"

namespace deft {

constexpr int MERGE_LAYERS = 128;  // of a launch, described by its arguments

struct MergeLayers {
  const bfloat16* W[MERGE_LAYERS];
  bfloat16* out[MERGE_LAYERS];
  const float *B[MERGE_LAYERS], *K[MERGE_LAYERS], *R[MERGE_LAYERS];  // K or R may be null
  int64_t ldw[MERGE_LAYERS], ldo[MERGE_LAYERS];
  int m[MERGE_LAYERS], n[MERGE_LAYERS], r[MERGE_LAYERS], strips_before[MERGE_LAYERS];
  int count;
};

constexpr int BN = 32, STRIP_LD = BN + 8;  // columns of a strip; rows of 80 bytes, which start in different banks

template <int RANK, int THREADS>
struct MergeShared {
  static constexpr int WARPS = THREADS / 32, LD = RANK + 8;
  union {
    bfloat16 pieces[WARPS][3][16][LD];  // of 16 rows of K, or of B
    float partial[WARPS][RANK][BN];     // of K^T W
  };
  float product[WARPS][16][BN], mine[RANK][BN];
  bfloat16 A[3][RANK][STRIP_LD];
};

// x as the sum of three bfloat16
__device__ inline void split(float x, bfloat16& high, bfloat16& middle, bfloat16& low) {
  high = __float2bfloat16(x);
  x -= __bfloat162float(high);
  middle = __float2bfloat16(x);
  low = __float2bfloat16(x - __bfloat162float(middle));
}

// Block `block` of the cluster of `blocks` that makes a strip. The strip's rows lie behind MergeShared.
template <int RANK, int THREADS>
__device__ void merge_strip(const MergeLayers& layers, int strip, int block, int blocks) {
  using Shared = MergeShared<RANK, THREADS>;
  constexpr int WARPS = Shared::WARPS, LD = Shared::LD, TILES = RANK / 16, PARTS = 4;
  using Left = wmma::fragment<wmma::matrix_a, 16, 16, 16, bfloat16, wmma::row_major>;
  using LeftTransposed = wmma::fragment<wmma::matrix_a, 16, 16, 16, bfloat16, wmma::col_major>;
  using Right = wmma::fragment<wmma::matrix_b, 16, 16, 16, bfloat16, wmma::row_major>;
  using Sum = wmma::fragment<wmma::accumulator, 16, 16, 16, float>;

  int layer = 0;
  while (layer + 1 < layers.count && layers.strips_before[layer + 1] <= strip) ++layer;
  const int m = layers.m[layer], n = layers.n[layer], r = layers.r[layer];
  const int column = (strip - layers.strips_before[layer]) * BN, width = min(BN, n - column);
  const int chunk = (m + 16 * blocks - 1) / (16 * blocks) * 16, first = min(m, block * chunk), rows = min(m, first + chunk) - first;
  const int steps = (rows + 15) / 16, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  auto& s = *reinterpret_cast<Shared*>(shared());
  bfloat16* held = reinterpret_cast<bfloat16*>(shared() + sizeof(Shared));

  // 16 rows of K or B in pieces, by one warp
  auto load_pieces = [&](const float* from, int step) {
    __syncwarp();  // what the warp has read of its last 16 rows, and of their product, it has read
    for (int e = lane; e < 16 * RANK; e += 32) {
      const int i = e / RANK, j = e % RANK, row = step * 16 + i;
      const float x = row < rows && j < r ? from[int64_t(first + row) * r + j] : 0;
      split(x, s.pieces[warp][0][i][j], s.pieces[warp][1][i][j], s.pieces[warp][2][i][j]);
    }
    __syncwarp();
  };

  // W's strip on its way in PARTS, each used while the next ones come
  const int part = (steps + PARTS - 1) / PARTS;
  for (int p = 0; p < PARTS; ++p) {
    for (int e = p * part * 64 + threadIdx.x; e < min((p + 1) * part, steps) * 64; e += THREADS) {  // 4 x 16 bytes a row
      const int i = e / 4, c = e % 4 * 8;
      bfloat16* to = held + i * STRIP_LD + c;
      if (i < rows && c < width) copy_async(to, layers.W[layer] + int64_t(first + i) * layers.ldw[layer] + column + c);
      else *reinterpret_cast<float4*>(to) = float4{0, 0, 0, 0};
    }
    commit_copies();
  }

  Sum sums[TILES][BN / 16];
  for (int t = 0; t < TILES; ++t)
    for (int c = 0; c < BN / 16; ++c) wmma::fill_fragment(sums[t][c], 0.f);
  auto project = [&](int p) {
    __syncthreads();
    if (layers.K[layer])
      for (int step = p * part + warp; step < min((p + 1) * part, steps); step += WARPS) {
        load_pieces(layers.K[layer], step);
        for (int c = 0; c < BN / 16; ++c) {
          Right w;
          wmma::load_matrix_sync(w, held + step * 16 * STRIP_LD + c * 16, STRIP_LD);
          for (int t = 0; t < TILES; ++t)
            for (int q = 0; q < 3; ++q) {
              LeftTransposed k;
              wmma::load_matrix_sync(k, &s.pieces[warp][q][0][t * 16], LD);
              wmma::mma_sync(sums[t][c], k, w, sums[t][c]);
            }
        }
      }
  };
  wait_copies<3>(), project(0);
  wait_copies<2>(), project(1);
  wait_copies<1>(), project(2);
  wait_copies<0>(), project(3);

  // A = R - the sum over warps and blocks, in their order, and its pieces
  __syncthreads();
  for (int t = 0; t < TILES; ++t)
    for (int c = 0; c < BN / 16; ++c)
      wmma::store_matrix_sync(&s.partial[warp][t * 16][c * 16], sums[t][c], BN, wmma::mem_row_major);
  __syncthreads();
  for (int e = threadIdx.x; e < RANK * BN; e += THREADS) {
    float total = 0;
    for (int w = 0; w < WARPS; ++w) total += s.partial[w][e / BN][e % BN];
    s.mine[e / BN][e % BN] = total;
  }
  sync_cluster(blocks);
  for (int e = threadIdx.x; e < RANK * BN; e += THREADS) {
    const int j = e / BN, c = e % BN;
    float removed = 0;
    for (int b = 0; b < blocks; ++b) removed += of_block(&s.mine[0][0], b, blocks)[e];
    const float injected = layers.R[layer] && j < r && c < width ? layers.R[layer][int64_t(j) * n + column + c] : 0;
    split(injected - removed, s.A[0][j][c], s.A[1][j][c], s.A[2][j][c]);
  }
  sync_cluster(blocks);  // A is there, and nobody reads this block's sums any more

  float* product = &s.product[warp][0][0];
  for (int step = warp; step < steps; step += WARPS) {
    load_pieces(layers.B[layer], step);
    for (int c = 0; c < BN / 16; ++c) {
      Sum sum;
      wmma::fill_fragment(sum, 0.f);
      for (int t = 0; t < TILES; ++t)
        for (int p = 0; p < 3; ++p) {
          Left b;
          wmma::load_matrix_sync(b, &s.pieces[warp][p][0][t * 16], LD);
          for (int q = 0; p + q < 3; ++q) {  // what is left out is below float32's last place
            Right a;
            wmma::load_matrix_sync(a, &s.A[q][t * 16][c * 16], STRIP_LD);
            wmma::mma_sync(sum, b, a, sum);
          }
        }
      wmma::store_matrix_sync(product + c * 16, sum, BN, wmma::mem_row_major);
    }
    __syncwarp();
    for (int e = lane; e < 16 * BN / 8; e += 32) {  // 8 columns at a time
      const int i = e / (BN / 8), c = e % (BN / 8) * 8, row = step * 16 + i;
      if (row >= rows || c >= width) continue;
      union { float4 word; bfloat16 x[8]; } w;
      w.word = *reinterpret_cast<const float4*>(held + row * STRIP_LD + c);
      for (int k = 0; k < 8; ++k) w.x[k] = __float2bfloat16(__bfloat162float(w.x[k]) + product[i * BN + c + k]);
      *reinterpret_cast<float4*>(layers.out[layer] + int64_t(first + row) * layers.ldo[layer] + column + c) = w.word;
    }
  }
}

}  // namespace deft
