// orthonormalize: Householder's thin QR in panels of LANES columns, one vector a row: LAPACK's signs, and stable for any P.
// A panel's rows are read once per column: while one reflector acts on them, the products for the next are summed. On
// what lies beside the panel its reflectors act together as I - V T V^T (Schreiber and Van Loan 1989, compact WY).

// H_j = I - tau_j v_j v_j^T with v_j = x - beta e_j, not scaled to a one on the diagonal: so v_j lies below the diagonal of
// `a` as the column was before its reflection. Here are V's first rows, with the diagonal and the zeros above, and T.
struct Panel {
  float *a, top[LANES][LANES], T[LANES][LANES];
  int64_t ld, m, head;  // head: rows of top
  int width;
};

// The power of two of x's magnitude; 1 where x is 0 or not finite.
inline float power_of_two(float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  u &= 0x7f800000;
  if (u == 0 || u == 0x7f800000) return 1;
  if (u > 0x7e000000) u = 0x7e000000;  // whose inverse is a normal number too
  __builtin_memcpy(&x, &u, 4);
  return x;
}

// v in the lanes [first, end), zero in the others
inline vec only(vec v, int first, int end) {
  uvec mask;
  for (int l = 0; l < LANES; ++l) mask[l] = l >= first && l < end ? ~0u : 0;
  return (vec)(bits(v) & mask);
}

// P (m, r) -> a (m, ld), zeros beyond r, every column scaled to about 1, which leaves Q as it is and squares in range.
inline void copy_scaled(const float* P, int64_t m, int64_t r, float* a, int64_t ld) {
  for (int64_t c = 0; c < r; c += LANES) {
    const int count = int(least(LANES, r - c));
    const float* column = P + c;
    uvec most[4] = {};  // of every fourth row: four comparisons that do not wait for one another
    for (int64_t i = 0; i < m; i += 4)
      for (int64_t s = 0; s < least(4, m - i); ++s) {
        uvec magnitude = bits(load(column + (i + s) * r, count)) & 0x7fffffff;
        most[s] = magnitude > most[s] ? magnitude : most[s];
      }
    vec scale;
    for (int l = 0; l < LANES; ++l) {
      uvec two = most[0] > most[1] ? most[0] : most[1], others = most[2] > most[3] ? most[2] : most[3];
      scale[l] = 1 / power_of_two(((vec)(two > others ? two : others))[l]);
    }
    for (int64_t i = 0; i < m; ++i) store(a + i * ld + c, load(column + i * r, count) * scale);
  }
}

// The sum of f(i), first <= i < end, by blocks, and in four sums that do not wait for one another.
template <class F>
inline vec total(int64_t first, int64_t end, const F& f) {
  vec all = {};
  for (int64_t block = first; block < end; block += BLOCK) {
    const int64_t stop = least(block + BLOCK, end);
    vec sums[4] = {};
    int64_t i = block;
    for (; i + 4 <= stop; i += 4)
      for (int s = 0; s < 4; ++s) sums[s] += f(i + s);
    for (; i < stop; ++i) sums[0] += f(i);
    all += (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
  return all;
}

// Householder's QR of a panel, in place, and its V's first rows and T.
inline void factor(Panel& p) {
  float* const a = p.a;
  const int64_t ld = p.ld, m = p.m;
  p.head = least(LANES, m);
  __builtin_memset(p.top, 0, sizeof p.top);
  __builtin_memset(p.T, 0, sizeof p.T);
  // the sum over the rows below the diagonal of a[i][j] * a[i][:]
  vec below = total(1, m, [&](int64_t i) { return a[i * ld] * load(a + i * ld); });
  for (int j = 0; j < p.width; ++j) {
    float* diagonal = a + j * ld;
    const float alpha = diagonal[j], norm2 = below[j];
    // Nothing to reflect: the sign stays. (Columns have entries of about 1: what has come to 1e-15 is round-off of
    // round-off. Its squares have no digits left, and a reflection by them would not be orthogonal.)
    const bool identity = norm2 == 0 || alpha * alpha + norm2 < 1e-30f;
    const float beta = -__builtin_copysignf(__builtin_sqrtf(alpha * alpha + norm2), alpha);
    const float head = identity ? 1 : alpha - beta;      // v on the diagonal
    const float tau = identity ? 0 : -1 / (beta * head);  // 2 / |v|^2
    p.top[j][j] = head;
    for (int64_t i = j + 1; i < p.head; ++i) p.top[i][j] = a[i * ld + j];

    const vec products = head * load(diagonal) + below;  // v^T a: with v_k, k < j, which lie there, and with what is to come
    p.T[j][j] = tau;
    for (int l = 0; l < j; ++l) {
      float sum = 0;
      for (int k = l; k < j; ++k) sum += p.T[l][k] * products[k];
      p.T[l][j] = -tau * sum;
    }
    const vec through = only(tau * products, j + 1, p.width);
    store(diagonal, load(diagonal) - head * through);
    if (!identity) diagonal[j] = beta;

    const int next = j + 1 < p.width ? j + 1 : j;
    auto reflect = [&](int64_t i) {
      vec x = load(a + i * ld) - a[i * ld + j] * through;
      store(a + i * ld, x);
      return x;
    };
    if (j + 1 < m) reflect(j + 1);  // the next diagonal
    below = total(j + 2, m, [&](int64_t i) { vec x = reflect(i); return lane(x, next) * x; });
  }
}

// V^T C over all rows, C (m, width): added to X (panel's width, ldx).
inline void panel_down(const Panel& p, const float* C, int64_t ldc, int64_t width, float* X, int64_t ldx) {
  down<float>({&p.top[0][0], LANES}, {C, ldc}, p.head, width, p.width, {X, ldx});
  down<float>({p.a + p.head * p.ld, p.ld}, {C + p.head * ldc, ldc}, p.m - p.head, width, p.width, {X, ldx});
}

// C += V X; `fresh`: below the panel's first rows C is zero, and need not be read
inline void panel_up(const Panel& p, const float* X, int64_t ldx, float* C, int64_t ldc, int64_t width, bool fresh) {
  up<false, float>({&p.top[0][0], LANES}, {X, ldx}, {C, ldc}, {C, ldc}, p.head, width, p.width);
  float* rest = C + p.head * ldc;
  const Floats V{p.a + p.head * p.ld, p.ld};
  up<false, float>(V, {X, ldx}, {fresh ? nullptr : rest, ldc}, {rest, ldc}, p.m - p.head, width, p.width);
}

// C (m, width) <- (I - V T V^T) C, or its transpose.
inline void reflect(const Panel& p, float* C, int64_t ldc, int64_t width, bool transposed) {
  constexpr int64_t ldx = STRIP<float>;
  for (int64_t c = 0; c < width; c += ldx) {
    const int64_t here = least(ldx, width - c);
    float X[LANES * ldx] = {}, TX[LANES * ldx] = {};
    panel_down(p, C + c, ldc, here, X, ldx);
    for (int l = 0; l < p.width; ++l)
      for (int k = 0; k < p.width; ++k) {
        const float t = transposed ? p.T[k][l] : p.T[l][k];
        for (int64_t s = 0; s < here; ++s) TX[l * ldx + s] -= t * X[k * ldx + s];
      }
    panel_up(p, TX, ldx, C + c, ldc, here, false);
  }
}

inline int64_t orthonormalize_scratch(int64_t m, int64_t r) {
  const int64_t panels = (r + LANES - 1) / LANES;
  return m * panels * LANES + panels * int64_t((sizeof(Panel) + 63) / 64 * 16);
}

inline void orthonormalize(const Orthonormalize& layer, float* scratch) {
  const int64_t m = layer.m, r = layer.r, panels = (r + LANES - 1) / LANES, ld = panels * LANES;
  float* a = scratch;
  Panel* all = reinterpret_cast<Panel*>(scratch + m * ld);
  copy_scaled(layer.P, m, r, a, ld);
  for (int64_t i = 0; i < panels; ++i) {
    const int64_t j = i * LANES;
    Panel& p = all[i];
    p.a = a + j * ld + j, p.ld = ld, p.m = m - j, p.width = int(least(LANES, r - j));
    factor(p);
    if (i + 1 < panels) reflect(p, p.a + LANES, ld, r - j - LANES, true);
  }
  // Q = H_1 H_2 ... [I; 0], from the last panel to the first; above a panel's rows its columns are zero.
  for (int64_t i = panels - 1; i >= 0; --i) {
    const int64_t j = i * LANES;
    const Panel& p = all[i];
    float* q = layer.Q + j * r + j;
    if (i + 1 < panels) reflect(p, q + LANES, r, r - j - LANES, false);
    float X[LANES][LANES] = {};  // -T V^T [I; 0]
    for (int l = 0; l < p.width; ++l)
      for (int k = l; k < p.width; ++k)
        for (int c = 0; c < p.width; ++c) X[l][c] -= p.T[l][k] * p.top[c][k];
    for (int64_t row = 0; row < j + p.head; ++row)
      for (int c = 0; c < p.width; ++c) layer.Q[row * r + j + c] = row == j + c;
    panel_up(p, &X[0][0], LANES, q, r, p.width, true);
  }
}

// orthonormalize_backward: dP T^T = dQ - Q S with T = triu(Q^T P), X = triu(Q^T dQ), S = X + X^T - diag X.

inline int64_t orthonormalize_backward_scratch(int64_t r) {
  const int64_t ld = (r + LANES - 1) / LANES * LANES;
  return 2 * r * ld + 2 * r * r + BLOCK * r;  // S, T^-T, its float64 form, and rows of dQ - Q S
}

inline void orthonormalize_backward(const OrthonormalizeBackward& layer, float* scratch) {
  const int64_t m = layer.m, r = layer.r, ld = (r + LANES - 1) / LANES * LANES;
  float *S = scratch, *N = S + r * ld, *rows = N + r * ld;
  double* inverse = reinterpret_cast<double*>(rows + BLOCK * r);
  __builtin_memset(S, 0, 2 * r * ld * sizeof(float));
  down<float>({layer.Q, r}, {layer.dQ, r}, m, r, r, {S, ld});
  down<float>({layer.Q, r}, {layer.P, r}, m, r, r, {N, ld});
  for (int64_t l = 0; l < r; ++l)
    for (int64_t c = l; c < r; ++c) S[l * ld + c] = S[c * ld + l] = -S[l * ld + c];
  for (int64_t l = r - 1; l >= 0; --l)  // T^-1, the last row first
    for (int64_t c = 0; c < r; ++c) {
      double sum = l == c;
      for (int64_t k = l + 1; k <= c; ++k) sum -= double(N[l * ld + k]) * inverse[k * r + c];
      inverse[l * r + c] = c < l ? 0 : sum / N[l * ld + l];
    }
  for (int64_t l = 0; l < r; ++l)
    for (int64_t c = 0; c < r; ++c) N[c * ld + l] = float(inverse[l * r + c]);
  for (int64_t i = 0; i < m; i += BLOCK) {
    const int64_t here = least(BLOCK, m - i);
    up<false, float>({layer.Q + i * r, r}, {S, ld}, {layer.dQ + i * r, r}, {rows, r}, here, r, r);
    up<false, float>({rows, r}, {N, ld}, {nullptr, 0}, {layer.dP + i * r, r}, here, r, r);
  }
}
