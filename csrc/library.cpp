// The native operations. Each writes into memory that its caller has allocated; what is None is left out. deft_kernels/ops
// calls them, gives them autograd, and decides when.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(deft_kernels_native, m) {
  m.def("orthonormalize(Tensor(a!)[] Q, Tensor[] P) -> ()");
  m.def("orthonormalize_backward(Tensor(a!)[] dP, Tensor[] dQ, Tensor[] Q, Tensor[] P) -> ()");
  m.def("project(Tensor(a!)[] A, Tensor?[] K, Tensor[] W, Tensor?[] R, Tensor injection, Tensor removal) -> ()");
  m.def("project_backward(Tensor(a!)?[] dK, Tensor(b!)[] dR, Tensor[] dA, Tensor?[] W, Tensor injection, Tensor removal) -> ()");
  m.def("merge(Tensor(a!)[] out, Tensor[] W, Tensor[] B, Tensor?[] K, Tensor?[] R) -> ()");
  m.def("merge_backward(Tensor(a!)[] dB, Tensor(b!)?[] dK, Tensor(c!)?[] dR, Tensor[] dW, Tensor[] W, Tensor[] B, Tensor?[] K, Tensor?[] R) -> ()");
  m.def("lowrank_linear_forward(Tensor(a!)? y, Tensor(b!) h, Tensor x, Tensor? bias, Tensor B, Tensor A) -> ()");
  m.def("lowrank_linear_backward(Tensor(a!)? dx, Tensor(b!)? dB, Tensor(c!)? dA, Tensor dy, Tensor x, Tensor? h, Tensor B, Tensor A) -> ()");
}
