// project: A = injection R - removal K^T W, a strip of W at a time, and its backward, some rows of W at a time.

template <class T>
void project(const Project<T>& layer, int64_t first, int64_t width, float* a) {
  constexpr int64_t lda = STRIP<T>;
  const int64_t r = layer.r;
  __builtin_memset(a, 0, r * lda * sizeof(float));
  if (layer.K) down<T>({layer.K, r}, {layer.W + first, layer.ldw}, layer.m, width, r, {a, lda});
  for (int64_t j = 0; j < r; ++j) {
    const float* injected = layer.R ? layer.R + j * layer.n + first : nullptr;
    float* out = layer.A + j * layer.n + first;
    for (int64_t c = 0; c < width; ++c)
      out[c] = (injected ? layer.injection * injected[c] : 0) - layer.removal * a[j * lda + place<T>(c, width)];
  }
}

template <class T>
void project_backward(const ProjectBackward<T>& layer, int64_t first, int64_t rows) {
  across<T>({layer.W + first * layer.ldw, layer.ldw}, rows, layer.n, {layer.packed, whole(layer.r)}, layer.r,
            {layer.dK + first * layer.r, layer.r});
}

// D (r, n) times `scale` -> D^T (n, padded r), zeros in the padding.
inline void pack(const float* d, int64_t ldd, int64_t r, int64_t n, float scale, float* out) {
  const int64_t padded = whole(r);
  for (int64_t c = 0; c < n; c += 16)  // a cache line of every row
    for (int64_t j = 0; j < padded; ++j)
      for (int64_t s = c; s < least(c + 16, n); ++s) out[s * padded + j] = j < r ? scale * d[j * ldd + s] : 0;
}
