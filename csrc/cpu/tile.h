// Three products with one side of rank r, from which every kernel is made. The tall or wide matrix is read in place, in its
// own type; the small side and all sums are float32, held in registers. Included inside an instruction set's namespace.
//
//   down    a (r, width)    += K^T W     over the rows of a strip of W      K (rows, r), W (rows, width)
//   up      out (rows, width) = W + B a                                     B (rows, r), a (r, width)
//   across  h (rows, r)      = W D       over the columns of W              W (rows, n), D (n, padded r)

constexpr int RANKS = LANES == 16 ? 8 : 4;    // rows of a tile of sums, 3 vectors wide: the registers are full
constexpr int64_t BLOCK = 128;                // rows summed in registers before they join a total: short sums round less,
                                              // and a block of a strip stays in the first-level cache for its next ranks
constexpr int64_t COLUMNS = 256;              // the same for `across`, along W's columns
constexpr int64_t MOST = 128;                 // ranks of one pass of `across`

template <class T> constexpr int64_t STRIP = sizeof(T) == 4 ? 48 : 96;  // three whole cache lines of a row of W

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// `part`: the lanes that count in the last vector of a strip whose width is no multiple of LANES; 0: whole vectors.

template <int J, int V, bool PART, class T>
inline void down_tile(const float* k, int64_t ldk, const T* w, int64_t ldw, int64_t rows, int part, float* a, int64_t lda) {
  vec sums[J][V] = {};
  for (int64_t i = 0; i < rows; ++i, k += ldk, w += ldw) {
    __builtin_prefetch(w + 8 * ldw);
    vec x[V];
    for (int v = 0; v < V; ++v) x[v] = PART ? load(w, part) : load(w + v * LANES);
    for (int j = 0; j < J; ++j)
      for (int v = 0; v < V; ++v) sums[j][v] += k[j] * x[v];
  }
  for (int j = 0; j < J; ++j)
    for (int v = 0; v < V; ++v) store(a + j * lda + v * LANES, load(a + j * lda + v * LANES) + sums[j][v]);
}

template <int J, int V, bool PART, class T>
inline void down_ranks(const float* k, int64_t ldk, const T* w, int64_t ldw, int64_t rows, int part, int64_t r, float* a, int64_t lda) {
  for (; r >= J; r -= J, k += J, a += J * lda) down_tile<J, V, PART>(k, ldk, w, ldw, rows, part, a, lda);
  if constexpr (J > 1)
    if (r > 0) down_ranks<J / 2, V, PART>(k, ldk, w, ldw, rows, part, r, a, lda);
}

// lda is at least width rounded up to whole vectors: the lanes beside the last column receive zeros.
template <class T>
void down(const float* k, int64_t ldk, const T* w, int64_t ldw, int64_t rows, int64_t width, int64_t r, float* a, int64_t lda) {
  for (int64_t i = 0; i < rows; i += BLOCK, k += BLOCK * ldk, w += BLOCK * ldw) {
    int64_t here = least(BLOCK, rows - i), c = 0;
    for (; c + 3 * LANES <= width; c += 3 * LANES) down_ranks<RANKS, 3, false>(k, ldk, w + c, ldw, here, 0, r, a + c, lda);
    if (c + 2 * LANES <= width) down_ranks<RANKS, 2, false>(k, ldk, w + c, ldw, here, 0, r, a + c, lda), c += 2 * LANES;
    if (c + LANES <= width) down_ranks<RANKS, 1, false>(k, ldk, w + c, ldw, here, 0, r, a + c, lda), c += LANES;
    if (c < width) down_ranks<RANKS, 1, true>(k, ldk, w + c, ldw, here, int(width - c), r, a + c, lda);
  }
}

template <int M, int V, bool PART, class T>
inline void up_tile(const float* b, int64_t ldb, const float* a, int64_t lda, const T* w, int64_t ldw, T* out, int64_t ldo, int part, int64_t r) {
  vec sums[M][V] = {};
  for (int i = 0; i < M; ++i)
    for (int v = 0; v < V; ++v) __builtin_prefetch(out + (i + 16) * ldo + v * LANES, 1);  // to be written
  if (w)
    for (int i = 0; i < M; ++i)
      for (int v = 0; v < V; ++v) sums[i][v] = PART ? load(w + i * ldw, part) : load(w + i * ldw + v * LANES);
  for (int64_t j = 0; j < r; ++j, ++b, a += lda) {
    vec x[V];
    for (int v = 0; v < V; ++v) x[v] = PART ? load(a, part) : load(a + v * LANES);
    for (int i = 0; i < M; ++i)
      for (int v = 0; v < V; ++v) sums[i][v] += b[i * ldb] * x[v];
  }
  for (int i = 0; i < M; ++i)
    for (int v = 0; v < V; ++v)
      PART ? store(out + i * ldo, sums[i][v], part) : store(out + i * ldo + v * LANES, sums[i][v]);
}

template <int M, int V, bool PART, class T>
inline void up_rows(const float* b, int64_t ldb, const float* a, int64_t lda, const T* w, int64_t ldw, T* out, int64_t ldo, int64_t rows, int part, int64_t r) {
  for (; rows >= M; rows -= M, b += M * ldb, w = w ? w + M * ldw : w, out += M * ldo)
    up_tile<M, V, PART>(b, ldb, a, lda, w, ldw, out, ldo, part, r);
  if constexpr (M > 1)
    if (rows > 0) up_rows<M / 2, V, PART>(b, ldb, a, lda, w, ldw, out, ldo, rows, part, r);
}

// w null: out = B a. out may be w.
template <class T>
void up(const float* b, int64_t ldb, const float* a, int64_t lda, const T* w, int64_t ldw, T* out, int64_t ldo, int64_t rows, int64_t width, int64_t r) {
  int64_t c = 0;
  auto at = [&](int64_t c) { return w ? w + c : w; };
  for (; c + 3 * LANES <= width; c += 3 * LANES) up_rows<RANKS, 3, false>(b, ldb, a + c, lda, at(c), ldw, out + c, ldo, rows, 0, r);
  if (c + 2 * LANES <= width) up_rows<RANKS, 2, false>(b, ldb, a + c, lda, at(c), ldw, out + c, ldo, rows, 0, r), c += 2 * LANES;
  if (c + LANES <= width) up_rows<RANKS, 1, false>(b, ldb, a + c, lda, at(c), ldw, out + c, ldo, rows, 0, r), c += LANES;
  if (c < width) up_rows<RANKS, 1, true>(b, ldb, a + c, lda, at(c), ldw, out + c, ldo, rows, int(width - c), r);
}

template <int V>
inline void across_tile(const float (&tile)[RANKS][COLUMNS], const float* d, int64_t ldd, int64_t columns, float* total) {
  // total (RANKS, MOST)
  vec sums[RANKS][V] = {};
  for (int64_t c = 0; c < columns; ++c, d += ldd) {
    vec x[V];
    for (int v = 0; v < V; ++v) x[v] = load(d + v * LANES);
    for (int i = 0; i < RANKS; ++i)
      for (int v = 0; v < V; ++v) sums[i][v] += tile[i][c] * x[v];
  }
  for (int i = 0; i < RANKS; ++i)
    for (int v = 0; v < V; ++v) store(total + i * MOST + v * LANES, load(total + i * MOST + v * LANES) + sums[i][v]);
}

// ldd: r padded to whole vectors, with zeros in D's padding. Rows of W lie together in `tile` while they are used, since
// in W itself they may all map to the same places of the cache.
template <class T>
void across(const T* w, int64_t ldw, int64_t rows, int64_t n, const float* d, int64_t ldd, int64_t r, float* h, int64_t ldh) {
  float tile[RANKS][COLUMNS];
  float total[RANKS * MOST];
  for (int64_t j = 0; j < ldd; j += MOST) {
    int64_t ranks = least(MOST, ldd - j);
    for (int64_t i = 0; i < rows; i += RANKS) {
      int64_t here = least(RANKS, rows - i);
      __builtin_memset(total, 0, sizeof total);
      for (int64_t c = 0; c < n; c += COLUMNS) {
        int64_t width = least(COLUMNS, n - c), whole = width / LANES * LANES;
        for (int64_t q = 0; q < RANKS; ++q) {
          const T* row = w + (i + least(q, here - 1)) * ldw + c;  // a row that is not there: the last one again
          for (int64_t s = 0; s < whole; s += LANES) store(tile[q] + s, load(row + s));
          if (whole < width) store(tile[q] + whole, load(row + whole, int(width - whole)));
        }
        const float* right = d + c * ldd + j;
        int64_t v = 0;
        for (; v + 3 * LANES <= ranks; v += 3 * LANES) across_tile<3>(tile, right + v, ldd, width, total + v);
        if (v + 2 * LANES <= ranks) across_tile<2>(tile, right + v, ldd, width, total + v), v += 2 * LANES;
        if (v < ranks) across_tile<1>(tile, right + v, ldd, width, total + v);
      }
      for (int64_t q = 0; q < here; ++q)
        __builtin_memcpy(h + (i + q) * ldh + j, total + q * MOST, least(ranks, r - j) * sizeof(float));
    }
  }
}
