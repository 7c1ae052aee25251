// The border of every native operation: what a caller passes, checked, by the names of the schema.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

namespace deft {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using OptionalTensors = std::vector<std::optional<Tensor>>;

struct Argument {  // "merge: W[3]", or "lowrank_linear: x" where it is no member of a list
  const char *op, *name;
  int64_t index = -1;

  std::string entry() const {
    std::string s = name;
    if (index >= 0) s.append("[").append(std::to_string(index)).append("]");
    return s;
  }
  std::string text() const { return std::string(op).append(": ").append(entry()); }
};

inline std::string shape(const Tensor& t) {
  std::string s = "(";
  for (int64_t d = 0; d < t.dim(); ++d) s.append(d ? ", " : "").append(std::to_string(t.size(d)));
  return s.append(")");
}

// A view of a matrix whose rows are contiguous, `ld` elements apart.
struct Matrix {
  void* data;
  int64_t rows, columns, ld;
  int64_t size;  // bytes of an element

  template <class T> T* as() const { return static_cast<T*>(data); }
  const char* begin() const { return static_cast<const char*>(data); }
  const char* end() const { return rows && columns ? begin() + ((rows - 1) * ld + columns) * size : begin(); }
};

enum class Rows { apart, contiguous };

template <class Where>  // whether a tensor is where the operation runs
Matrix matrix(const Tensor& t, Argument arg, ScalarType type, int64_t bytes, Rows layout, Where here, const char* place) {
  STD_TORCH_CHECK(here(t), arg.text(), " is not on ", place);
  STD_TORCH_CHECK(t.dim() == 2, arg.text(), " has shape ", shape(t), ", expected a matrix");
  STD_TORCH_CHECK(t.scalar_type() == type, arg.text(), " has another dtype than this operation takes there");
  const int64_t rows = t.size(0), columns = t.size(1);
  if (rows == 0 || columns == 0) return {t.data_ptr(), rows, columns, columns, bytes};  // whatever its strides
  STD_TORCH_CHECK(columns <= 1 || t.stride(1) == 1, arg.text(), " has rows that are not contiguous: stride ", t.stride(1));
  const int64_t ld = rows <= 1 ? columns : t.stride(0);
  STD_TORCH_CHECK(layout == Rows::apart || ld == columns, arg.text(), " is not contiguous: its rows are ", ld, " elements apart");
  return {t.data_ptr(), rows, columns, ld, bytes};
}

inline Matrix matrix(const Tensor& t, Argument arg, ScalarType type = ScalarType::Float, Rows layout = Rows::contiguous) {
  return matrix(t, arg, type, type == ScalarType::Float ? 4 : 2, layout, [](const Tensor& t) { return t.is_cpu(); }, "the CPU");
}

inline void check_shape(const Matrix& got, Argument arg, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(got.rows == rows && got.columns == columns, arg.text(), " has shape (", got.rows, ", ", got.columns,
                  "), expected (", rows, ", ", columns, ")");
}

template <class List>
void check_length(const List& list, const char* op, const char* name, size_t layers) {
  STD_TORCH_CHECK(list.size() == layers, op, ": ", name, " has ", list.size(), " entries, expected ", layers);
}

// float32 scales, one per layer
inline const float* scales(const Tensor& t, Argument arg, size_t layers) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 1 && t.scalar_type() == ScalarType::Float && t.is_contiguous() &&
                      size_t(t.size(0)) == layers,
                  arg.text(), " is not a contiguous float32 vector on the CPU of ", layers, " entries: shape ", shape(t));
  return static_cast<const float*>(t.data_ptr());
}

// Memory that is written to: nothing else may lie in it, except what the operation allows to be the very same matrix.
class Writes {
 public:
  void add(const Matrix& m, Argument arg) {
    STD_TORCH_CHECK(m.rows <= 1 || m.ld >= m.columns, arg.text(), " has rows that overlap: it cannot be written to");
    if (m.begin() != m.end()) written_.push_back({m, arg});
  }
  void done() {
    std::sort(written_.begin(), written_.end(), [](const Entry& a, const Entry& b) { return a.m.begin() < b.m.begin(); });
    for (size_t i = 0; i < written_.size(); ++i) {
      furthest_.push_back(std::max(i ? furthest_[i - 1] : nullptr, written_[i].m.end()));
      for (size_t j = i; j-- > 0 && furthest_[j] > written_[i].m.begin();) reject(written_[i], written_[j].m, written_[j].arg);
    }
  }
  // A matrix that is read; `same`: the argument of which it may be the very matrix.
  void check(const Matrix& m, Argument arg, const Matrix* same = nullptr) const {
    if (m.begin() == m.end()) return;
    auto after = std::lower_bound(written_.begin(), written_.end(), m.end(),
                                  [](const Entry& e, const char* end) { return e.m.begin() < end; });
    for (size_t j = after - written_.begin(); j-- > 0 && furthest_[j] > m.begin();) {
      const Matrix& w = written_[j].m;
      if (same && w.data == same->data && m.data == w.data && m.rows == w.rows && m.columns == w.columns && m.ld == w.ld) continue;
      reject(written_[j], m, arg);
    }
  }

 private:
  struct Entry { Matrix m; Argument arg; };

  static void reject(const Entry& e, const Matrix& m, Argument arg) {
    const Matrix& w = e.m;
    if (w.end() <= m.begin() || m.end() <= w.begin()) return;
    if (w.ld == m.ld && w.size == m.size && w.ld > 0) {  // columns of one wide matrix, side by side
      const int64_t apart = ((m.begin() - w.begin()) % (w.ld * w.size) + w.ld * w.size) % (w.ld * w.size);
      if (apart >= w.columns * w.size && apart + m.columns * m.size <= w.ld * w.size) return;
    }
    STD_TORCH_CHECK(false, e.arg.text(), " shares memory with ", arg.entry());
  }

  std::vector<Entry> written_;
  std::vector<const char*> furthest_;  // the end of all memory up to an entry
};

}  // namespace deft
