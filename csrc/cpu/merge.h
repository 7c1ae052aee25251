// merge: a strip of W is read from its top for A = R - K^T W, and from its bottom for W' = W + B A while the cache has it.

// Strips of up to this many bytes are kept in the second-level cache as a copy.
constexpr int64_t KEPT = 1 << 19;

template <class T>
int64_t merge_scratch(int64_t m, int64_t r) {
  const int64_t strip = m * STRIP<T> * int64_t(sizeof(T));
  return r * STRIP<T> + (strip <= KEPT ? strip / int64_t(sizeof(float)) : 0);
}

template <class T>
void merge(const Merge<T>& layer, int64_t first, int64_t width, float* a) {
  constexpr int64_t lda = STRIP<T>;
  const int64_t m = layer.m, r = layer.r;
  Rows<const T> w{layer.W + first, layer.ldw};
  __builtin_memset(a, 0, r * lda * sizeof(float));
  if (layer.K && r > 0) {
    T* packed = m * STRIP<T> * int64_t(sizeof(T)) <= KEPT ? (T*)(a + r * lda) : nullptr;
    down({layer.K, r}, w, m, width, r, {a, lda}, packed);
    if (packed) w = {packed, STRIP<T>};
  }
  for (int64_t j = 0; j < r; ++j)
    for (int64_t c = 0; c < width; ++c) {
      float& removed = a[j * lda + place<T>(c, width)];
      removed = (layer.R ? layer.R[j * layer.n + first + c] : 0) - removed;
    }

  // Whole cache lines of a large result go past the cache, which has no use for them.
  const Rows<T> out{layer.out + first, layer.ldo};
  const bool lines = uintptr_t(out.p) % 64 == 0 && out.ld * sizeof(T) % 64 == 0 && width == STRIP<T>;
  const bool past = lines && w.p != out.p && m * layer.n * sizeof(T) > 1 << 20;
  for (int64_t i = (m - 1) / BLOCK * BLOCK; i >= 0; i -= BLOCK)
    (past ? up<true, T> : up<false, T>)({layer.B + i * r, r}, {a, lda}, w.from(i), out.from(i), least(BLOCK, m - i), width, r);
  if (past) fence();
}
