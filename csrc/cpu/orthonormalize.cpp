#include <numeric>

#include "jobs.h"

namespace deft {
namespace {

// The tallest layers first, so that the last job is a short one.
template <class Layer>
std::vector<size_t> longest_first(const std::vector<Layer>& all) {
  std::vector<size_t> order(all.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return all[a].m * all[a].r > all[b].m * all[b].r; });
  return order;
}

// Q_i of P_i = Q_i T_i
void orthonormalize(Tensors Q, Tensors P) {
  const char* op = "orthonormalize";
  check_length(Q, op, "Q", P.size());
  const Kernels& best = kernels();
  std::vector<Orthonormalize> all;
  std::vector<std::pair<Matrix, Argument>> reads;
  Writes writes;
  int64_t scratch = 0;
  double work = 0;
  for (size_t i = 0; i < P.size(); ++i) {
    const Argument p_arg{op, "P", int64_t(i)}, q_arg{op, "Q", int64_t(i)};
    const Matrix p = matrix(P[i], p_arg), q = matrix(Q[i], q_arg);
    STD_TORCH_CHECK(p.rows >= p.columns, p_arg.text(), " has shape ", shape(P[i]), ", expected (m, r) with r <= m");
    check_shape(q, q_arg, p.rows, p.columns);
    writes.add(q, q_arg), reads.push_back({p, p_arg});
    if (p.columns == 0) continue;
    all.push_back({p.as<float>(), q.as<float>(), p.rows, p.columns});
    scratch = std::max(scratch, best.orthonormalize_scratch(p.rows, p.columns));
    work += 4.0 * p.rows * p.columns * p.columns;
  }
  writes.done();
  for (const auto& [m, arg] : reads) writes.check(m, arg);
  const std::vector<size_t> order = longest_first(all);
  run(int64_t(all.size()), scratch, work, [&](int64_t job, float* own) { best.orthonormalize(all[order[job]], own); });
}

// dP_i from dQ_i
void orthonormalize_backward(Tensors dP, Tensors dQ, Tensors Q, Tensors P) {
  const char* op = "orthonormalize_backward";
  const size_t layers = P.size();
  check_length(dP, op, "dP", layers), check_length(dQ, op, "dQ", layers), check_length(Q, op, "Q", layers);
  const Kernels& best = kernels();
  std::vector<OrthonormalizeBackward> all;
  std::vector<std::pair<Matrix, Argument>> reads;
  Writes writes;
  int64_t scratch = 0;
  double work = 0;
  for (size_t i = 0; i < layers; ++i) {
    const int64_t at = int64_t(i);
    const Argument p_arg{op, "P", at}, q_arg{op, "Q", at}, dq_arg{op, "dQ", at}, dp_arg{op, "dP", at};
    const Matrix p = matrix(P[i], p_arg), q = matrix(Q[i], q_arg), dq = matrix(dQ[i], dq_arg), dp = matrix(dP[i], dp_arg);
    const int64_t m = p.rows, r = p.columns;
    check_shape(q, q_arg, m, r), check_shape(dq, dq_arg, m, r), check_shape(dp, dp_arg, m, r);
    writes.add(dp, dp_arg);
    reads.push_back({p, p_arg}), reads.push_back({q, q_arg}), reads.push_back({dq, dq_arg});
    all.push_back({dq.as<float>(), q.as<float>(), p.as<float>(), dp.as<float>(), m, r});
    scratch = std::max(scratch, best.orthonormalize_backward_scratch(r));
    work += 4.0 * m * r * r;
  }
  writes.done();
  for (const auto& [m, arg] : reads) writes.check(m, arg);
  const std::vector<size_t> order = longest_first(all);
  run(int64_t(layers), scratch, work, [&](int64_t job, float* own) { best.orthonormalize_backward(all[order[job]], own); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deft_kernels_native, CompositeExplicitAutograd, m) {
  m.impl("orthonormalize", TORCH_BOX(&orthonormalize));
  m.impl("orthonormalize_backward", TORCH_BOX(&orthonormalize_backward));
}

}  // namespace deft
