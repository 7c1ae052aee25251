// A vector of LANES floats, and how it is read from and written to memory of each type. Included once per instruction set,
// inside its namespace: everything in here is compiled for that set alone.

using vec = float __attribute__((vector_size(LANES * 4)));
using uvec = uint32_t __attribute__((vector_size(LANES * 4)));
using hvec = uint16_t __attribute__((vector_size(LANES * 2)));

template <class V> inline V read(const void* p) { V v; __builtin_memcpy(&v, p, sizeof v); return v; }
template <class V> inline void write(void* p, V v) { __builtin_memcpy(p, &v, sizeof v); }
inline uvec bits(vec v) { return (uvec)v; }
inline uvec select(uvec mask, uvec yes, uvec no) { return (mask & yes) | (~mask & no); }

inline vec load(const float* p) { return read<vec>(p); }
inline void store(float* p, vec v) { write(p, v); }

inline vec widen(hvec h, bfloat16) { return (vec)(__builtin_convertvector(h, uvec) << 16); }
inline uvec rounded(vec v) {  // to bfloat16 in the upper half of each word: to the nearest, ties to even; NaN stays NaN
  const uvec u = bits(v), up = 0x7fff + ((u >> 16) & 1), nan = uvec{} + 0x7fc00000;
#if LANES == 16
  return (uvec)_mm512_mask_add_epi32((__m512i)nan, _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_ORD_Q), (__m512i)u, (__m512i)up);
#else
  return select((uvec)(v != v), nan, u + up);
#endif
}
inline hvec narrow(vec v, bfloat16) { return __builtin_convertvector(rounded(v) >> 16, hvec); }

#if LANES == 16
inline vec widen(hvec h, float16) { return (vec)_mm512_maskz_cvtph_ps(0xffff, (__m256i)h); }
inline hvec narrow(vec v, float16) { return (hvec)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT); }
#elif LANES == 8
inline vec widen(hvec h, float16) { return (vec)_mm256_cvtph_ps((__m128i)h); }
inline hvec narrow(vec v, float16) { return (hvec)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }
#else
inline vec widen(hvec h, float16) {
  uvec u = __builtin_convertvector(h, uvec), sign = (u & 0x8000) << 16, magnitude = u & 0x7fff;
  uvec normal = (magnitude << 13) + (112 << 23);
  uvec subnormal = bits(__builtin_convertvector(magnitude, vec) * 0x1p-24f);  // no subnormal float on the way
  uvec special = (magnitude << 13) | 0x7f800000;
  uvec value = select((uvec)(magnitude < 0x400), subnormal, select((uvec)(magnitude >= 0x7c00), special, normal));
  return (vec)(sign | value);
}
inline hvec narrow(vec v, float16) {
  uvec u = bits(v), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
  uvec normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // adding 0.5 leaves, in the last bits of the sum, the value in units of 2^-24, rounded by the processor
  uvec subnormal = bits((vec)magnitude + 0.5f) - 0x3f000000;
  uvec special = select((uvec)(magnitude > 0x7f800000), uvec{} + 0x7e00, uvec{} + 0x7c00);
  uvec value = select((uvec)(magnitude < (113 << 23)), subnormal, select((uvec)(magnitude >= 0x477ff000), special, normal));
  return __builtin_convertvector(sign | value, hvec);
}
#endif

template <class T> inline vec load(const T* p) { return widen(read<hvec>(p), T{}); }
template <class T> inline void store(T* p, vec v) { write(p, narrow(v, T{})); }

// V vectors of neighbouring columns. bfloat16 goes in pairs of vectors, the even columns and the odd ones: each is half of a
// word, so that neither widening nor narrowing has to move anything between lanes. `place` says where a column went.
template <int V, class T> inline void load_columns(const T* p, vec (&x)[V]) {
  constexpr bool pairs = std::is_same_v<T, bfloat16> && V == 2;
  if constexpr (pairs) {
    uvec words = read<uvec>(p);
    x[0] = (vec)(words << 16), x[1] = (vec)(words & 0xffff0000);
  } else {
    for (int v = 0; v < V; ++v) x[v] = load(p + v * LANES);
  }
}
// The first `count` lanes alone; the others are zero, and are not touched in memory.
#if LANES == 16
inline vec load(const float* p, int count) { return (vec)_mm512_maskz_loadu_ps((1u << count) - 1, p); }
inline void store(float* p, vec v, int count) { _mm512_mask_storeu_ps(p, (1u << count) - 1, (__m512)v); }
template <class T> inline vec load(const T* p, int count) {
  return widen((hvec)_mm256_maskz_loadu_epi16((1u << count) - 1, p), T{});
}
template <class T> inline void store(T* p, vec v, int count) {
  _mm256_mask_storeu_epi16(p, (1u << count) - 1, (__m256i)narrow(v, T{}));
}
#else
template <class T> inline vec load(const T* p, int count) {
  T part[LANES] = {};
  __builtin_memcpy(part, p, count * sizeof(T));
  return load(part);
}
template <class T> inline void store(T* p, vec v, int count) {
  T part[LANES];
  store(part, v);
  __builtin_memcpy(p, part, count * sizeof(T));
}
#endif

// A whole vector to aligned memory, past the cache where the processor can; and what makes such writes seen before those
// that come after.
#if LANES == 16
inline void stream(float* p, vec v) { _mm512_stream_ps(p, (__m512)v); }
template <class T> inline void stream(T* p, vec v) { _mm256_stream_si256((__m256i*)p, (__m256i)narrow(v, T{})); }
#elif LANES == 8
inline void stream(float* p, vec v) { _mm256_stream_ps(p, (__m256)v); }
template <class T> inline void stream(T* p, vec v) { _mm_stream_si128((__m128i*)p, (__m128i)narrow(v, T{})); }
#else
template <class T> inline void stream(T* p, vec v) { store(p, v); }
#endif
#if LANES > 4
inline void fence() { _mm_sfence(); }
#else
inline void fence() {}
#endif

// The inverse of load_columns
template <bool STREAM, int V, class T> inline void store_columns(T* p, const vec (&x)[V]) {
  constexpr bool pairs = std::is_same_v<T, bfloat16> && V == 2;
  if constexpr (pairs) {
    vec both = (vec)((rounded(x[0]) >> 16) | (rounded(x[1]) & 0xffff0000));
    STREAM ? stream((float*)p, both) : store((float*)p, both);
  } else {
    for (int v = 0; v < V; ++v) STREAM ? stream(p + v * LANES, x[v]) : store(p + v * LANES, x[v]);
  }
}
template <class T> inline int64_t place(int64_t column, int64_t width) {
  if (!std::is_same_v<T, bfloat16> || column >= width / (2 * LANES) * (2 * LANES)) return column;
  const int64_t within = column % (2 * LANES);
  return column - within + within % 2 * LANES + within / 2;
}
