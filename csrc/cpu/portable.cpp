// Vectors of 16 bytes, as SSE2 and NEON have them.
#include <type_traits>
#include <utility>

#include "kernels.h"
#define ISA portable
#define LANES 4
#include "isa.h"
