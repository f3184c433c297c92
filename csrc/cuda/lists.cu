// Dot product, norms and scaled addition over lists of tensors: a block for each chunk, a launch for each kBatch chunks.
#include "launch.cuh"

namespace torchflat {
namespace {

constexpr int64_t kChunk = 65536;
constexpr int64_t kBatch = 120;  // chunks travel as a kernel argument, which may be 4 KB

struct Batch {
  Chunk chunks[kBatch];
};

constexpr int64_t kTensors = 960;

struct Starts {
  int32_t chunk[kTensors + 1];
};

__global__ void dot_batch(Batch batch, Sum* partial) {
  __shared__ Sum shared[kWarps];
  const Chunk& chunk = batch.chunks[blockIdx.x];
  double sum = 0.0;
  visit(chunk.left_kind, [&](auto left) {
    visit(chunk.right_kind, [&](auto right) {
      const auto* a = static_cast<const decltype(left)*>(chunk.left);
      const auto* b = static_cast<const decltype(right)*>(chunk.right);
      for (int32_t index = threadIdx.x; index < chunk.count; index += kThreads) {
        multiply_add<1>(&sum, a + index, b + index);
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
Tensor chunk_dots(const Chunks& chunks, const Tensor& first, cudaStream_t stream) {
  Tensor sums = sums_like(first, static_cast<int64_t>(chunks.list.size()));
  auto* partial = static_cast<Sum*>(sums.mutable_data_ptr());
  for_each_batch(chunks, [&](const Batch& batch, int64_t start, unsigned blocks) {
    dot_batch<<<blocks, kThreads, 0, stream>>>(batch, partial + start);
  });
  return sums;
}

Tensor dot(const std::vector<Tensor>& a, const std::vector<Tensor>& b) {
  const Chunks chunks = checked_chunks(a, b, kChunk, false, "dot");
  const torch::stable::accelerator::DeviceGuard guard(a[0].get_device_index());
  const cudaStream_t stream = current_stream(a[0]);
  const Tensor sums = chunk_dots(chunks, a[0], stream);
  const auto* partial = static_cast<const Sum*>(sums.const_data_ptr());
  const int64_t count = static_cast<int64_t>(chunks.list.size());
  Tensor result = torch::stable::new_empty(a[0], {}, torch::headeronly::ScalarType::Double);
  collect<<<1, kThreads, 0, stream>>>(partial, count, 1, false, static_cast<double*>(result.mutable_data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

Tensor norms(const std::vector<Tensor>& a) {
  const Chunks chunks = checked_chunks(a, a, kChunk, false, "norms");
  const torch::stable::accelerator::DeviceGuard guard(a[0].get_device_index());
  const cudaStream_t stream = current_stream(a[0]);
  const Tensor sums = chunk_dots(chunks, a[0], stream);
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

void blend_all(Chunks chunks, const Tensor& first, const Factors& factors, double alpha) {
  const torch::stable::accelerator::DeviceGuard guard(first.get_device_index());
  const cudaStream_t stream = current_stream(first);
  for_each_batch(chunks, [&](const Batch& batch, int64_t, unsigned blocks) {
    blend_batch<<<blocks, kThreads, 0, stream>>>(batch, factors, alpha);
  });
  chunks.finish();
}

void axpy_(const std::vector<Tensor>& y, const std::vector<Tensor>& x, double alpha) {
  blend_all(checked_chunks(y, x, kChunk, true, "axpy_"), y[0], {nullptr, nullptr, true}, alpha);
}

void axpby_(
    const std::vector<Tensor>& y, const std::vector<Tensor>& x, const Tensor& alpha, const Tensor& beta) {
  Chunks chunks = checked_chunks(y, x, kChunk, true, "axpby_");
  blend_all(std::move(chunks), y[0], checked_factors(alpha, beta, y[0], static_cast<int64_t>(y.size())), 0.0);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchflat, CUDA, library) {
  library.impl("dot", TORCH_BOX(&dot));
  library.impl("norms", TORCH_BOX(&norms));
  library.impl("axpy_", TORCH_BOX(&axpy_));
  library.impl("axpby_", TORCH_BOX(&axpby_));
}

}  // namespace torchflat
