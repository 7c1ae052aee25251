#include <variant>

#include "jobs.h"

namespace deft {
namespace {

using Layer = std::variant<Merge<float>, Merge<bfloat16>, Merge<float16>>;

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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deft_kernels_native, CompositeExplicitAutograd, m) { m.impl("merge", TORCH_BOX(&merge)); }

}  // namespace deft
