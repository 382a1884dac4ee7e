// What the Python side must know of a library: how wide its vectors are, to lay out its buffers, and what it was made of.
#include "simd.h"

#ifndef LAB_SOURCES  // compiled by hand
#define LAB_SOURCES "unknown"
#endif
#ifdef _OPENMP
#define THREADS "OpenMP"
#else
#define THREADS "one thread"
#endif

// Numbers of so many bytes in a vector.
EXPORT int64_t width(int64_t bytes) { return VECTOR_BYTES / bytes; }

// digest of csrc|compiler|threads
EXPORT const char* made_of() {
#ifdef __clang__
  return LAB_SOURCES "|" __VERSION__ "|" THREADS;
#else
  return LAB_SOURCES "|g++ " __VERSION__ "|" THREADS;
#endif
}
