// The CUDA kernels as operations: their checks, and one launch for all layers on the caller's stream.
#include <torch/csrc/stable/library.h>

#include <numeric>

#include "../arguments.h"
#include "merge.h"
#include "orthonormalize.h"

namespace deft {
namespace {

constexpr ScalarType F32 = ScalarType::Float, BF16 = ScalarType::BFloat16;
constexpr int QR_THREADS = 512;
template <int RANK> constexpr int MERGE_THREADS = RANK > 32 ? 128 : 256;  // so that the strips of the tallest layers fit beside

template <int R>
__global__ void __launch_bounds__(QR_THREADS)
orthonormalize_kernel(const __grid_constant__ QrLayers layers, int blocks, int rows_shared) {
  orthonormalize_layer<R, QR_THREADS>(layers, blockIdx.x / blocks, blockIdx.x % blocks, blocks, rows_shared);
}

template <int RANK>
__global__ void __launch_bounds__(MERGE_THREADS<RANK>, 1) merge_kernel(const __grid_constant__ MergeLayers layers, int blocks) {
  merge_strip<RANK, MERGE_THREADS<RANK>>(layers, blockIdx.x / blocks, blockIdx.x % blocks, blocks);
}

void check(cudaError_t status, const char* op) {
  STD_TORCH_CHECK(status == cudaSuccess, op, ": ", cudaGetErrorString(status));
}

struct Device {  // the tensors' device, current for the length of an operation
  int before, shared;  // shared: most bytes of shared memory of a block

  Device(int index, const char* op) {
    check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index), op);
    check(cudaGetDevice(&before), op);
    check(cudaSetDevice(index), op);
  }
  ~Device() { cudaSetDevice(before); }
};

// Most blocks of a cluster of this kernel: the code that runs, which may have been compiled for an older device, decides.
template <class Kernel>
int clusters(Kernel kernel, const char* op) {
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), op);
  return attributes.ptxVersion >= 90 ? 8 : 1;
}

template <class Kernel, class... Args>
void launch(const char* op, Kernel kernel, int programs, int blocks, int threads, int64_t shared, int64_t stream, const Args&... args) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)), op);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(programs * blocks), config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared, config.stream = reinterpret_cast<cudaStream_t>(stream);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = blocks, cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster, config.numAttrs = blocks > 1;
  check(cudaLaunchKernelEx(&config, kernel, args...), op);
}

Matrix on_device(const Tensor& t, Argument arg, int device, ScalarType type = F32, Rows layout = Rows::contiguous) {
  auto here = [&](const Tensor& t) { return t.is_cuda() && t.get_device_index() == device; };
  return matrix(t, arg, type, type == F32 ? 4 : 2, layout, here, "the GPU of the first tensor");
}

template <int R>
void orthonormalize_all(const std::vector<std::pair<Matrix, Matrix>>& all, const Device& device, int64_t stream) {
  const char* op = "orthonormalize";
  int64_t tallest = 0;
  for (const auto& [p, q] : all) tallest = std::max(tallest, p.rows);
  const int64_t fixed = sizeof(QrShared<R, QR_THREADS>), fits = (device.shared - fixed) / (4 * R);
  STD_TORCH_CHECK(fits >= 0, op, ": rank above ", R / 2, " needs more shared memory than this GPU has");
  const int most = clusters(orthonormalize_kernel<R>, op);
  int blocks = 1;
  while (blocks < most && (tallest + blocks - 1) / blocks > fits) blocks *= 2;
  const int64_t chunk = (tallest + blocks - 1) / blocks, rows = std::min(chunk, fits);
  for (size_t start = 0; start < all.size(); start += LAYERS) {
    const int count = int(std::min<size_t>(LAYERS, all.size() - start));
    QrLayers layers;
    for (int i = 0; i < count; ++i) {
      const auto& [p, q] = all[start + i];
      layers.P[i] = p.as<float>(), layers.Q[i] = q.as<float>(), layers.m[i] = int(p.rows), layers.r[i] = int(p.columns);
    }
    launch(op, orthonormalize_kernel<R>, count, blocks, QR_THREADS, fixed + rows * 4 * R, stream, layers, blocks, int(rows));
  }
}

void orthonormalize(Tensors Q, Tensors P, int64_t stream) {
  const char* op = "orthonormalize";
  check_length(Q, op, "Q", P.size());
  if (P.empty()) return;
  STD_TORCH_CHECK(P[0].is_cuda(), op, ": P[0] is not on a GPU");
  const int index = P[0].get_device_index();
  std::vector<std::pair<Matrix, Matrix>> all;
  Writes writes;
  int64_t rank = 0;
  for (size_t i = 0; i < P.size(); ++i) {
    const Argument p_arg{op, "P", int64_t(i)}, q_arg{op, "Q", int64_t(i)};
    const Matrix p = on_device(P[i], p_arg, index), q = on_device(Q[i], q_arg, index);
    STD_TORCH_CHECK(p.rows >= p.columns && p.rows < 1 << 30, p_arg.text(), " has shape ", shape(P[i]), ", expected (m, r) with r <= m");
    STD_TORCH_CHECK(p.columns <= 128, p_arg.text(), " has rank ", p.columns, ", more than 128");
    check_shape(q, q_arg, p.rows, p.columns);
    writes.add(q, q_arg);
    if (p.columns) all.push_back({p, q});
    rank = std::max(rank, p.columns);
  }
  writes.done();
  for (size_t i = 0; i < P.size(); ++i) writes.check(on_device(P[i], {op, "P", int64_t(i)}, index), {op, "P", int64_t(i)});
  // the tall ones first: a cluster takes as long as its layer is tall
  std::stable_sort(all.begin(), all.end(), [](const auto& a, const auto& b) { return a.first.rows > b.first.rows; });
  const Device device(index, op);
  if (rank <= 16) orthonormalize_all<16>(all, device, stream);
  else if (rank <= 32) orthonormalize_all<32>(all, device, stream);
  else if (rank <= 64) orthonormalize_all<64>(all, device, stream);
  else orthonormalize_all<128>(all, device, stream);
}

template <int RANK>
void merge_all(std::vector<MergeLayers>& launches, int64_t tallest, const Device& device, int64_t stream) {
  const char* op = "merge";
  const int64_t fixed = sizeof(MergeShared<RANK, MERGE_THREADS<RANK>>), fits = (device.shared - fixed) / (2 * STRIP_LD) / 16 * 16;
  const int most = clusters(merge_kernel<RANK>, op);
  int blocks = 1;
  while (blocks < most && (tallest + blocks - 1) / blocks > fits) blocks *= 2;
  const int64_t chunk = (tallest + 16 * blocks - 1) / (16 * blocks) * 16;
  STD_TORCH_CHECK(chunk <= fits, op, ": a weight of ", tallest, " rows does not fit ", blocks, " blocks' shared memory, ", fits, " rows each");
  for (MergeLayers& layers : launches) {
    int64_t strips = 0;
    for (int i = 0; i < layers.count; ++i) layers.strips_before[i] = int(strips), strips += (int64_t(layers.n[i]) + BN - 1) / BN;
    STD_TORCH_CHECK(strips * blocks < INT32_MAX, op, ": too many columns for one launch");
    launch(op, merge_kernel<RANK>, int(strips), blocks, MERGE_THREADS<RANK>, fixed + chunk * 2 * STRIP_LD, stream, layers, blocks);
  }
}

void merge(Tensors out, Tensors W, Tensors B, OptionalTensors K, OptionalTensors R, int64_t stream) {
  const char* op = "merge";
  const size_t layers = W.size();
  check_length(out, op, "out", layers), check_length(B, op, "B", layers);
  check_length(K, op, "K", layers), check_length(R, op, "R", layers);
  if (layers == 0) return;
  STD_TORCH_CHECK(W[0].is_cuda(), op, ": W[0] is not on a GPU");
  const int index = W[0].get_device_index();
  std::vector<MergeLayers> launches;
  std::vector<std::pair<Matrix, Argument>> reads;
  std::vector<Matrix> outs;
  Writes writes;
  int64_t rank = 0, tallest = 0;
  auto vectors = [](const Matrix& w, Argument arg) {
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(w.data) % 16 == 0 && w.ld % 8 == 0 && w.columns % 8 == 0, arg.text(),
                    " cannot be read in vectors of 16 bytes");
  };
  for (size_t i = 0; i < layers; ++i) {
    const int64_t at = int64_t(i);
    const Argument w_arg{op, "W", at}, out_arg{op, "out", at}, b_arg{op, "B", at}, k_arg{op, "K", at}, r_arg{op, "R", at};
    const Matrix w = on_device(W[i], w_arg, index, BF16, Rows::apart), o = on_device(out[i], out_arg, index, BF16, Rows::apart);
    const Matrix b = on_device(B[i], b_arg, index);
    const int64_t m = w.rows, n = w.columns, r = b.columns;
    vectors(w, w_arg), vectors(o, out_arg);
    check_shape(o, out_arg, m, n), check_shape(b, b_arg, m, r);
    STD_TORCH_CHECK(m < 1 << 30 && n < 1 << 30, w_arg.text(), " has shape ", shape(W[i]), ", more than 2^30 on a side");
    STD_TORCH_CHECK(r <= 64, b_arg.text(), " has rank ", r, ", more than 64");
    reads.push_back({w, w_arg}), reads.push_back({b, b_arg});
    Matrix k{}, injected{};
    if (K[i]) k = on_device(*K[i], k_arg, index), check_shape(k, k_arg, m, r), reads.push_back({k, k_arg});
    if (R[i]) injected = on_device(*R[i], r_arg, index), check_shape(injected, r_arg, r, n), reads.push_back({injected, r_arg});
    writes.add(o, out_arg), outs.push_back(o);
    if (m == 0 || n == 0) continue;
    if (launches.empty() || launches.back().count == MERGE_LAYERS) launches.emplace_back().count = 0;
    MergeLayers& to = launches.back();
    const int c = to.count++;
    to.W[c] = w.as<bfloat16>(), to.out[c] = o.as<bfloat16>(), to.B[c] = b.as<float>();
    to.K[c] = k.as<float>(), to.R[c] = injected.as<float>(), to.ldw[c] = w.ld, to.ldo[c] = o.ld;
    to.m[c] = int(m), to.n[c] = int(n), to.r[c] = int(r);
    rank = std::max(rank, r), tallest = std::max(tallest, m);
  }
  writes.done();
  for (const auto& [m, arg] : reads) writes.check(m, arg, arg.name[0] == 'W' ? &outs[arg.index] : nullptr);
  const Device device(index, op);
  if (rank <= 16) merge_all<16>(launches, tallest, device, stream);
  else if (rank <= 32) merge_all<32>(launches, tallest, device, stream);
  else merge_all<64>(launches, tallest, device, stream);
}

}  // namespace

// `stream`: the caller's cudaStream_t, as a number
STABLE_TORCH_LIBRARY(deft_kernels_cuda, m) {
  m.def("orthonormalize(Tensor(a!)[] Q, Tensor[] P, int stream) -> ()");
  m.def("merge(Tensor(a!)[] out, Tensor[] W, Tensor[] B, Tensor?[] K, Tensor?[] R, int stream) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(deft_kernels_cuda, CompositeExplicitAutograd, m) {
  m.impl("orthonormalize", TORCH_BOX(&orthonormalize));
  m.impl("merge", TORCH_BOX(&merge));
}

}  // namespace deft
