// Dot product, norms and scaled addition over lists of tensors: a block for each chunk, a launch for each kBatch chunks.
#include "launch.cuh"

namespace torchflat {
namespace {

constexpr int64_t kChunk = 65536;
constexpr int64_t kBatch = 120;  // chunks travel as a kernel argument, which may be 4 KB

struct Batch {
  Chunk chunks[kBatch];
};

constexpr int64_t kTensors = 960;  // likewise

struct Starts {
  int32_t chunk[kTensors + 1];
};

// Of left and right, or of right with itself.
template <bool Squares>
__global__ void dot_batch(Batch batch, Sum* partial) {
  __shared__ Sum shared[kWarps];
  const Chunk& chunk = batch.chunks[blockIdx.x];
  double sum = 0.0;
  visit(chunk.left_kind, [&](auto left) {
    visit(chunk.right_kind, [&](auto right) {
      const auto* b = static_cast<const decltype(right)*>(chunk.right);
      for (int32_t index = threadIdx.x; index < chunk.count; index += kThreads) {
        if constexpr (Squares) {
          square_add<1>(&sum, b + index);
        } else {
          multiply_add<1>(&sum, static_cast<const decltype(left)*>(chunk.left) + index, b + index);
        }
      }
    });
  });
  sum = warp_sum(sum);
  if (threadIdx.x % kWarpSize == 0) shared[threadIdx.x / kWarpSize] = Sum{sum, 0.0};
  __syncthreads();
  if (threadIdx.x > 0) return;
  Sum total{};
  for (int warp = 0; warp < kWarps; ++warp) total.add(shared[warp]);
  partial[blockIdx.x] = total;
}

__global__ void blend_batch(Batch batch, Factors factors, double given) {
  const Chunk& chunk = batch.chunks[blockIdx.x];
  const double alpha = factors.alpha ? factors.alpha_of(chunk.pair) : given;
  const double beta = factors.beta ? *factors.beta : 1.0;
  visit(chunk.left_kind, [&](auto left) {
    visit(chunk.right_kind, [&](auto right) {
      auto* y = static_cast<decltype(left)*>(chunk.left);
      const auto* x = static_cast<const decltype(right)*>(chunk.right);
      for (int32_t index = threadIdx.x; index < chunk.count; index += kThreads) {
        y[index] = alpha != 0 ? blend(y[index], x[index], alpha, beta) : narrow<decltype(left)>(beta * widen(y[index]));
      }
    });
  });
}

// out[tensor] = the root of the sum of partial[i] over the chunks i of the tensor, one block for each.
__global__ void collect_norms(Starts starts, const Sum* partial, double* out) {
  __shared__ Sum shared[kThreads];
  Sum sum{};
  for (int32_t i = starts.chunk[blockIdx.x] + threadIdx.x; i < starts.chunk[blockIdx.x + 1]; i += kThreads) {
    sum.add(partial[i]);
  }
  const Sum total = block_sum(sum, shared);
  if (threadIdx.x == 0) out[blockIdx.x] = sqrt(total.value());
}

// The factors of y <- beta * y + alpha * x / norm, after one another.
__global__ void normalize_factors(Factors factors, const double* norm, double* normalized) {
  normalized[0] = normalized_alpha(*factors.alpha, *norm);
  normalized[1] = normalized_beta(*factors.beta, *norm);
}

// Call `launch(batch, start, count)` for each batch of chunks.
template <class Launch>
void for_each_batch(const Chunks& chunks, const Launch& launch) {
  const int64_t total = static_cast<int64_t>(chunks.list.size());
  for (int64_t start = 0; start < total; start += kBatch) {
    Batch batch{};
    const int64_t count = std::min(kBatch, total - start);
    std::copy_n(chunks.list.begin() + start, count, batch.chunks);
    launch(batch, start, static_cast<unsigned>(count));
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// Room for the dot product of each chunk, which `dot_batch` writes.
template <bool Squares>
Tensor chunk_dots(const Chunks& chunks, const Tensor& first, cudaStream_t stream) {
  Tensor sums = sums_like(first, static_cast<int64_t>(chunks.list.size()));
  auto* partial = static_cast<Sum*>(sums.mutable_data_ptr());
  for_each_batch(chunks, [&](const Batch& batch, int64_t start, unsigned blocks) {
    dot_batch<Squares><<<blocks, kThreads, 0, stream>>>(batch, partial + start);
  });
  return sums;
}

// The sum of all of these, or with `root` its square root, a 0-dim tensor.
template <bool Squares>
Tensor collected_dots(const Chunks& chunks, const Tensor& first, bool root, cudaStream_t stream) {
  const Tensor sums = chunk_dots<Squares>(chunks, first, stream);
  const auto* partial = static_cast<const Sum*>(sums.const_data_ptr());
  const int64_t count = static_cast<int64_t>(chunks.list.size());
  Tensor result = torch::stable::new_empty(first, {}, torch::headeronly::ScalarType::Double);
  collect<<<1, kThreads, 0, stream>>>(partial, count, 1, root, static_cast<double*>(result.mutable_data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

Tensor dot(const std::vector<Tensor>& a, const std::vector<Tensor>& b) {
  const Chunks chunks = checked_chunks(a, b, kChunk, false, "dot");
  const torch::stable::accelerator::DeviceGuard guard(a[0].get_device_index());
  return collected_dots<false>(chunks, a[0], false, current_stream(a[0]));
}

Tensor norms(const std::vector<Tensor>& a) {
  const Chunks chunks = checked_chunks(a, a, kChunk, false, "norms");
  const torch::stable::accelerator::DeviceGuard guard(a[0].get_device_index());
  const cudaStream_t stream = current_stream(a[0]);
  const Tensor sums = chunk_dots<true>(chunks, a[0], stream);
  const auto* partial = static_cast<const Sum*>(sums.const_data_ptr());
  const int64_t tensors = static_cast<int64_t>(a.size());
  Tensor result = torch::stable::new_empty(a[0], {tensors}, torch::headeronly::ScalarType::Double);
  auto* out = static_cast<double*>(result.mutable_data_ptr());
  for (int64_t first = 0; first < tensors; first += kTensors) {
    Starts starts{};
    const int64_t count = std::min(kTensors, tensors - first);
    std::copy_n(chunks.starts.begin() + first, count + 1, starts.chunk);
    collect_norms<<<static_cast<unsigned>(count), kThreads, 0, stream>>>(starts, partial, out + first);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

void blend_all(Chunks& chunks, const Factors& factors, double alpha, cudaStream_t stream) {
  for_each_batch(chunks, [&](const Batch& batch, int64_t, unsigned blocks) {
    blend_batch<<<blocks, kThreads, 0, stream>>>(batch, factors, alpha);
  });
  chunks.finish();
}

void axpy_(const std::vector<Tensor>& y, const std::vector<Tensor>& x, double alpha) {
  Chunks chunks = checked_chunks(y, x, kChunk, true, "axpy_");
  const torch::stable::accelerator::DeviceGuard guard(y[0].get_device_index());
  blend_all(chunks, {nullptr, nullptr, true}, alpha, current_stream(y[0]));
}

void axpby_(
    const std::vector<Tensor>& y, const std::vector<Tensor>& x, const Tensor& alpha, const Tensor& beta) {
  Chunks chunks = checked_chunks(y, x, kChunk, true, "axpby_");
  const Factors factors = checked_factors(alpha, beta, y[0], static_cast<int64_t>(y.size()), "axpby_");
  const torch::stable::accelerator::DeviceGuard guard(y[0].get_device_index());
  blend_all(chunks, factors, 0.0, current_stream(y[0]));
}

Tensor normalized_axpby_(
    const std::vector<Tensor>& y, const std::vector<Tensor>& x, const Tensor& alpha, const Tensor& beta) {
  Chunks chunks = checked_chunks(y, x, kChunk, true, "normalized_axpby_");
  const Factors factors = checked_factors(alpha, beta, y[0], 1, "normalized_axpby_");
  const torch::stable::accelerator::DeviceGuard guard(y[0].get_device_index());
  const cudaStream_t stream = current_stream(y[0]);
  const Tensor norm = collected_dots<true>(chunks, y[0], true, stream);
  Tensor both = torch::stable::new_empty(y[0], {2}, torch::headeronly::ScalarType::Double);
  auto* normalized = static_cast<double*>(both.mutable_data_ptr());
  normalize_factors<<<1, 1, 0, stream>>>(factors, static_cast<const double*>(norm.const_data_ptr()), normalized);
  blend_all(chunks, {normalized, normalized + 1, true}, 0.0, stream);
  return norm;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchflat, CUDA, library) {
  library.impl("dot", TORCH_BOX(&dot));
  library.impl("norms", TORCH_BOX(&norms));
  library.impl("axpy_", TORCH_BOX(&axpy_));
  library.impl("axpby_", TORCH_BOX(&axpby_));
  library.impl("normalized_axpby_", TORCH_BOX(&normalized_axpby_));
}

}  // namespace torchflat
