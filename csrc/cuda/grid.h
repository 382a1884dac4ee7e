// Blocks of threads that share memory: on a GPU as CUDA runs them; compiled by a C++ compiler, by plain loops, so that everything in this
// folder is tested where there is no GPU. A kernel is a struct of pointers and sizes:
//
//     struct Doubled {
//       static constexpr int THREADS = 256;                    // of a block, at most
//       const float* x; float* y; int64_t n;
//       DEVICE void operator()(const Block& block) const {
//         block.each([&](int thread) {                         // what each thread does, and then a barrier
//           const int64_t i = block.index * THREADS + thread;
//           if (i < n) y[i] = 2 * x[i];
//         });
//       }
//     };
//     launch(Doubled{x, y, n}, parts(n, 256), 256, 0, stream);   // 0, or the number of an error
//
// What a thread keeps from one `each` to the next stands in a Local, what the block shares in block.memory. Outside of `each` all threads of a
// block take the same way. No thread may count on another one of the same `each`: the tests run them in two orders.
#pragma once

#include <cstdint>

#ifdef __CUDACC__

#include <cuda_runtime.h>

#define DEVICE __device__ __forceinline__
#define ANYWHERE __host__ __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define RESTRICT __restrict__

namespace {

struct Block {
  int64_t index;
  char* shared;
  template <class F> DEVICE void each(F f) const {
    f(int(threadIdx.x));
    __syncthreads();
  }
  DEVICE int threads() const { return int(blockDim.x); }
  template <class T> DEVICE T* memory(int64_t byte = 0) const { return reinterpret_cast<T*>(shared + byte); }
};

template <class T> struct Local {
  T value;
  DEVICE explicit Local(const Block&) {}
  DEVICE T& operator[](int) { return value; }
};

template <class Kernel> __global__ void __launch_bounds__(Kernel::THREADS) run(const Kernel kernel) {
  extern __shared__ __align__(16) char shared[];
  kernel(Block{int64_t(blockIdx.x), shared});
}

template <class Kernel> int64_t launch(const Kernel& kernel, int64_t blocks, int threads, int64_t shared_bytes, int64_t stream) {
  if (!blocks) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (shared_bytes > 48 << 10) {  // more has to be asked for
    const cudaError_t refused = cudaFuncSetAttribute(run<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (refused) {
      cudaGetLastError();  // or a later call would report it
      return refused;
    }
  }
  run<<<unsigned(blocks), threads, shared_bytes, reinterpret_cast<cudaStream_t>(stream)>>>(kernel);
  return cudaGetLastError();
}

}  // namespace

#else  // the same on the host: one block after the other, in each of its parts one thread after the other

#include <cstring>
#include <vector>

#define DEVICE inline
#define ANYWHERE inline
#define UNROLL
#define RESTRICT __restrict__

extern "C" int64_t backwards;  // the order of blocks and of threads; library.cu has it

namespace {

constexpr int64_t INVALID = 1, GUARD = 64;  // bytes behind the shared memory that nobody may write

struct Block {
  int64_t index;
  char* shared;
  int count;
  template <class F> void each(F f) const {
    for (int i = 0; i < count; i++) f(backwards ? count - 1 - i : i);
  }
  int threads() const { return count; }
  template <class T> T* memory(int64_t byte = 0) const { return reinterpret_cast<T*>(shared + byte); }
};

template <class T> struct Local {
  std::vector<T> values;
  explicit Local(const Block& block) : values(block.count) { std::memset(static_cast<void*>(values.data()), 0xff, values.size() * sizeof(T)); }
  T& operator[](int thread) { return values[thread]; }
};

template <class Kernel> int64_t launch(const Kernel& kernel, int64_t blocks, int threads, int64_t shared_bytes, int64_t) {
  if (threads < 1 || threads > Kernel::THREADS || shared_bytes > 163 << 10) return blocks ? INVALID : 0;
  std::vector<double> shared((shared_bytes + GUARD + 7) / 8);
  char* const start = reinterpret_cast<char*>(shared.data());
  for (int64_t i = 0; i < blocks; i++) {
    std::memset(start, 0xff, shared_bytes + GUARD);  // not a number
    kernel(Block{backwards ? blocks - 1 - i : i, start, threads});
    for (int64_t k = 0; k < GUARD; k++)
      if (start[shared_bytes + k] != char(0xff)) return INVALID;
  }
  return 0;
}

}  // namespace

#endif

namespace {

ANYWHERE int64_t parts(int64_t whole, int64_t size) { return (whole + size - 1) / size; }
template <class N> ANYWHERE N smaller(N a, N b) { return b < a ? b : a; }
template <class N> ANYWHERE N larger(N a, N b) { return a < b ? b : a; }

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))
