// The kernels of one instruction set, in its namespace ISA: included by avx512.cpp, avx2.cpp and portable.cpp, which set
// LANES and switch the compiler to the set.

namespace deft {
namespace ISA {

#include "vector.h"

#include "tile.h"

#include "lowrank_linear.h"
#include "merge.h"
#include "orthonormalize.h"
#include "project.h"

template <class T> constexpr TypedKernels<T> typed() { return {merge<T>, merge_scratch<T>, project<T>, project_backward<T>, STRIP<T>}; }

#define NAME_OF(isa) #isa
#define NAME(isa) NAME_OF(isa)
extern const Kernels table;
const Kernels table = {
    NAME(ISA), LANES, typed<float>(), typed<bfloat16>(), typed<float16>(), pack,
    orthonormalize, orthonormalize_scratch, orthonormalize_backward, orthonormalize_backward_scratch,
    lowrank_forward, lowrank_backward, lowrank_backward_scratch};

}  // namespace ISA
}  // namespace deft
