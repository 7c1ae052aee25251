// What a rank-r addition costs beside the base product, some rows of x at a time: each is read once and is still in the
// cache for its second use.

inline void lowrank_forward(const LowRankForward& p, int64_t first, int64_t rows) {
  constexpr int64_t BITE = 16;
  for (int64_t i = first; i < first + rows; i += BITE) {
    int64_t here = least(BITE, first + rows - i);
    float* h = p.h + i * p.r;
    across(p.x + i * p.ldx, p.ldx, here, p.n, p.packed_A, (p.r + LANES - 1) / LANES * LANES, p.r, h, p.r);
    if (p.y) up(h, p.r, p.Bt, p.ldb, p.y + i * p.ldy, p.ldy, p.y + i * p.ldy, p.ldy, here, p.m, p.r);
  }
}

inline int64_t lowrank_backward_scratch(int64_t r) { return 2 * BLOCK * r; }

// dBt (r, padded m) and dA (r, padded n) are added to: one pair for each part of the rows, summed by the caller.
inline void lowrank_backward(const LowRankBackward& p, int64_t first, int64_t rows, float* dBt, float* dA, float* scratch) {
  const int64_t r = p.r, padded = (r + LANES - 1) / LANES * LANES;
  auto whole = [](int64_t n) { return (n + LANES - 1) / LANES * LANES; };
  float *h = scratch, *dh = scratch + BLOCK * r;
  for (int64_t i = first; i < first + rows; i += BLOCK) {
    int64_t here = least(BLOCK, first + rows - i);
    const float *dy = p.dy + i * p.lddy, *x = p.x ? p.x + i * p.ldx : nullptr, *kept = p.h ? p.h + i * r : h;
    if (p.dB) {
      if (!p.h) across(x, p.ldx, here, p.n, p.packed_A, padded, r, h, r);
      down(kept, r, dy, p.lddy, here, p.m, r, dBt, whole(p.m));
    }
    if (p.dA || p.dx) across(dy, p.lddy, here, p.m, p.packed_B, padded, r, dh, r);
    if (p.dA) down(dh, r, x, p.ldx, here, p.n, r, dA, whole(p.n));
    if (p.dx) up(dh, r, p.A, p.n, p.dx + i * p.lddx, p.lddx, p.dx + i * p.lddx, p.lddx, here, p.n, r);
  }
}
