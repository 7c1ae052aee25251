#include <cstring>

#include "jobs.h"

namespace deft {
namespace {

constexpr ScalarType F32 = ScalarType::Float;

// h = x A^T; where y is given, y = bias + h B^T, to which the base product is to be added. bias (1, m)
void lowrank_linear_forward(std::optional<Tensor> y, Tensor h, Tensor x, std::optional<Tensor> bias, Tensor B, Tensor A) {
  constexpr int64_t ROWS = 32;  // of x in a job
  const char* op = "lowrank_linear_forward";
  const Argument y_arg{op, "y"}, h_arg{op, "h"}, x_arg{op, "x"}, bias_arg{op, "bias"}, B_arg{op, "B"}, A_arg{op, "A"};
  const Matrix given = matrix(x, x_arg, F32, Rows::apart), b = matrix(B, B_arg), a = matrix(A, A_arg), out = matrix(h, h_arg);
  const int64_t T = given.rows, n = given.columns, m = b.rows, r = b.columns;
  check_shape(a, A_arg, r, n), check_shape(out, h_arg, T, r);
  Writes writes;
  writes.add(out, h_arg);
  Matrix sum{}, added{};
  if (y) {
    sum = matrix(*y, y_arg, F32, Rows::apart);
    check_shape(sum, y_arg, T, m);
    writes.add(sum, y_arg);
  }
  if (bias) {
    added = matrix(*bias, bias_arg);
    check_shape(added, bias_arg, 1, m);
  }
  writes.done();
  writes.check(given, x_arg), writes.check(b, B_arg), writes.check(a, A_arg);
  if (bias) writes.check(added, bias_arg);

  const Kernels& best = kernels();
  const int64_t padded_m = best.padded(m);
  const Memory packed_A = floats(n * best.padded(r)), Bt = floats(r * padded_m);
  best.pack(a.as<float>(), n, r, n, 1, packed_A.get());
  if (y) best.pack(b.as<float>(), r, m, r, 1, Bt.get());
  const LowRankForward p{given.as<float>(), given.ld, sum.as<float>(), sum.ld, out.as<float>(), added.as<float>(), packed_A.get(), Bt.get(), padded_m, T, m, n, r};
  run((T + ROWS - 1) / ROWS, 0, double(T) * r * (n + (y ? m : 0)), [&](int64_t job, float*) {
    best.lowrank_forward(p, job * ROWS, std::min(ROWS, T - job * ROWS));
  });
}

// dB = dy^T h and dA = (dy B)^T x, where given; where dx is given, dx = (dy B) A, to which dy W is to be added. h None: made from x.
void lowrank_linear_backward(std::optional<Tensor> dx, std::optional<Tensor> dB, std::optional<Tensor> dA, Tensor dy,
                             Tensor x, std::optional<Tensor> h, Tensor B, Tensor A) {
  const char* op = "lowrank_linear_backward";
  const Argument dx_arg{op, "dx"}, dB_arg{op, "dB"}, dA_arg{op, "dA"}, dy_arg{op, "dy"}, x_arg{op, "x"}, h_arg{op, "h"}, B_arg{op, "B"}, A_arg{op, "A"};
  const Matrix g = matrix(dy, dy_arg, F32, Rows::apart), b = matrix(B, B_arg), a = matrix(A, A_arg);
  const int64_t T = g.rows, m = g.columns, r = b.columns, n = a.columns;
  check_shape(b, B_arg, m, r), check_shape(a, A_arg, r, n);
  Writes writes;
  std::vector<std::pair<Matrix, Argument>> reads{{g, dy_arg}, {b, B_arg}, {a, A_arg}};
  LowRankBackward p{g.as<float>(), g.ld, nullptr, 0, nullptr, nullptr, 0, nullptr, nullptr, a.as<float>(), dA.has_value(), dB.has_value(), T, m, n, r};
  Matrix out_B{}, out_A{};
  if (dB || dA) {
    const Matrix rows = matrix(x, x_arg, F32, Rows::apart);
    check_shape(rows, x_arg, T, n);
    p.x = rows.as<float>(), p.ldx = rows.ld;
    reads.push_back({rows, x_arg});
  }
  if (h) {
    const Matrix kept = matrix(*h, h_arg);
    check_shape(kept, h_arg, T, r);
    p.h = kept.as<float>();
    reads.push_back({kept, h_arg});
  }
  if (dB) {
    out_B = matrix(*dB, dB_arg);
    check_shape(out_B, dB_arg, m, r);
    writes.add(out_B, dB_arg);
  }
  if (dA) {
    out_A = matrix(*dA, dA_arg);
    check_shape(out_A, dA_arg, r, n);
    writes.add(out_A, dA_arg);
  }
  if (dx) {
    const Matrix sum = matrix(*dx, dx_arg, F32, Rows::apart);
    check_shape(sum, dx_arg, T, n);
    p.dx = sum.as<float>(), p.lddx = sum.ld;
    writes.add(sum, dx_arg);
  }
  writes.done();
  for (const auto& [read, arg] : reads) writes.check(read, arg);

  const Kernels& best = kernels();
  const bool again = p.dB && !p.h;
  const Memory packed_A = floats(again ? n * best.padded(r) : 0), packed_B = floats(m * best.padded(r));
  if (again) best.pack(a.as<float>(), n, r, n, 1, packed_A.get());
  for (int64_t i = 0; i < m; ++i) {  // B (m, r) stands as it is used, but for the padding
    float* row = packed_B.get() + i * best.padded(r);
    std::memset(row, 0, best.padded(r) * sizeof(float));
    if (r) std::memcpy(row, b.as<float>() + i * r, r * sizeof(float));
  }
  p.packed_A = packed_A.get(), p.packed_B = packed_B.get();

  // Each part of the rows has sums of its own, added up in their order.
  constexpr int64_t ROWS = 128;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t rows = std::max<int64_t>(1, (T + 2 * threads * ROWS - 1) / (2 * threads * ROWS)) * ROWS;
  const int64_t parts = std::max<int64_t>(1, (T + rows - 1) / rows), size_B = r * best.padded(m), size_A = r * best.padded(n);
  const Memory sums = floats(parts * (size_B + size_A));
  const double work = double(T) * r * (m * (1 + p.dB) + n * (p.dA + (p.dx != nullptr) + again));
  run(parts, best.lowrank_backward_scratch(r), work, [&](int64_t part, float* scratch) {
    float *own_B = sums.get() + part * (size_B + size_A), *own_A = own_B + size_B;
    std::memset(own_B, 0, (size_B + size_A) * sizeof(float));
    best.lowrank_backward(p, part * rows, std::min(rows, T - part * rows), own_B, own_A, scratch);
  });
  // Some columns of dB^T or dA: the parts' sums join the first part's, in their order, and go to their place.
  constexpr int64_t BLOCK = 64;
  const int64_t blocks_B = p.dB ? (m + BLOCK - 1) / BLOCK : 0, blocks_A = p.dA ? (n + BLOCK - 1) / BLOCK : 0;
  run(blocks_B + blocks_A, 0, double(parts) * (size_B + size_A), [&](int64_t job, float*) {
    const bool is_B = job < blocks_B;
    const int64_t width = is_B ? m : n, ld = best.padded(width), c = (is_B ? job : job - blocks_B) * BLOCK;
    const int64_t count = std::min(BLOCK, width - c);
    for (int64_t j = 0; j < r; ++j) {
      float* sum = sums.get() + (is_B ? 0 : size_B) + j * ld + c;
      for (int64_t part = 1; part < parts; ++part)
        for (int64_t s = 0; s < count; ++s) sum[s] += sum[part * (size_B + size_A) + s];
      if (is_B)
        for (int64_t s = 0; s < count; ++s) out_B.as<float>()[(c + s) * r + j] = sum[s];
      else std::memcpy(out_A.as<float>() + j * n + c, sum, count * sizeof(float));
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deft_kernels_native, CompositeExplicitAutograd, m) {
  m.impl("lowrank_linear_forward", TORCH_BOX(&lowrank_linear_forward));
  m.impl("lowrank_linear_backward", TORCH_BOX(&lowrank_linear_backward));
}

}  // namespace deft
