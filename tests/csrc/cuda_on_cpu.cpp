// Runs csrc/cuda's kernels on the CPU: `cuda_on_cpu orthonormalize|merge IN OUT`. IN: int32 rank (a kernel's template
// argument), blocks, rows held in shared memory (orthonormalize), layers; for each layer int32 m, n, r, has K, has R; then
// the matrices of each layer in order. OUT: the results in order.
#include <cstdio>
#include <fstream>
#include <string>

#include "../../csrc/cuda/merge.h"
#include "../../csrc/cuda/orthonormalize.h"

using namespace deft;

constexpr int THREADS = 64;

template <class T>
std::vector<T> take(std::istream& in, size_t count) {
  std::vector<T> values(count);
  in.read(reinterpret_cast<char*>(values.data()), std::streamsize(count * sizeof(T)));
  return values;
}
template <class T>
void give(std::ostream& out, const std::vector<T>& values) {
  out.write(reinterpret_cast<const char*>(values.data()), std::streamsize(values.size() * sizeof(T)));
}

template <int R>
void orthonormalize_all(std::istream& in, std::ostream& out, int blocks, int rows_shared, const std::vector<int>& sizes) {
  std::vector<std::vector<float>> P, Q;
  auto layers = std::make_unique<QrLayers>();
  const int count = int(sizes.size()) / 5;
  for (int i = 0; i < count; ++i) {
    layers->m[i] = sizes[i * 5], layers->r[i] = sizes[i * 5 + 2];
    P.push_back(take<float>(in, size_t(layers->m[i]) * layers->r[i]));
    Q.emplace_back(P[i].size(), NAN);
  }
  for (int i = 0; i < count; ++i) layers->P[i] = P[i].data(), layers->Q[i] = Q[i].data();
  for (int i = 0; i < count; ++i)
    run_cluster(blocks, THREADS, sizeof(QrShared<R, THREADS>) + size_t(rows_shared) * R * 4,
                [&](int block) { orthonormalize_layer<R, THREADS>(*layers, i, block, blocks, rows_shared); });
  for (const auto& q : Q) give(out, q);
}

template <int RANK>
void merge_all(std::istream& in, std::ostream& out, int blocks, const std::vector<int>& sizes) {
  std::vector<std::vector<bfloat16>> W, merged;
  std::vector<std::vector<float>> B, K, R;
  auto layers = std::make_unique<MergeLayers>();
  int strips = 0, tallest = 0;
  layers->count = int(sizes.size()) / 5;
  for (int i = 0; i < layers->count; ++i) {
    const int *s = &sizes[i * 5], m = s[0], n = s[1], r = s[2];
    W.push_back(take<bfloat16>(in, size_t(m) * n)), B.push_back(take<float>(in, size_t(m) * r));
    K.push_back(take<float>(in, s[3] ? size_t(m) * r : 0)), R.push_back(take<float>(in, s[4] ? size_t(r) * n : 0));
    merged.emplace_back(W[i].size(), bfloat16{0x7fc0});
    layers->m[i] = m, layers->n[i] = n, layers->r[i] = r, layers->ldw[i] = layers->ldo[i] = n;
    layers->strips_before[i] = strips, strips += (n + BN - 1) / BN, tallest = std::max(tallest, m);
  }
  for (int i = 0; i < layers->count; ++i) {
    layers->W[i] = W[i].data(), layers->out[i] = i % 2 ? W[i].data() : merged[i].data();  // every other in place
    layers->B[i] = B[i].data(), layers->K[i] = K[i].empty() ? nullptr : K[i].data(), layers->R[i] = R[i].empty() ? nullptr : R[i].data();
  }
  const size_t chunk = size_t(tallest + 16 * blocks - 1) / (16 * blocks) * 16;
  for (int strip = 0; strip < strips; ++strip)
    run_cluster(blocks, THREADS, sizeof(MergeShared<RANK, THREADS>) + chunk * STRIP_LD * 2,
                [&](int block) { merge_strip<RANK, THREADS>(*layers, strip, block, blocks); });
  for (int i = 0; i < layers->count; ++i) give(out, i % 2 ? W[i] : merged[i]);
}

int main(int argc, char** argv) {
  if (argc != 4) return std::fputs("usage: cuda_on_cpu orthonormalize|merge IN OUT\n", stderr), 2;
  std::ifstream in(argv[2], std::ios::binary);
  std::ofstream out(argv[3], std::ios::binary);
  const auto head = take<int>(in, 4);
  const auto sizes = take<int>(in, size_t(head[3]) * 5);
  const int rank = head[0], blocks = head[1];
  if (std::string(argv[1]) == "merge") {
    if (rank == 16) merge_all<16>(in, out, blocks, sizes);
    else if (rank == 32) merge_all<32>(in, out, blocks, sizes);
    else merge_all<64>(in, out, blocks, sizes);
  } else {
    if (rank == 16) orthonormalize_all<16>(in, out, blocks, head[2], sizes);
    else if (rank == 32) orthonormalize_all<32>(in, out, blocks, head[2], sizes);
    else if (rank == 64) orthonormalize_all<64>(in, out, blocks, head[2], sizes);
    else orthonormalize_all<128>(in, out, blocks, head[2], sizes);
  }
}
