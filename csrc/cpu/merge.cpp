#include <variant>

#include "jobs.h"

namespace deft {
namespace {

using Layer = std::variant<Merge<float>, Merge<bfloat16>, Merge<float16>>;

template <class T>
struct MergeBackward {      // W' = W + B A, A = R - K^T W
  bool removes, injects;      // whether there is a K, and an R
  Project<T> dA, A;           // B^T dW', which is dR, and A, (r, n); without a K, R is A
  ProjectBackward<T> dB, dK;  // dW' A^T and -W dA^T, (m, r)

  // Puts what it makes on the way into `memory`; null: only says how many floats that takes.
  int64_t place(float* memory, const Kernels& best) {
    int64_t used = 0;
    const auto take = [&](float*& p, int64_t count) { p = memory ? memory + used : nullptr, used += count; };
    const int64_t n = A.n, r = A.r;
    take(dB.packed, n * best.padded(r));
    if (removes) take(dK.packed, n * best.padded(r));
    if (!injects) take(dA.A, best.padded(r * n));
    if (removes || !injects) take(A.A, best.padded(r * n));
    return used;
  }
};
using Backward = std::variant<MergeBackward<float>, MergeBackward<bfloat16>, MergeBackward<float16>>;

// out_i = W_i + B_i (R_i - K_i^T W_i)
void merge(Tensors out, Tensors W, Tensors B, OptionalTensors K, OptionalTensors R) {
  const char* op = "merge";
  const size_t layers = W.size();
  check_length(out, op, "out", layers), check_length(B, op, "B", layers);
  check_length(K, op, "K", layers), check_length(R, op, "R", layers);

  const Kernels& best = kernels();
  std::vector<Layer> all;
  std::vector<Strip> strips;
  std::vector<std::pair<Matrix, Argument>> reads;
  std::vector<Matrix> outs;
  Writes writes;
  int64_t scratch = 0;
  double work = 0;
  for (size_t i = 0; i < layers; ++i) {
    const int64_t at = int64_t(i);
    const Argument w_arg{op, "W", at}, out_arg{op, "out", at}, b_arg{op, "B", at}, k_arg{op, "K", at}, r_arg{op, "R", at};
    with_type(W[i], w_arg, [&](auto type) {
      using T = decltype(type);
      const Matrix w = matrix(W[i], w_arg, W[i].scalar_type(), Rows::apart), b = matrix(B[i], b_arg);
      const Matrix o = matrix(out[i], out_arg, W[i].scalar_type(), Rows::apart);
      const int64_t m = w.rows, n = w.columns, r = b.columns;
      check_shape(o, out_arg, m, n), check_shape(b, b_arg, m, r);
      Merge<T> layer{w.as<T>(), w.ld, o.as<T>(), o.ld, b.as<float>(), nullptr, nullptr, m, n, r};
      reads.push_back({w, w_arg}), reads.push_back({b, b_arg});
      if (K[i]) {
        const Matrix k = matrix(*K[i], k_arg);
        check_shape(k, k_arg, m, r);
        layer.K = k.as<float>();
        reads.push_back({k, k_arg});
      }
      if (R[i]) {
        const Matrix injected = matrix(*R[i], r_arg);
        check_shape(injected, r_arg, r, n);
        layer.R = injected.as<float>();
        reads.push_back({injected, r_arg});
      }
      writes.add(o, out_arg), outs.push_back(o);
      const int64_t strip = best.of<T>().strip;
      scratch = std::max(scratch, best.of<T>().merge_scratch(m, r));
      work += 2.0 * m * n * r;
      if (m > 0) cut(strips, i, n, strip);
      all.push_back(layer);
    });
  }
  writes.done();
  for (const auto& [m, arg] : reads) writes.check(m, arg, arg.name[0] == 'W' ? &outs[arg.index] : nullptr);

  run(int64_t(strips.size()), scratch, work, [&](int64_t job, float* a) {
    const Strip& s = strips[job];
    std::visit([&](const auto& layer) {
      best.of<weight_type<std::decay_t<decltype(layer)>>>().merge(layer, s.first, s.width, a);
    }, all[s.layer]);
  });
}

// dB_i = dW'_i A_i^T, dK_i = -W_i dA_i^T, dR_i = dA_i, with A_i = R_i - K_i^T W_i and dA_i = B_i^T dW'_i
void merge_backward(Tensors dB, OptionalTensors dK, OptionalTensors dR, Tensors dW, Tensors W, Tensors B, OptionalTensors K,
                    OptionalTensors R) {
  constexpr int64_t ROWS = 64;  // of W in a job
  const auto at_once = [](int64_t m, int64_t n) { return m * n <= 1 << 15; };  // a layer in one job, which keeps it in cache
  const char* op = "merge_backward";
  const size_t layers = W.size();
  check_length(dB, op, "dB", layers), check_length(dK, op, "dK", layers), check_length(dR, op, "dR", layers);
  check_length(dW, op, "dW", layers), check_length(B, op, "B", layers);
  check_length(K, op, "K", layers), check_length(R, op, "R", layers);

  const Kernels& best = kernels();
  std::vector<Backward> all;
  std::vector<Strip> strips, parts;  // of W's columns, where it is not all one job, and of its rows
  std::vector<std::pair<Matrix, Argument>> reads;
  Writes writes;
  int64_t scratch = 0, memory = 0;
  std::vector<int64_t> offsets;
  double work = 0;
  for (size_t i = 0; i < layers; ++i) {
    const int64_t at = int64_t(i);
    const Argument w_arg{op, "W", at}, dw_arg{op, "dW", at}, b_arg{op, "B", at}, k_arg{op, "K", at}, r_arg{op, "R", at};
    const Argument db_arg{op, "dB", at}, dk_arg{op, "dK", at}, dr_arg{op, "dR", at};
    STD_TORCH_CHECK(K[i].has_value() == dK[i].has_value(), dk_arg.text(), " and K must both be given, or neither");
    STD_TORCH_CHECK(R[i].has_value() == dR[i].has_value(), dr_arg.text(), " and R must both be given, or neither");
    with_type(W[i], w_arg, [&](auto type) {
      using T = decltype(type);
      const Matrix w = matrix(W[i], w_arg, W[i].scalar_type(), Rows::apart), b = matrix(B[i], b_arg);
      const Matrix dw = matrix(dW[i], dw_arg, W[i].scalar_type(), Rows::apart), db = matrix(dB[i], db_arg);
      const int64_t m = w.rows, n = w.columns, r = b.columns;
      check_shape(dw, dw_arg, m, n), check_shape(b, b_arg, m, r), check_shape(db, db_arg, m, r);
      reads.push_back({w, w_arg}), reads.push_back({dw, dw_arg}), reads.push_back({b, b_arg});
      writes.add(db, db_arg);
      Project<T> da{dw.as<T>(), dw.ld, nullptr, b.as<float>(), nullptr, 0, -1, m, n, r};
      Project<T> a{w.as<T>(), w.ld, nullptr, nullptr, nullptr, 1, 1, m, n, r};
      ProjectBackward<T> out{dw.as<T>(), dw.ld, db.as<float>(), nullptr, nullptr, nullptr, 0, 0, m, n, r};
      ProjectBackward<T> removed{nullptr, 0, nullptr, nullptr, nullptr, nullptr, 0, 0, m, n, r};
      if (K[i]) {
        const Matrix k = matrix(*K[i], k_arg), dk = matrix(*dK[i], dk_arg);
        check_shape(k, k_arg, m, r), check_shape(dk, dk_arg, m, r);
        a.K = k.as<float>(), removed.W = w.as<T>(), removed.ldw = w.ld, removed.dK = dk.as<float>();
        reads.push_back({k, k_arg}), writes.add(dk, dk_arg);
      }
      if (R[i]) {
        const Matrix given = matrix(*R[i], r_arg), dr = matrix(*dR[i], dr_arg);
        check_shape(given, r_arg, r, n), check_shape(dr, dr_arg, r, n);
        a.R = given.as<float>(), da.A = dr.as<float>();
        reads.push_back({given, r_arg}), writes.add(dr, dr_arg);
      }
      MergeBackward<T> layer{K[i].has_value(), R[i].has_value(), da, a, out, removed};
      const int64_t sums = best.padded(r * best.of<T>().strip), more = layer.place(nullptr, best);
      offsets.push_back(memory);
      if (at_once(m, n)) {
        scratch = std::max(scratch, sums + more);
        cut(strips, i, 1, 1);
      } else {
        scratch = std::max(scratch, sums), memory += more;
        cut(strips, i, n, best.of<T>().strip), cut(parts, i, m, ROWS);
      }
      work += (K[i] ? 4.0 : 2.0) * m * n * r;
      all.push_back(layer);
    });
  }
  writes.done();
  for (const auto& [m, arg] : reads) writes.check(m, arg);

  const auto through_columns = [&](const auto& layer, int64_t c, int64_t width, float* sums) {
    const auto& typed = best.of<weight_type<decltype(layer.A)>>();
    const int64_t n = layer.A.n, r = layer.A.r, row = c * best.padded(r);
    const bool made = layer.removes || !layer.injects;
    typed.project(layer.dA, c, width, sums);
    if (made) typed.project(layer.A, c, width, sums);
    best.pack((made ? layer.A.A : layer.A.R) + c, n, r, width, 1, layer.dB.packed + row);
    if (layer.removes) best.pack(layer.dA.A + c, n, r, width, -1, layer.dK.packed + row);
  };
  const auto through_rows = [&](const auto& layer, int64_t first, int64_t rows) {
    const auto& typed = best.of<weight_type<decltype(layer.A)>>();
    typed.project_backward(layer.dB, first, rows);
    if (layer.removes) typed.project_backward(layer.dK, first, rows);
  };
  const Memory own = floats(memory);
  for (const Strip& part : parts)
    if (part.first == 0) std::visit([&](auto& layer) { layer.place(own.get() + offsets[part.layer], best); }, all[part.layer]);
  run(int64_t(strips.size()), scratch, work, [&](int64_t job, float* sums) {
    const Strip& s = strips[job];
    std::visit([&](auto& layer) {
      const int64_t m = layer.A.m, n = layer.A.n, strip = best.of<weight_type<decltype(layer.A)>>().strip;
      if (!at_once(m, n)) return through_columns(layer, s.first, s.width, sums);
      layer.place(sums + best.padded(layer.A.r * strip), best);
      for (int64_t c = 0; c < n; c += strip) through_columns(layer, c, std::min(strip, n - c), sums);
      through_rows(layer, 0, m);
    }, all[s.layer]);
  });
  run(int64_t(parts.size()), 0, work, [&](int64_t job, float*) {
    const Strip& part = parts[job];
    std::visit([&](const auto& layer) { through_rows(layer, part.first, part.width); }, all[part.layer]);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deft_kernels_native, CompositeExplicitAutograd, m) {
  m.impl("merge", TORCH_BOX(&merge));
  m.impl("merge_backward", TORCH_BOX(&merge_backward));
}

}  // namespace deft
