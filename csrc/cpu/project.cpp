#include <variant>

#include "jobs.h"

namespace deft {
namespace {

using Forward = std::variant<Project<float>, Project<bfloat16>, Project<float16>>;
using Backward = std::variant<ProjectBackward<float>, ProjectBackward<bfloat16>, ProjectBackward<float16>>;

// A_i = injection_i R_i - removal_i K_i^T W_i
void project(Tensors A, OptionalTensors K, Tensors W, OptionalTensors R, Tensor injection, Tensor removal) {
  const char* op = "project";
  const size_t layers = W.size();
  check_length(A, op, "A", layers), check_length(K, op, "K", layers), check_length(R, op, "R", layers);
  const float* injected = scales(injection, {op, "injection"}, layers);
  const float* removed = scales(removal, {op, "removal"}, layers);

  const Kernels& best = kernels();
  std::vector<Forward> all;
  std::vector<Strip> strips;
  std::vector<std::pair<Matrix, Argument>> reads;
  Writes writes;
  int64_t scratch = 0;
  double work = 0;
  for (size_t i = 0; i < layers; ++i) {
    const int64_t at = int64_t(i);
    const Argument w_arg{op, "W", at}, a_arg{op, "A", at}, k_arg{op, "K", at}, r_arg{op, "R", at};
    with_type(W[i], w_arg, [&](auto type) {
      using T = decltype(type);
      const Matrix w = matrix(W[i], w_arg, W[i].scalar_type(), Rows::apart), a = matrix(A[i], a_arg);
      const int64_t m = w.rows, n = w.columns, r = a.rows;
      check_shape(a, a_arg, r, n);
      Project<T> layer{w.as<T>(), w.ld, a.as<float>(), nullptr, nullptr, injected[i], removed[i], m, n, r};
      reads.push_back({w, w_arg});
      if (K[i]) {
        const Matrix k = matrix(*K[i], k_arg);
        check_shape(k, k_arg, m, r);
        layer.K = k.as<float>();
        reads.push_back({k, k_arg});
        work += double(m) * n * r;
      }
      if (R[i]) {
        const Matrix given = matrix(*R[i], r_arg);
        check_shape(given, r_arg, r, n);
        layer.R = given.as<float>();
        reads.push_back({given, r_arg});
      }
      writes.add(a, a_arg);
      scratch = std::max(scratch, r * best.of<T>().strip);
      cut(strips, i, n, best.of<T>().strip);
      all.push_back(layer);
    });
  }
  writes.done();
  for (const auto& [m, arg] : reads) writes.check(m, arg);

  run(int64_t(strips.size()), scratch, work, [&](int64_t job, float* a) {
    const Strip& s = strips[job];
    std::visit([&](const auto& layer) {
      best.of<weight_type<std::decay_t<decltype(layer)>>>().project(layer, s.first, s.width, a);
    }, all[s.layer]);
  });
}

// dK_i = -removal_i W_i dA_i^T, where W_i is not None; dR_i = injection_i dA_i
void project_backward(OptionalTensors dK, Tensors dR, Tensors dA, OptionalTensors W, Tensor injection, Tensor removal) {
  constexpr int64_t ROWS = 64;  // of W in a job
  const char* op = "project_backward";
  const size_t layers = dA.size();
  check_length(dK, op, "dK", layers), check_length(dR, op, "dR", layers), check_length(W, op, "W", layers);
  const float* injected = scales(injection, {op, "injection"}, layers);
  const float* removed = scales(removal, {op, "removal"}, layers);

  const Kernels& best = kernels();
  std::vector<Backward> all;
  std::vector<Strip> parts;  // of W's rows
  std::vector<std::pair<Matrix, Argument>> reads;
  Writes writes;
  int64_t packed = 0;
  std::vector<int64_t> offsets;
  double work = 0;
  for (size_t i = 0; i < layers; ++i) {
    const int64_t at = int64_t(i);
    const Argument w_arg{op, "W", at}, dk_arg{op, "dK", at}, da_arg{op, "dA", at}, dr_arg{op, "dR", at};
    const Matrix da = matrix(dA[i], da_arg), dr = matrix(dR[i], dr_arg);
    const int64_t r = da.rows, n = da.columns;
    check_shape(dr, dr_arg, r, n);
    writes.add(dr, dr_arg), reads.push_back({da, da_arg});
    offsets.push_back(packed);
    STD_TORCH_CHECK(W[i].has_value() == dK[i].has_value(), dk_arg.text(), " and W must both be given, or neither");
    if (!W[i]) {
      all.push_back(ProjectBackward<float>{nullptr, 0, nullptr, dr.as<float>(), da.as<float>(), nullptr, injected[i], removed[i], 0, n, r});
      continue;
    }
    with_type(*W[i], w_arg, [&](auto type) {
      using T = decltype(type);
      const Matrix w = matrix(*W[i], w_arg, W[i]->scalar_type(), Rows::apart), dk = matrix(*dK[i], dk_arg);
      check_shape(w, w_arg, w.rows, n), check_shape(dk, dk_arg, w.rows, r);
      writes.add(dk, dk_arg), reads.push_back({w, w_arg});
      all.push_back(ProjectBackward<T>{w.as<T>(), w.ld, dk.as<float>(), dr.as<float>(), da.as<float>(), nullptr, injected[i], removed[i], w.rows, n, r});
      packed += n * best.padded(r);
      work += double(w.rows) * n * r;
      cut(parts, i, w.rows, ROWS);
    });
  }
  writes.done();
  for (const auto& [m, arg] : reads) writes.check(m, arg);

  const Memory memory = floats(packed);
  run(int64_t(layers), 0, work, [&](int64_t i, float*) {
    std::visit([&](auto& layer) {
      if (layer.W) {
        layer.packed = memory.get() + offsets[i];
        best.pack(layer.dA, layer.n, layer.r, layer.n, -layer.removal, layer.packed);
      }
      for (int64_t e = 0; e < layer.r * layer.n; ++e) layer.dR[e] = layer.injection * layer.dA[e];
    }, all[i]);
  });
  run(int64_t(parts.size()), 0, work, [&](int64_t job, float*) {
    const Strip& part = parts[job];
    std::visit([&](const auto& layer) {
      best.of<weight_type<std::decay_t<decltype(layer)>>>().project_backward(layer, part.first, part.width);
    }, all[part.layer]);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deft_kernels_native, CompositeExplicitAutograd, m) {
  m.impl("project", TORCH_BOX(&project));
  m.impl("project_backward", TORCH_BOX(&project_backward));
}

}  // namespace deft
