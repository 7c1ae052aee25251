// What a rank-r addition costs beside the base product, which is added to its outputs afterwards: some rows of x at a time,
// each of which is read once and is still in the cache for its second use.

inline void lowrank_forward(const LowRankForward& p, int64_t first, int64_t rows) {
  constexpr int64_t BITE = 16;
  for (int64_t i = first; i < first + rows; i += BITE) {
    int64_t here = least(BITE, first + rows - i);
    float* h = p.h + i * p.r;
    across<float>({p.x + i * p.ldx, p.ldx}, here, p.n, {p.packed_A, whole(p.r)}, p.r, {h, p.r});
    float* y = p.y + i * p.ldy;
    if (p.y) up<false, float>({h, p.r}, {p.Bt, p.ldb}, {p.bias, 0}, {y, p.ldy}, here, p.m, p.r);  // the bias as every row
  }
}

inline int64_t lowrank_backward_scratch(int64_t r) { return 2 * BLOCK * r; }

// dBt (r, padded m) and dA (r, padded n) are added to: one pair for each part of the rows, summed by the caller.
inline void lowrank_backward(const LowRankBackward& p, int64_t first, int64_t rows, float* dBt, float* dA, float* scratch) {
  const int64_t r = p.r;
  float *h = scratch, *dh = scratch + BLOCK * r;
  for (int64_t i = first; i < first + rows; i += BLOCK) {
    int64_t here = least(BLOCK, first + rows - i);
    const Floats dy{p.dy + i * p.lddy, p.lddy}, x = Floats{p.x, p.ldx}.from(i), kept{p.h ? p.h + i * r : h, r};
    if (p.dB && !p.h) across(x, here, p.n, {p.packed_A, whole(r)}, r, {h, r});
    if (p.dA || p.dx) across(dy, here, p.m, {p.packed_B, whole(r)}, r, {dh, r});
    if (p.dB) down<float>(kept, dy, here, p.m, r, {dBt, whole(p.m)}, nullptr, p.dA ? x : Floats{nullptr, 0}, p.n);
    if (p.dA) down<float>({dh, r}, x, here, p.n, r, {dA, whole(p.n)}, nullptr, Floats{p.dx, p.lddx}.from(i), p.n);
    float* dx = p.dx + i * p.lddx;
    if (p.dx) up<false, float>({dh, r}, {p.A, p.n}, {nullptr, 0}, {dx, p.lddx}, here, p.n, r);
  }
}
