// What the operations ask of the kernels of one instruction set, and which set this processor has.
#pragma once

#include <cstdint>

namespace deft {

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

// Matrices are row-major: a pointer, and elements from row to row where rows may lie apart.

template <class T>
struct Merge {  // out = W + B (R - K^T W); K or R may be null
  const T* W; int64_t ldw;    // (m, n)
  T* out; int64_t ldo;        // (m, n), W's own memory or none of it
  const float *B, *K, *R;     // (m, r), (m, r), (r, n)
  int64_t m, n, r;
};

template <class T>
struct Project {  // A = injection R - removal K^T W; K or R may be null
  const T* W; int64_t ldw;    // (m, n)
  float* A;                   // (r, n)
  const float *K, *R;
  float injection, removal;
  int64_t m, n, r;
};

template <class T>
struct ProjectBackward {  // dK = -removal W dA^T, dR = injection dA; W null: no dK
  const T* W; int64_t ldw;    // (m, n)
  float *dK, *dR;             // (m, r), (r, n)
  const float* dA;            // (r, n)
  float* packed;              // scratch (n, padded r): -removal dA^T
  float injection, removal;
  int64_t m, n, r;
};

struct Orthonormalize {  // Q of P = Q T
  const float* P; float* Q;   // (m, r)
  int64_t m, r;
};

struct OrthonormalizeBackward {
  const float *dQ, *Q, *P; float* dP;  // (m, r)
  int64_t m, r;
};

struct LowRankForward {  // h = x A^T, y = b + h B^T
  const float* x; int64_t ldx;  // (T, n)
  float* y; int64_t ldy;        // (T, m), null: h alone
  float* h;                     // (T, r)
  const float* bias;            // (m), null: none
  const float* packed_A;        // A^T (n, padded r)
  const float* Bt; int64_t ldb; // B^T (r, m)
  int64_t T, m, n, r;
};

struct LowRankBackward {  // dh = dy B, dx = dh A, dB^T = h^T dy, dA = dh^T x
  const float* dy; int64_t lddy;  // (T, m)
  const float* x; int64_t ldx;    // (T, n); null: neither dB nor dA
  const float* h;                 // (T, r); null: made again from x
  float* dx; int64_t lddx;        // (T, n), null: not wanted
  const float *packed_A;          // A^T (n, padded r), for an h made again
  const float *packed_B;          // B (m, padded r)
  const float *A;                 // (r, n)
  bool dA, dB;                    // which of the two are wanted
  int64_t T, m, n, r;
};

template <class T>
struct TypedKernels {
  void (*merge)(const Merge<T>&, int64_t first_column, int64_t width, float* scratch);
  int64_t (*merge_scratch)(int64_t m, int64_t r);
  void (*project)(const Project<T>&, int64_t first_column, int64_t width, float* scratch);
  void (*project_backward)(const ProjectBackward<T>&, int64_t first_row, int64_t rows);
  int64_t strip;  // columns of a job of merge and project
};

struct Kernels {
  const char* name;
  int lanes;  // floats in a vector; what is padded is padded to a multiple of it
  TypedKernels<float> f32;
  TypedKernels<bfloat16> bf16;
  TypedKernels<float16> f16;
  void (*pack)(const float* D, int64_t ldd, int64_t rows, int64_t columns, float scale, float* out);  // (r, n) -> (n, padded r)
  void (*orthonormalize)(const Orthonormalize&, float* scratch);
  int64_t (*orthonormalize_scratch)(int64_t m, int64_t r);
  void (*orthonormalize_backward)(const OrthonormalizeBackward&, float* scratch);
  int64_t (*orthonormalize_backward_scratch)(int64_t r);
  void (*lowrank_forward)(const LowRankForward&, int64_t first_row, int64_t rows);
  void (*lowrank_backward)(const LowRankBackward&, int64_t first_row, int64_t rows, float* dBt, float* dA, float* scratch);
  int64_t (*lowrank_backward_scratch)(int64_t r);

  template <class T> const TypedKernels<T>& of() const;
  int64_t padded(int64_t r) const { return (r + lanes - 1) / lanes * lanes; }
};

template <> inline const TypedKernels<float>& Kernels::of() const { return f32; }
template <> inline const TypedKernels<bfloat16>& Kernels::of() const { return bf16; }
template <> inline const TypedKernels<float16>& Kernels::of() const { return f16; }

const Kernels& kernels();  // the best that this processor runs, or the one that DEFT_KERNELS_ISA names

#if defined(__x86_64__)
namespace avx512 { extern const Kernels table; }
namespace avx2 { extern const Kernels table; }
#endif
namespace portable { extern const Kernels table; }

}  // namespace deft
