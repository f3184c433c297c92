// Dot product, norms and scaled addition over lists of tensors, in one call for the whole list.
#include <torch/csrc/stable/library.h>

#include "sweeps.h"
#include "vectorized.h"

namespace torchflat {
namespace {

constexpr int64_t kSerialElements = 65536;  // below this, waking threads costs more than it saves

template <class A, class B>
TORCHFLAT_VECTORIZED double dot_chunk(const A* a, const B* b, int64_t count) {
  const bool ahead = is_long<A>(count);
  double sums[kLanes] = {};
  int64_t index = 0;
  for (; index + kLanes <= count; index += kLanes) {
    if (ahead) fetch_ahead(a + index);
    if (ahead) fetch_ahead(b + index);
    multiply_add<kLanes>(sums, a + index, b + index);
  }
  for (; index < count; ++index) multiply_add<1>(sums, a + index, b + index);
  return pairwise_sum<kLanes>(sums);
}

template <class A>
TORCHFLAT_VECTORIZED double square_chunk(const A* a, int64_t count) {
  const bool ahead = is_long<A>(count);
  double sums[kLanes] = {};
  int64_t index = 0;
  for (; index + kLanes <= count; index += kLanes) {
    if (ahead) fetch_ahead(a + index);
    square_add<kLanes>(sums, a + index);
  }
  for (; index < count; ++index) square_add<1>(sums, a + index);
  return pairwise_sum<kLanes>(sums);
}

template <class Y, class X>
TORCHFLAT_VECTORIZED void blend_chunk(Y* y, const X* x, int64_t count, double alpha, double beta) {
  const bool ahead = is_long<Y>(count);
  int64_t index = 0;
  for (; index + kLanes <= count; index += kLanes) {
    if (ahead) fetch_ahead(y + index);
    if (ahead) fetch_ahead(x + index);
    for (int lane = 0; lane < kLanes; ++lane) y[index + lane] = blend(y[index + lane], x[index + lane], alpha, beta);
  }
  for (; index < count; ++index) y[index] = blend(y[index], x[index], alpha, beta);
}

template <class Y>
TORCHFLAT_VECTORIZED void scale_chunk(Y* y, int64_t count, double beta) {
  for (int64_t index = 0; index < count; ++index) y[index] = narrow<Y>(beta * widen(y[index]));
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

std::vector<double> chunk_dots(const Chunks& chunks) {
  std::vector<double> dots(chunks.list.size());
  for_each_chunk(chunks, [&](const auto* left, const auto* right, int64_t count, int64_t index) {
    dots[index] = dot_chunk(left, right, count);
  });
  return dots;
}

// Of the right tensors.
std::vector<double> chunk_squares(const Chunks& chunks) {
  std::vector<double> squares(chunks.list.size());
  for_each_chunk(chunks, [&](const auto*, const auto* right, int64_t count, int64_t index) {
    squares[index] = square_chunk(right, count);
  });
  return squares;
}

double sum(const std::vector<double>& parts, int64_t begin, int64_t end) {
  Sum total{};
  for (int64_t index = begin; index < end; ++index) total.add(parts[index]);
  return total.value();
}

Tensor dot(const std::vector<Tensor>& a, const std::vector<Tensor>& b) {
  const std::vector<double> dots = chunk_dots(checked_chunks(a, b, kChunk, false, "dot"));
  return torch::stable::full({}, sum(dots, 0, dots.size()), torch::headeronly::ScalarType::Double);
}

Tensor norms(const std::vector<Tensor>& a) {
  const Chunks chunks = checked_chunks(a, a, kChunk, false, "norms");
  const std::vector<double> squares = chunk_squares(chunks);
  Tensor result = torch::stable::empty({static_cast<int64_t>(a.size())}, torch::headeronly::ScalarType::Double);
  auto* out = static_cast<double*>(result.mutable_data_ptr());
  for (size_t index = 0; index < a.size(); ++index) {
    out[index] = std::sqrt(sum(squares, chunks.starts[index], chunks.starts[index + 1]));
  }
  return result;
}

void blend_all(Chunks& chunks, const Factors& factors) {
  const double beta = *factors.beta;
  for_each_chunk(chunks, [&](auto* left, const auto* right, int64_t count, int64_t index) {
    const double alpha = factors.alpha_of(chunks.list[index].pair);
    if (alpha != 0) {
      blend_chunk(left, right, count, alpha, beta);
    } else if (beta != 1) {
      scale_chunk(left, count, beta);
    }
  });
  chunks.finish();
}

void axpy_(const std::vector<Tensor>& y, const std::vector<Tensor>& x, double alpha) {
  Chunks chunks = checked_chunks(y, x, kChunk, true, "axpy_");
  const double beta = 1;
  blend_all(chunks, {&alpha, &beta, true});
}

void axpby_(
    const std::vector<Tensor>& y, const std::vector<Tensor>& x, const Tensor& alpha, const Tensor& beta) {
  Chunks chunks = checked_chunks(y, x, kChunk, true, "axpby_");
  blend_all(chunks, checked_factors(alpha, beta, y[0], static_cast<int64_t>(y.size()), "axpby_"));
}

}  // namespace

double normalized_step(Chunks& chunks, double alpha, double beta) {
  const std::vector<double> squares = chunk_squares(chunks);
  const double norm = std::sqrt(sum(squares, 0, squares.size()));
  const double alpha_now = normalized_alpha(alpha, norm), beta_now = normalized_beta(beta, norm);
  blend_all(chunks, {&alpha_now, &beta_now, true});
  return norm;
}

namespace {

Tensor normalized_axpby_(
    const std::vector<Tensor>& y, const std::vector<Tensor>& x, const Tensor& alpha, const Tensor& beta) {
  Chunks chunks = checked_chunks(y, x, kChunk, true, "normalized_axpby_");
  const Factors factors = checked_factors(alpha, beta, y[0], 1, "normalized_axpby_");
  return torch::stable::full(
      {}, normalized_step(chunks, *factors.alpha, *factors.beta), torch::headeronly::ScalarType::Double);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchflat, CPU, library) {
  library.impl("dot", TORCH_BOX(&dot));
  library.impl("norms", TORCH_BOX(&norms));
  library.impl("axpy_", TORCH_BOX(&axpy_));
  library.impl("axpby_", TORCH_BOX(&axpby_));
  library.impl("normalized_axpby_", TORCH_BOX(&normalized_axpby_));
}

}  // namespace torchflat
