// The arithmetic that the CPU and CUDA kernels share. Everything is accumulated in float64, in an order that depends on
// the sizes alone: not on the number of threads, not on which of them comes first.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define TORCHFLAT_INLINE __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define TORCHFLAT_INLINE __forceinline
#else
#define TORCHFLAT_INLINE inline __attribute__((always_inline))
#endif

namespace torchflat {

template <class T>
TORCHFLAT_INLINE double widen(T value) {
  return static_cast<double>(value);
}

template <class T>
TORCHFLAT_INLINE T narrow(double value) {
  return static_cast<T>(value);
}

// A sum that carries its own rounding error (Neumaier), so that the error does not grow with the number of terms.
// No default initialisers, which shared memory could not have: write Sum{}.
struct Sum {
  double high;
  double low;

  TORCHFLAT_INLINE void add(double term) {
    const double next = high + term;
    low += std::fabs(high) >= std::fabs(term) ? (high - next) + term : (term - next) + high;
    high = next;
  }

  TORCHFLAT_INLINE void add(const Sum& other) {
    add(other.high);
    low += other.low;
  }

  // An infinite sum stays infinite: its compensation is NaN and must not be added.
  TORCHFLAT_INLINE double value() const { return std::isfinite(high) ? high + low : high; }
};

// sums[l] += a[l] * b[l], for `Lanes` neighbouring elements.
template <int Lanes, class A, class B>
TORCHFLAT_INLINE void multiply_add(double* sums, const A* a, const B* b) {
  for (int lane = 0; lane < Lanes; ++lane) sums[lane] += widen(a[lane]) * widen(b[lane]);
}

// sums[l] += a[l] * a[l]: the element is widened once, which is what bounds multiply_add of a run with itself.
template <int Lanes, class A>
TORCHFLAT_INLINE void square_add(double* sums, const A* a) {
  for (int lane = 0; lane < Lanes; ++lane) {
    const double value = widen(a[lane]);
    sums[lane] += value * value;
  }
}

// The pairwise sum of `Lanes` (a power of two) partial sums; overwrites them.
template <int Lanes>
TORCHFLAT_INLINE double pairwise_sum(double* sums) {
  for (int half = Lanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  }
  return sums[0];
}

// w - sum_r coefficients[r] * V[r, column], where `column` points at the entry of row 0 and rows are `stride` apart.
template <int Rows, class T>
TORCHFLAT_INLINE double subtract_rows(double w, const T* column, int64_t stride, const double* coefficients) {
  for (int row = 0; row < Rows; ++row) w -= coefficients[row] * widen(column[row * stride]);
  return w;
}

// beta * y + alpha * x, rounded once to the type of y.
template <class Y, class X>
TORCHFLAT_INLINE Y blend(Y y, X x, double alpha, double beta) {
  return narrow<Y>(beta * widen(y) + alpha * widen(x));
}

// The factor of x in y <- beta * y + alpha * x / norm: x stays out if it is 0 or not finite.
TORCHFLAT_INLINE double normalized_alpha(double alpha, double norm) {
  return norm > 0 && std::isfinite(norm) ? alpha / norm : 0.0;
}

// The factor of y: nothing changes if the norm of x is not finite.
TORCHFLAT_INLINE double normalized_beta(double beta, double norm) { return std::isfinite(norm) ? beta : 1.0; }

// Part `index` of `parts` nearly equal parts of [0, count): where it starts. Part `parts` starts at `count`.
TORCHFLAT_INLINE int64_t part_start(int64_t index, int64_t parts, int64_t count) {
  return index * (count / parts) + (index < count % parts ? index : count % parts);
}

}  // namespace torchflat
