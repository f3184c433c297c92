// Dot product and scaled addition over two lists of tensors, in one call for the whole list.
#include <torch/csrc/stable/library.h>

#include "../arguments.h"
#include "vectorized.h"

namespace torchflat {
namespace {

constexpr int kLanes = 32;
constexpr int64_t kChunk = 16384;
constexpr int64_t kSerialElements = 65536;  // below this, waking threads costs more than it saves

template <class A, class B>
TORCHFLAT_VECTORIZED double dot_chunk(const A* a, const B* b, int64_t count) {
  double sums[kLanes] = {};
  int64_t index = 0;
  for (; index + kLanes <= count; index += kLanes) multiply_add<kLanes>(sums, a + index, b + index);
  for (; index < count; ++index) multiply_add<1>(sums, a + index, b + index);
  return pairwise_sum<kLanes>(sums);
}

template <class Y, class X>
TORCHFLAT_VECTORIZED void add_chunk(Y* y, const X* x, int64_t count, double alpha) {
  for (int64_t index = 0; index < count; ++index) y[index] = add_scaled(y[index], x[index], alpha);
}

// Call `work(chunk, left, right, index)` on every chunk, with typed pointers, on as many threads as pay.
template <class Work>
void for_each_chunk(const Chunks& chunks, const Work& work) {
  const int64_t count = static_cast<int64_t>(chunks.list.size());
  const int64_t grain = chunks.elements < kSerialElements ? std::max<int64_t>(count, 1) : 1;
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const Chunk& chunk = chunks.list[index];
      visit(chunk.left_kind, [&](auto left) {
        visit(chunk.right_kind, [&](auto right) {
          work(static_cast<decltype(left)*>(chunk.left), static_cast<const decltype(right)*>(chunk.right), chunk.count,
               index);
        });
      });
    }
  });
}

Tensor dot(const std::vector<Tensor>& a, const std::vector<Tensor>& b) {
  const Chunks chunks = checked_chunks(a, b, kChunk, false, "dot");
  std::vector<double> partial(chunks.list.size());
  for_each_chunk(chunks, [&](const auto* left, const auto* right, int64_t count, int64_t index) {
    partial[index] = dot_chunk(left, right, count);
  });
  Sum total{};
  for (const double part : partial) total.add(part);
  return torch::stable::full({}, total.value(), torch::headeronly::ScalarType::Double);
}

void axpy_(const std::vector<Tensor>& y, const std::vector<Tensor>& x, double alpha) {
  const Chunks chunks = checked_chunks(y, x, kChunk, true, "axpy_");
  for_each_chunk(chunks, [&](auto* left, const auto* right, int64_t count, int64_t) {
    add_chunk(left, right, count, alpha);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchflat, CPU, library) {
  library.impl("dot", TORCH_BOX(&dot));
  library.impl("axpy_", TORCH_BOX(&axpy_));
}

}  // namespace torchflat
