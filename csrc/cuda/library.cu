// What the Python side must know of the library.
#include "grid.h"

#ifndef LAB_SOURCES  // compiled by hand
#define LAB_SOURCES "unknown"
#endif
#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)
#ifdef __CUDACC__
#define COMPILER "nvcc " TEXT(__CUDACC_VER_MAJOR__) "." TEXT(__CUDACC_VER_MINOR__)
#else
#define COMPILER "for the host"
#endif
#ifndef LAB_ARCHITECTURES
#define LAB_ARCHITECTURES "no GPU"
#endif

// Numbers of so many bytes in a vector, in which buffers are laid out: a thread has no vectors.
EXPORT int64_t width(int64_t) { return 1; }

// digest of csrc|compiler|GPUs
EXPORT const char* made_of() { return LAB_SOURCES "|" COMPILER "|" LAB_ARCHITECTURES; }

#ifdef __CUDACC__
EXPORT const char* error_text(int64_t error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

// The CUDA version of a driver that is too old for this library, such as 12040; 0 of another one, and where there is none.
EXPORT int64_t old_driver() {
  int version = 0;
  cudaDriverGetVersion(&version);
  return version / 1000 < CUDART_VERSION / 1000 ? version : 0;
}
#else
EXPORT const char* error_text(int64_t) { return "refused by csrc/cuda/grid.h"; }
EXPORT int64_t old_driver() { return 0; }
extern "C" {
int64_t backwards = 0;
}
#endif
