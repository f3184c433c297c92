// What the kernels accept, read through the stable ABI: checks, element types, pointers.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <cstdint>
#include <deque>
#include <string>
#include <utility>
#include <vector>

#include "arithmetic.h"

namespace torchflat {

using torch::stable::Tensor;

enum class Kind : int32_t { float64, float32, bfloat16, float16 };

inline Kind kind_of(const Tensor& tensor) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  if (dtype == aoti_torch_dtype_float32()) return Kind::float32;
  if (dtype == aoti_torch_dtype_float64()) return Kind::float64;
  if (dtype == aoti_torch_dtype_bfloat16()) return Kind::bfloat16;
  STD_TORCH_CHECK(
      dtype == aoti_torch_dtype_float16(), "torchflat.ops: tensors must be floating point: use .double() or .float()");
  return Kind::float16;
}

// Call `function` with a value of the element type that `kind` names.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable  // `function` is a host or a device function, as the caller is
#endif
template <class Function>
TORCHFLAT_INLINE void visit(Kind kind, Function&& function) {
  switch (kind) {
    case Kind::float64: return function(double{});
    case Kind::float32: return function(float{});
    case Kind::bfloat16: return function(c10::BFloat16{});
    case Kind::float16: return function(c10::Half{});
  }
}

inline std::string shape_of(const Tensor& tensor) {
  std::string text = "(";
  for (const int64_t size : tensor.sizes()) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + (tensor.dim() == 1 ? ",)" : ")");
}

struct Basis {
  const void* data;
  Kind kind;
  int64_t rows;
  int64_t columns;
  int64_t stride;  // elements from one row to the next
};

inline Basis checked_basis(const Tensor& basis, const Tensor& vector) {
  STD_TORCH_CHECK(
      basis.dim() == 2 && vector.dim() == 1 && basis.size(1) == vector.size(0),
      "orthogonalize_: basis must be (k, n) and vector (n,), got ", shape_of(basis), " and ", shape_of(vector));
  STD_TORCH_CHECK(
      kind_of(vector) == Kind::float64,
      "orthogonalize_: vector must be float64: use vector.double()");
  STD_TORCH_CHECK(
      (basis.size(0) == 0 || basis.size(1) <= 1 || basis.stride(1) == 1) && vector.is_contiguous(),
      "orthogonalize_: the rows of basis and the vector must be contiguous: use .contiguous()");
  STD_TORCH_CHECK(basis.device() == vector.device(), "orthogonalize_: basis and vector are on different devices");
  return {basis.const_data_ptr(), kind_of(basis), basis.size(0), basis.size(1), basis.stride(0)};
}

inline int64_t element_size(Kind kind) { return kind == Kind::float64 ? 8 : kind == Kind::float32 ? 4 : 2; }

// A run of elements of one pair of tensors: what one thread (CPU) or block (CUDA) works on at a time.
struct Chunk {
  void* left;
  const void* right;
  int32_t count;
  int32_t pair;
  Kind left_kind;
  Kind right_kind;
};

struct Chunks {
  std::vector<Chunk> list;
  std::vector<int32_t> starts;  // the first chunk of each pair, and after them the number of chunks
  std::deque<Tensor> copies;    // contiguous stand-ins, kept alive as long as the chunks point into them
  std::vector<std::pair<Tensor, Tensor>> written;  // tensors whose stand-ins are written to, and these
  int64_t elements = 0;

  // Cut one more pair, of `count` elements each, into chunks of at most `size`.
  void add(void* left, Kind left_kind, const void* right, Kind right_kind, int64_t count, int64_t size) {
    const auto pair = static_cast<int32_t>(starts.size());
    starts.push_back(static_cast<int32_t>(list.size()));
    for (int64_t start = 0; start < count; start += size) {
      list.push_back(
          {static_cast<char*>(left) + start * element_size(left_kind),
           static_cast<const char*>(right) + start * element_size(right_kind),
           static_cast<int32_t>(std::min(size, count - start)), pair, left_kind, right_kind});
    }
    elements += count;
  }

  // Give the tensors what was written to their stand-ins.
  void finish() {
    for (auto& [tensor, copy] : written) torch::stable::copy_(tensor, copy);
  }
};

// Whether two tensors of one shape lay out their elements in the same order, one after another without gaps, so that
// they may be walked in storage order: true of two contiguous ones, and of two in channels-last order.
inline bool same_order(const int64_t* sizes, const int64_t* a_strides, const int64_t* b_strides, size_t axes) {
  int64_t expected = 1;
  size_t axis = axes;
  for (; axis > 0; --axis) {
    if (sizes[axis - 1] == 1) continue;
    if (a_strides[axis - 1] != b_strides[axis - 1]) return false;
    if (a_strides[axis - 1] != expected) break;
    expected *= sizes[axis - 1];
  }
  if (axis == 0) return true;
  std::vector<std::pair<int64_t, int64_t>> steps;
  for (axis = 0; axis < axes; ++axis) {
    if (sizes[axis] == 1) continue;
    if (a_strides[axis] != b_strides[axis]) return false;
    steps.emplace_back(a_strides[axis], sizes[axis]);
  }
  std::sort(steps.begin(), steps.end());
  expected = 1;
  for (const auto& [stride, size] : steps) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

inline bool overlaps_itself(const Tensor& tensor) {
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) {
    if (tensor.size(axis) > 1 && tensor.stride(axis) == 0) return true;
  }
  return false;
}

// Cut a list of pairs into chunks of at most `size` elements, in order. With `write`, the left tensors are written to:
// call finish() afterwards.
inline Chunks checked_chunks(
    const std::vector<Tensor>& left, const std::vector<Tensor>& right, int64_t size, bool write, const char* name) {
  STD_TORCH_CHECK(
      left.size() == right.size() && !left.empty(), name, ": the lists must have the same length, at least 1, got ",
      left.size(), " and ", right.size());
  Chunks chunks;
  chunks.list.reserve(left.size());
  const auto device = left[0].device();
  for (size_t index = 0; index < left.size(); ++index) {
    const Tensor *a = &left[index], *b = &right[index];
    const auto a_sizes = a->sizes(), b_sizes = b->sizes();
    STD_TORCH_CHECK(
        a_sizes.size() == b_sizes.size() && std::equal(a_sizes.begin(), a_sizes.end(), b_sizes.begin()), name,
        ": pair ", index, " has different shapes, ", shape_of(*a), " and ", shape_of(*b));
    STD_TORCH_CHECK(a->device() == device && b->device() == device, name, ": pair ", index, " is on another device");
    const bool a_contiguous = a->is_contiguous(), b_contiguous = b->is_contiguous();
    const auto same = [&] {
      return same_order(a_sizes.data(), a->strides().data(), b->strides().data(), a_sizes.size());
    };
    if (!(a_contiguous && b_contiguous) && !same()) {
      // Before anything is written: copying back into it would fail when the others have changed.
      STD_TORCH_CHECK(
          !write || !overlaps_itself(*a), name, ": tensor ", index, " is expanded, so that its elements share memory");
      if (!a_contiguous) a = &chunks.copies.emplace_back(torch::stable::contiguous(*a));
      if (!a_contiguous && write) chunks.written.emplace_back(left[index], *a);
      if (!b_contiguous) b = &chunks.copies.emplace_back(torch::stable::contiguous(*b));
    }
    void* a_data = write ? a->mutable_data_ptr() : const_cast<void*>(a->const_data_ptr());
    chunks.add(a_data, kind_of(*a), b->const_data_ptr(), kind_of(*b), a->numel(), size);
  }
  chunks.starts.push_back(static_cast<int32_t>(chunks.list.size()));
  return chunks;
}

// The factors of y <- beta * y + alpha * x, as the kernels read them: where they are.
struct Factors {
  const double* alpha;
  const double* beta;
  bool shared;  // one alpha for all pairs

  TORCHFLAT_INLINE double alpha_of(int32_t pair) const { return alpha[shared ? 0 : pair]; }
};

inline Factors checked_factors(
    const Tensor& alpha, const Tensor& beta, const Tensor& first, int64_t alphas, const char* name) {
  const auto check = [&](const Tensor& factor, const char* which, int64_t longest) {
    STD_TORCH_CHECK(
        factor.dim() == 1 && (factor.size(0) == 1 || factor.size(0) == longest) && kind_of(factor) == Kind::float64 &&
            factor.device() == first.device() && factor.is_contiguous(),
        name, ": ", which, " must be contiguous float64 of length 1", longest > 1 ? " or " + std::to_string(longest) : "",
        " on the device of the tensors, got ", shape_of(factor));
  };
  check(alpha, "alpha", alphas);
  check(beta, "beta", 1);
  const auto* alpha_data = static_cast<const double*>(alpha.const_data_ptr());
  return {alpha_data, static_cast<const double*>(beta.const_data_ptr()), alpha.size(0) == 1};
}

}  // namespace torchflat
