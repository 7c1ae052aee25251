#if defined(__x86_64__)
#include <immintrin.h>

#include <type_traits>
#include <utility>

#include "kernels.h"
#pragma GCC target("avx2,fma,f16c")
#define ISA avx2
#define LANES 8
#include "isa.h"
#endif
