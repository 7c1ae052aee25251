// merge: a strip of W is read from its top for A = R - K^T W, and from its bottom for W' = W + B A while the cache has it.

template <class T>
void merge(const Merge<T>& layer, int64_t first, int64_t width, float* a) {
  constexpr int64_t lda = STRIP<T>;
  const T* w = layer.W + first;
  const int64_t m = layer.m, r = layer.r;
  __builtin_memset(a, 0, r * lda * sizeof(float));
  if (layer.K) down(layer.K, r, w, layer.ldw, m, width, r, a, lda);
  for (int64_t j = 0; j < r; ++j)
    for (int64_t c = 0; c < width; ++c) a[j * lda + c] = (layer.R ? layer.R[j * layer.n + first + c] : 0) - a[j * lda + c];
  for (int64_t i = (m - 1) / BLOCK * BLOCK; i >= 0; i -= BLOCK)
    up(layer.B + i * r, r, a, lda, w + i * layer.ldw, layer.ldw, layer.out + i * layer.ldo + first, layer.ldo,
       least(BLOCK, m - i), width, r);
}
