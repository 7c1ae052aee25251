#include "kernels.h"

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>

namespace deft {

const Kernels& kernels() {
  const char* asked = std::getenv("DEFT_KERNELS_ISA");
  const std::string name = asked ? asked : "";
#if defined(__x86_64__)
  static const bool has512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const bool has2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (has512 && (name.empty() || name == "avx512")) return avx512::table;
  if (has2 && (name.empty() || name == "avx2")) return avx2::table;
#endif
  STD_TORCH_CHECK(name.empty() || name == "portable", "DEFT_KERNELS_ISA=", name,
                  ": expected avx512, avx2 or portable, and a processor that has it");
  return portable::table;
}

}  // namespace deft
