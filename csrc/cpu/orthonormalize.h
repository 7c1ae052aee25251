// orthonormalize, with LAPACK's signs: by P's Gram matrix where that shows its columns to be far from dependent, as random
// ones are, if they are many times longer than many; by Householder's reflections for every other P.

// By the Gram matrix: Q = P S with the inverse S of the Cholesky factor of P^T P, two products that read P in place.

constexpr double MOST_INVERSE = 20;         // norm of the inverse, columns having length one: so much does round-off grow
constexpr float SHORT = 1e-20f, LONG = 1e20f;  // squared lengths between which a column's entries can be squared
constexpr float WHOLE = 1 - 1e-5f;          // square of an entry of such a column that leaves nothing for those below it

// The signs that Householder gives the columns of a Q with positive R, from its top block Y (r, r), which is destroyed
// (Ballard, Demmel, Grigori, Jacquelin, Knight, Nguyen 2015). False where a column has nothing below its diagonal, which
// Householder does not reflect.
inline bool signs(float* Y, int64_t ld, int64_t r, float* sign) {
  for (int64_t k = 0; k < r; ++k) {
    const float *row = Y + k * ld, pivot = row[k];
    if (!(pivot * pivot < WHOLE)) return false;
    sign[k] = pivot >= 0 ? -1 : 1;
    for (int64_t i = k + 1; i < r; ++i) {
      float* below = Y + i * ld;
      const float factor = below[k] / (pivot - sign[k]);
      for (int64_t c = k / LANES * LANES; c < ld; c += LANES) store(below + c, load(below + c) - factor * load(row + c));
    }
  }
  return true;
}

inline int64_t by_gram_scratch(int64_t r) { return 2 * r * whole(r) + 2 * r * whole(2 * r) + 2 * r; }

inline bool by_gram(const Orthonormalize& layer, float* scratch) {
  using dvec = double __attribute__((vector_size(LANES * 4)));
  constexpr int64_t HALF = LANES / 2;
  const int64_t m = layer.m, r = layer.r, ld = whole(r), lde = whole(2 * r);
  float *S = scratch, *G = S + r * ld;                // upper triangles
  double* E = reinterpret_cast<double*>(G + r * ld);  // (r, 2r): the Gram matrix of columns of length one, and the identity
  float *scale = reinterpret_cast<float*>(E + r * lde), *sign = scale + r;
  __builtin_memset(S, 0, 2 * r * ld * sizeof(float));
  for (int64_t c = 0; c < r; c += LANES)
    down<float>({layer.P, r}, {layer.P + c, r}, m, least(LANES, r - c), least(c + LANES, r), {G + c, ld});
  for (int64_t c = 0; c < r; ++c) {
    const float length2 = G[c * ld + c];
    if (!(length2 > SHORT && length2 < LONG)) return false;
    scale[c] = 1 / __builtin_sqrtf(length2);
  }
  for (int64_t i = 0; i < r; ++i) {
    double* row = E + i * lde;
    for (int64_t c = 0; c < r; ++c) row[c] = double(G[i * ld + c]) * scale[i] * scale[c];
    for (int64_t c = r; c < lde; ++c) row[c] = c == r + i;
  }

  // Elimination makes L D L^T into D L^T, and beside it the identity into L^-1; S = L^-T D^-1/2. The eigenvalues of the
  // inverse have a sum, |S|^2, and their inverses have the sum r: the largest is at most |S|^2 - r + 2.
  double largest = 2 - double(r);
  for (int64_t k = 0; k < r; ++k) {
    const double *row = E + k * lde, pivot = row[k];
    if (!(pivot > 0)) return false;
    for (int64_t i = k + 1; i < r; ++i) {
      double* below = E + i * lde;
      const double factor = row[i] / pivot;
      for (int64_t c = i / HALF * HALF; c <= r + k; c += HALF) write(below + c, read<dvec>(below + c) - factor * read<dvec>(row + c));
    }
    const double root = 1 / __builtin_sqrt(pivot);
    for (int64_t i = 0; i <= k; ++i) {
      const double entry = row[r + i] * root;
      S[i * ld + k] = float(entry * scale[i]), largest += entry * entry;
    }
  }
  if (!(largest < MOST_INVERSE)) return false;

  up<false, float>({layer.P, r}, {S, ld}, {nullptr, 0}, {G, ld}, r, r, r);
  if (!signs(G, ld, r, sign)) return false;
  for (int64_t k = 0; k < r; ++k)
    for (int64_t c = k; c < r; ++c) S[k * ld + c] *= sign[c];
  for (int64_t c = 0; c < r; c += LANES)
    up<false, float>({layer.P, r}, {S + c, ld}, {nullptr, 0}, {layer.Q + c, r}, m, least(LANES, r - c), least(c + LANES, r));
  return true;
}

// Householder's thin QR, stable for any P, in panels of a few columns that the first-level cache holds. In the workspace a
// column lies as a column, so that no lane is idle. A panel is read once for each of its reflectors: while one acts on the
// rows, the products for the next are summed. On other panels its reflectors act together as I - V T V^T (Schreiber and Van
// Loan 1989, compact WY).

constexpr int WIDTH = 4;             // columns of a panel
constexpr int64_t PAIR = 2 * LANES;  // rows that are taken together, two vectors of each column

// Columns in pieces of PAIR rows, those of one piece after one another; zeros below row m. H_j = I - tau_j v_j v_j^T with
// v_j = x - beta e_j, not scaled to a one on the diagonal; V replaces the panel, with its zeros above the diagonal.
struct Panel {
  float *v, T[WIDTH][WIDTH];  // T is upper triangular
  int64_t rows, first;        // a whole number of PAIRs; the panel's first row and column
  int width;                  // columns that P has of it

  float* at(int64_t row, int column) const { return v + (row / PAIR * WIDTH + column) * PAIR + row % PAIR; }
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

inline float sum_of(vec v) {
  float lanes[LANES];
  store(lanes, v);
  for (int half = LANES / 2; half; half /= 2)
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  return lanes[0];
}

// LANES rows become LANES columns: blocks of STEP change places across the diagonal.
template <int STEP, int... L>
inline void transpose(vec (&x)[LANES], std::integer_sequence<int, L...> lanes) {
  UNROLLED for (int i = 0; i < LANES; ++i)
    if (!(i & STEP)) {
      const vec a = x[i], b = x[i + STEP];
      x[i] = __builtin_shufflevector(a, b, (L & STEP ? LANES + L - STEP : L)...);
      x[i + STEP] = __builtin_shufflevector(a, b, (L & STEP ? LANES + L : L + STEP)...);
    }
  if constexpr (2 * STEP < LANES) transpose<2 * STEP>(x, lanes);
}
inline void transpose(vec (&x)[LANES]) { transpose<1>(x, std::make_integer_sequence<int, LANES>{}); }

// LANES columns of P (m, r), from `first` on, into their panels, each scaled to about 1, which leaves Q as it is and squares
// in range.
inline void copy_in(const Panel* panels, const float* P, int64_t m, int64_t r, int64_t first) {
  const float* from = P + first;
  const int count = int(least(LANES, r - first));
  uvec most[4] = {};  // of every fourth row: four comparisons that do not wait for one another
  for (int64_t i = 0; i < m; i += 4)
    for (int64_t s = 0; s < least(4, m - i); ++s) {
      const uvec magnitude = bits(load(from + (i + s) * r, count)) & 0x7fffffff;
      most[s] = magnitude > most[s] ? magnitude : most[s];
    }
  float scale[LANES];
  for (int l = 0; l < LANES; ++l) {
    const uvec two = most[0] > most[1] ? most[0] : most[1], others = most[2] > most[3] ? most[2] : most[3];
    scale[l] = 1 / power_of_two(((vec)(two > others ? two : others))[l]);
  }
  for (int64_t i = 0; i < panels->rows; i += LANES) {
    vec x[LANES];
    if (i + LANES <= m) {
      UNROLLED for (int l = 0; l < LANES; ++l) x[l] = load(from + (i + l) * r, count);
    } else {
      for (int l = 0; l < LANES; ++l) x[l] = i + l < m ? load(from + (i + l) * r, count) : vec{};
    }
    transpose(x);
    UNROLLED for (int c = 0; c < LANES; ++c)
      if (c < (count + WIDTH - 1) / WIDTH * WIDTH) store(panels[(first + c) / WIDTH].at(i, c % WIDTH), x[c] * scale[c]);
  }
}

inline void copy_out(const Panel* panels, float* Q, int64_t m, int64_t r, int64_t first) {
  const int count = int(least(LANES, r - first));
  for (int64_t i = 0; i < m; i += LANES) {
    vec x[LANES];
    UNROLLED for (int c = 0; c < LANES; ++c) x[c] = c < count ? load(panels[(first + c) / WIDTH].at(i, c % WIDTH)) : vec{};
    transpose(x);
    for (int l = 0; l < least(LANES, m - i); ++l) store(Q + (i + l) * r + first, x[l], count);
  }
}

// Two vectors of rows: reflector J acts on the columns after it (none does where J is -1), and each column's products with
// column J + 1 are added to the sums, over the rows that `keep` leaves of that.
template <int J, bool HEAD>
__attribute__((always_inline)) inline void reflect_pair(float* rows, const float (&through)[WIDTH], const uvec (&keep)[2],
                                                        vec (&sums)[WIDTH][2]) {
  vec v[2], next[2];
  if constexpr (J >= 0) v[0] = load(rows + J * PAIR), v[1] = load(rows + J * PAIR + LANES);
  UNROLLED for (int l = J + 1; l < WIDTH; ++l) {
    float* x = rows + l * PAIR;
    vec pair[2] = {load(x), load(x + LANES)};
    if constexpr (J >= 0) {
      pair[0] -= through[l] * v[0], pair[1] -= through[l] * v[1];
      store(x, pair[0]), store(x + LANES, pair[1]);
    }
    if (l == J + 1)
      for (int s = 0; s < 2; ++s) next[s] = HEAD ? (vec)(bits(pair[s]) & keep[s]) : pair[s];
    sums[l][0] += next[0] * pair[0], sums[l][1] += next[1] * pair[1];
  }
  UNROLLED for (int l = 0; l <= J; ++l)
    sums[l][0] += next[0] * load(rows + l * PAIR), sums[l][1] += next[1] * load(rows + l * PAIR + LANES);
}

// Reflector J over all rows; the products of column J + 1 with all columns below its diagonal.
template <int J>
void reflect_rows(const Panel& p, const float (&through)[WIDTH], float (&below)[WIDTH]) {
  const int64_t head = p.first / PAIR * PAIR, diagonal = p.first + J + 1;
  uvec keep[2];
  for (int64_t l = 0; l < PAIR; ++l) keep[l / LANES][l % LANES] = head + l > diagonal ? ~0u : 0;
  vec total[WIDTH][2] = {};
  reflect_pair<J, true>(p.at(head, 0), through, keep, total);
  for (int64_t block = head + PAIR; block < p.rows; block += BLOCK * PAIR) {
    vec sums[WIDTH][2] = {};
    float *rows = p.at(block, 0), *end = p.at(least(p.rows, block + BLOCK * PAIR), 0);
    for (; rows < end; rows += WIDTH * PAIR) reflect_pair<J, false>(rows, through, keep, sums);
    UNROLLED for (int l = 0; l < WIDTH; ++l) total[l][0] += sums[l][0], total[l][1] += sums[l][1];
  }
  for (int l = 0; l < WIDTH; ++l) below[l] = sum_of(total[l][0] + total[l][1]);
}

// From column J on: the reflector, T's column, and the pass over the rows.
template <int J>
void factor_from(Panel& p, float (&below)[WIDTH]) {
  const int64_t diagonal = p.first + J;
  const float alpha = *p.at(diagonal, J), norm2 = below[J];
  // Nothing to reflect: the sign stays. (Columns have entries of about 1: what has come to 1e-15 is round-off of round-off.
  // Its squares have no digits left, and a reflection by them would not be orthogonal.)
  const bool identity = norm2 == 0 || alpha * alpha + norm2 < 1e-30f;
  const float beta = -__builtin_copysignf(__builtin_sqrtf(alpha * alpha + norm2), alpha);
  const float head = identity ? 1 : alpha - beta, tau = identity ? 0 : -1 / (beta * head);  // 2 / |v|^2
  float through[WIDTH];
  for (int l = 0; l < WIDTH; ++l) through[l] = head * *p.at(diagonal, l) + below[l];  // v^T of every column
  for (int l = 0; l < J; ++l) {
    float sum = 0;
    for (int k = l; k < J; ++k) sum += p.T[l][k] * through[k];
    p.T[l][J] = -tau * sum;
  }
  p.T[J][J] = tau;
  for (int l = 0; l < WIDTH; ++l) through[l] *= tau;
  for (int64_t i = p.first; i < diagonal; ++i) *p.at(i, J) = 0;
  *p.at(diagonal, J) = head;
  if constexpr (J + 1 < WIDTH)
    if (J + 1 < p.width) {
      reflect_rows<J>(p, through, below);
      factor_from<J + 1>(p, below);
    }
}

// Householder's QR of a panel's rows from `first` on, in place: V, and T.
inline void factor(Panel& p) {
  for (int64_t i = 0; i < p.first; ++i)
    for (int c = 0; c < WIDTH; ++c) *p.at(i, c) = 0;
  __builtin_memset(p.T, 0, sizeof p.T);
  float below[WIDTH];
  reflect_rows<-1>(p, p.T[0], below);
  factor_from<0>(p, below);
}

// C += V X for one panel's V; `fresh`: C = V X, and may be V itself.
inline void add_product(const Panel& p, const float (&X)[WIDTH][WIDTH], const Panel& C, bool fresh) {
  for (int64_t i = p.first / PAIR * PAIR; i < p.rows; i += LANES) {
    vec sums[WIDTH] = {};
    if (!fresh)
      UNROLLED for (int c = 0; c < WIDTH; ++c) sums[c] = load(C.at(i, c));
    UNROLLED for (int k = 0; k < WIDTH; ++k) {
      const vec v = load(p.at(i, k));
      UNROLLED for (int c = 0; c < WIDTH; ++c) sums[c] += X[k][c] * v;
    }
    UNROLLED for (int c = 0; c < WIDTH; ++c) store(C.at(i, c), sums[c]);
  }
}

// C <- (I - V T V^T) C, or its transpose, C the columns of another panel.
inline void reflect(const Panel& p, const Panel& C, bool transposed) {
  vec sums[WIDTH][WIDTH] = {};
  for (int64_t i = p.first / PAIR * PAIR; i < p.rows; i += LANES)
    UNROLLED for (int k = 0; k < WIDTH; ++k)
      UNROLLED for (int c = 0; c < WIDTH; ++c) sums[k][c] += load(p.at(i, k)) * load(C.at(i, c));
  float X[WIDTH][WIDTH] = {};
  for (int k = 0; k < WIDTH; ++k)
    for (int c = 0; c < WIDTH; ++c) {
      const float product = sum_of(sums[k][c]);
      for (int l = 0; l < WIDTH; ++l) X[l][c] -= (transposed ? p.T[k][l] : p.T[l][k]) * product;
    }
  add_product(p, X, C, false);
}

// [0; I; 0] - V T V^T [0; I; 0] in V's place: what the panel's own reflectors make of its columns of the identity.
inline void own_columns(const Panel& p) {
  float X[WIDTH][WIDTH] = {};
  for (int k = 0; k < p.width; ++k)
    for (int c = 0; c < p.width; ++c)
      for (int q = k; q <= c; ++q) X[k][c] -= p.T[k][q] * *p.at(p.first + c, q);
  add_product(p, X, p, true);
  for (int c = 0; c < p.width; ++c) *p.at(p.first + c, c) += 1;
}

inline int64_t rows_in_workspace(int64_t m) { return (m + PAIR - 1) / PAIR * PAIR; }

inline int64_t orthonormalize_scratch(int64_t m, int64_t r) {
  const int64_t panels = (r + WIDTH - 1) / WIDTH, size = (sizeof(Panel) + 63) / 64 * 16;
  const int64_t by_householder = panels * (WIDTH * rows_in_workspace(m) + size), other = by_gram_scratch(r);
  return by_householder > other ? by_householder : other;
}

inline void by_householder(const Orthonormalize& layer, float* scratch) {
  const int64_t m = layer.m, r = layer.r, count = (r + WIDTH - 1) / WIDTH, rows = rows_in_workspace(m);
  Panel* panels = reinterpret_cast<Panel*>(scratch + count * WIDTH * rows);
  for (int64_t i = 0; i < count; ++i)
    panels[i] = {scratch + i * WIDTH * rows, {}, rows, i * WIDTH, int(least(WIDTH, r - i * WIDTH))};
  for (int64_t c = 0; c < r; c += LANES) copy_in(panels, layer.P, m, r, c);
  for (int64_t i = 0; i < count; ++i) {
    factor(panels[i]);
    for (int64_t after = i + 1; after < count; ++after) reflect(panels[i], panels[after], true);
  }
  // Q = H_1 H_2 ... [I; 0], from the last panel to the first; above a panel's first row its columns are zero.
  for (int64_t i = count - 1; i >= 0; --i) {
    for (int64_t after = i + 1; after < count; ++after) reflect(panels[i], panels[after], false);
    own_columns(panels[i]);
  }
  for (int64_t c = 0; c < r; c += LANES) copy_out(panels, layer.Q, m, r, c);
}

inline void orthonormalize(const Orthonormalize& layer, float* scratch) {
  if (!by_gram(layer, scratch)) by_householder(layer, scratch);
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
