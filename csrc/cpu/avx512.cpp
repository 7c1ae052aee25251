#if defined(__x86_64__)
#include <immintrin.h>

#include <type_traits>
#include <utility>

#include "kernels.h"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define ISA avx512
#define LANES 16
#include "isa.h"
#endif
