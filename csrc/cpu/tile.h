// Three products with one side of rank r, from which every kernel is made. The tall or wide matrix is read in place, in its
// own type; the small side and all sums are float32, the sums held in registers. Included inside an instruction set's
// namespace.
//
//   down    a (r, width)      += K^T W      over the rows of a strip of W      K (rows, r), W (rows, width)
//   up      out (rows, width)  = W + B a                                       B (rows, r), a (r, width)
//   across  h (rows, r)        = W D        over the columns of W              W (rows, n), D (n, padded r)

#define UNROLLED _Pragma("GCC unroll 16")  // early enough for the sums to be registers and not an array in memory

constexpr int RANKS = LANES == 16 ? 8 : 4;  // rows of a tile of sums, which with 3 vectors to a row fills the registers
template <class T> constexpr int WIDE = std::is_same_v<T, bfloat16> ? 2 : 3;  // vectors to a row (see load_columns)
template <class T> constexpr int64_t STRIP = sizeof(T) == 4 ? 48 : 96;        // three whole cache lines of a row of W

constexpr int64_t BLOCK = 64;     // rows summed in registers before they join a total: short sums round less, and a block
                                  // of a strip stays in the first-level cache for the next ranks
constexpr int64_t COLUMNS = 256;  // the same for `across`, along W's columns
constexpr int64_t MOST = 128;     // ranks of one pass of `across`

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t whole(int64_t n) { return (n + LANES - 1) / LANES * LANES; }  // rounded up to whole vectors

template <class T>
struct Rows {  // a matrix by its first element, null for none, and how far its rows are apart
  T* p;
  int64_t ld;

  Rows from(int64_t row, int64_t column = 0) const { return {p ? p + row * ld + column : p, ld}; }
};
using Floats = Rows<const float>;

// What the passes over a block of rows fetch of the block that comes after it: `lines` cache lines of each of its rows, spread
// over all rows of all `passes`, so that memory is asked for the same all the time.
struct Fetch {
  const char* row;  // null: nothing comes after
  int64_t step;     // bytes from row to row
  int lines, passes, line = 0, due = 0;

  void some() {
    if (!row) return;
    for (due += lines; due >= passes; due -= passes) {
      __builtin_prefetch(row + 64 * line, 0, 2);
      if (++line == lines) line = 0, row += step;
    }
  }
};

// The widths of tiles that make up a strip: f.template operator()<vectors, whether the last is a part>(column, lanes).
template <class T, class F>
inline void columns(int64_t width, const F& f) {
  constexpr int V = WIDE<T>;
  int64_t c = 0;
  for (; c + V * LANES <= width; c += V * LANES) f.template operator()<V, false>(c, 0);
  if (V > 2 && c + 2 * LANES <= width) f.template operator()<2, false>(c, 0), c += 2 * LANES;
  if (c + LANES <= width) f.template operator()<1, false>(c, 0), c += LANES;
  if (c < width) f.template operator()<1, true>(c, int(width - c));
}

// J ranks and V vectors of `down`; `part` lanes of its only vector where PART. KEEP: W's rows are copied to `kept`.
template <int J, int V, bool PART, bool KEEP, class T>
inline void down_tile(Floats k, Rows<const T> w, T* kept, int64_t rows, Rows<float> a, int part, Fetch& fetch) {
  vec sums[J][V] = {};
  for (int64_t i = 0; i < rows; ++i, k.p += k.ld, w.p += w.ld) {
    fetch.some();
    vec x[V];
    if constexpr (PART) x[0] = load(w.p, part);
    else load_columns(w.p, x);
    if constexpr (KEEP) __builtin_memcpy(kept + i * STRIP<T>, w.p, PART ? part * sizeof(T) : V * LANES * sizeof(T));
    UNROLLED for (int j = 0; j < J; ++j)
      UNROLLED for (int v = 0; v < V; ++v) sums[j][v] += k.p[j] * x[v];
  }
  UNROLLED for (int j = 0; j < J; ++j)
    UNROLLED for (int v = 0; v < V; ++v) {
      float* total = a.p + j * a.ld + v * LANES;
      store(total, load(total) + sums[j][v]);
    }
}

template <int J, int V, bool PART, bool KEEP, class T>
inline void down_ranks(Floats k, Rows<const T> w, T* kept, int64_t rows, int64_t r, Rows<float> a, int part, Fetch& fetch) {
  if (r >= J) {
    down_tile<J, V, PART, KEEP>(k, w, kept, rows, a, part, fetch);
    if constexpr (KEEP) w = {kept, STRIP<T>};
    for (r -= J, k = k.from(0, J), a = a.from(J); r >= J; r -= J, k = k.from(0, J), a = a.from(J))
      down_tile<J, V, PART, false>(k, w, kept, rows, a, part, fetch);
    if constexpr (J > 1)
      if (r > 0) down_ranks<J / 2, V, PART, false>(k, w, kept, rows, r, a, part, fetch);
  } else if constexpr (J > 1) {
    down_ranks<J / 2, V, PART, KEEP>(k, w, kept, rows, r, a, part, fetch);
  }
}

// Rows of `a` hold width rounded up to whole vectors: the lanes beside the last column receive zeros. Where `packed` is
// given, W's strip is copied there on the way, rows of STRIP after one another: in W itself, rows that lie a power of two
// apart push one another out of the cache. `after`: what is used after W, to be fetched meanwhile, and how wide that is.
template <class T>
void down(Floats k, Rows<const T> w, int64_t rows, int64_t width, int64_t r, Rows<float> a, T* packed = nullptr,
          Rows<const T> after = {nullptr, 0}, int64_t after_width = 0) {
  const int passes = int((width + WIDE<T> * LANES - 1) / (WIDE<T> * LANES) * ((r + RANKS - 1) / RANKS));
  for (int64_t i = 0; i < rows; i += BLOCK) {
    const int64_t here = least(BLOCK, rows - i);
    const bool more = i + BLOCK < rows;
    const Rows<const T> next = more ? w.from(i + BLOCK) : after;
    Fetch fetch{(const char*)next.p, next.ld * int64_t(sizeof(T)), int((more ? width : after_width) * sizeof(T) + 63) / 64, passes};
    columns<T>(width, [&]<int V, bool PART>(int64_t c, int part) {
      if (packed) down_ranks<RANKS, V, PART, true>(k.from(i), w.from(i, c), packed + i * STRIP<T> + c, here, r, a.from(0, c), part, fetch);
      else down_ranks<RANKS, V, PART, false>(k.from(i), w.from(i, c), packed, here, r, a.from(0, c), part, fetch);
    });
  }
}

// M rows and V vectors of `up`. The sums begin with a W of a half type, whose own rounding hides theirs; a float32 one joins
// them at the end, when the small terms have been summed.
template <int M, int V, bool PART, bool STREAM, class T>
inline void up_tile(Floats b, Floats a, Rows<const T> w, Rows<T> out, int64_t r, int part) {
  constexpr bool FIRST = sizeof(T) < sizeof(float);
  const auto row_of_w = [&](int i, vec (&x)[V]) {
    if constexpr (PART) x[0] = load(w.p + i * w.ld, part);
    else load_columns(w.p + i * w.ld, x);
  };
  vec sums[M][V] = {};
  if (FIRST && w.p)
    UNROLLED for (int i = 0; i < M; ++i) row_of_w(i, sums[i]);
  if constexpr (!STREAM)
    UNROLLED for (int i = 0; i < M; ++i)
      UNROLLED for (int v = 0; v < V; ++v) __builtin_prefetch(out.p + (i + RANKS) * out.ld + v * LANES, 1, 2);  // of the next rows
  _Pragma("GCC unroll 4") for (int64_t j = 0; j < r; ++j, ++b.p, a.p += a.ld) {
    vec x[V];
    UNROLLED for (int v = 0; v < V; ++v) x[v] = PART ? load(a.p, part) : load(a.p + v * LANES);
    UNROLLED for (int i = 0; i < M; ++i)
      UNROLLED for (int v = 0; v < V; ++v) sums[i][v] += b.p[i * b.ld] * x[v];
  }
  UNROLLED for (int i = 0; i < M; ++i) {
    if (!FIRST && w.p) {
      vec x[V];
      row_of_w(i, x);
      UNROLLED for (int v = 0; v < V; ++v) sums[i][v] += x[v];
    }
    if constexpr (PART) store(out.p + i * out.ld, sums[i][0], part);
    else store_columns<STREAM>(out.p + i * out.ld, sums[i]);
  }
}

template <int M, bool STREAM, class T>
inline void up_rows(Floats b, Floats a, Rows<const T> w, Rows<T> out, int64_t rows, int64_t width, int64_t r) {
  for (; rows >= M; rows -= M, b = b.from(M), w = w.from(M), out = out.from(M))
    columns<T>(width, [&]<int V, bool PART>(int64_t c, int part) {
      up_tile<M, V, PART, STREAM && !PART>(b, a.from(0, c), w.from(0, c), out.from(0, c), r, part);
    });
  if constexpr (M > 1)
    if (rows > 0) up_rows<M / 2, STREAM>(b, a, w, out, rows, width, r);
}

// Without a W: out = B a. out may be w, but not where STREAM sends it past the cache.
template <bool STREAM = false, class T>
void up(Floats b, Floats a, Rows<const T> w, Rows<T> out, int64_t rows, int64_t width, int64_t r) {
  up_rows<RANKS, STREAM>(b, a, w, out, rows, width, r);
}

// RANKS rows and V vectors of ranks of `across`: total (RANKS, MOST). Meanwhile the rows of the tile after it are fetched.
template <int V, class T>
inline void across_tile(const float (&tile)[RANKS][COLUMNS], Floats d, int64_t columns, float* total, const T* const (&next)[RANKS]) {
  constexpr int64_t LINE = 64 / sizeof(T);
  vec sums[RANKS][V] = {};
  for (int64_t line = 0; line < columns; line += LINE) {
    UNROLLED for (int i = 0; i < RANKS; ++i) __builtin_prefetch(next[i] + line, 0, 2);
    for (int64_t c = line; c < least(line + LINE, columns); ++c, d.p += d.ld) {
      vec x[V];
      UNROLLED for (int v = 0; v < V; ++v) x[v] = load(d.p + v * LANES);
      UNROLLED for (int i = 0; i < RANKS; ++i)
        UNROLLED for (int v = 0; v < V; ++v) sums[i][v] += tile[i][c] * x[v];
    }
  }
  UNROLLED for (int i = 0; i < RANKS; ++i)
    UNROLLED for (int v = 0; v < V; ++v) {
      float* sum = total + i * MOST + v * LANES;
      store(sum, load(sum) + sums[i][v]);
    }
}

// Rows of D hold r rounded up to whole vectors, with zeros beside it. Rows of W lie together in `tile` while they are used:
// in W itself, they may all map to the same places of the cache.
template <class T>
void across(Rows<const T> w, int64_t rows, int64_t n, Floats d, int64_t r, Rows<float> h) {
  float tile[RANKS][COLUMNS], total[RANKS * MOST];
  const int64_t pieces = (n + COLUMNS - 1) / COLUMNS, step = n > COLUMNS ? whole((n + pieces - 1) / pieces) : n;  // alike
  for (int64_t j = 0; j < r; j += MOST) {
    const int64_t ranks = least(MOST, d.ld - j);
    for (int64_t i = 0; i < rows; i += RANKS) {
      const int64_t here = least(RANKS, rows - i);
      __builtin_memset(total, 0, sizeof total);
      for (int64_t c = 0; c < n; c += step) {
        const int64_t width = least(step, n - c), full = width / LANES * LANES;
        const T* next[RANKS];
        for (int64_t q = 0; q < RANKS; ++q) {
          const T* row = w.from(i + least(q, here - 1), c).p;  // a row that is not there: the last one again
          next[q] = c + step < n ? row + step : w.from(i + RANKS + q).p;
          for (int64_t s = 0; s < full; s += LANES) store(tile[q] + s, load(row + s));
          if (full < width) store(tile[q] + full, load(row + full, int(width - full)));
        }
        Floats right = d.from(c, j);
        int64_t v = 0;
        for (; v + 3 * LANES <= ranks; v += 3 * LANES) across_tile<3>(tile, right.from(0, v), width, total + v, next);
        if (v + 2 * LANES <= ranks) across_tile<2>(tile, right.from(0, v), width, total + v, next), v += 2 * LANES;
        if (v < ranks) across_tile<1>(tile, right.from(0, v), width, total + v, next);
      }
      for (int64_t q = 0; q < here; ++q)
        __builtin_memcpy(h.from(i + q, j).p, total + q * MOST, least(ranks, r - j) * sizeof(float));
    }
  }
}
