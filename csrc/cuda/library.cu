// What the Python side must know of the library.
#include "grid.h"

#ifndef LAB_SOURCES  // compiled by hand
#define LAB_SOURCES "unknown"
#endif
#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)

// Channels side by side in a buffer whose layout is the kernel's own, for numbers of so many bytes: a thread has one.
EXPORT int64_t width(int64_t) { return 1; }

#ifdef __CUDACC__
EXPORT const char* error_text(int64_t error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

// digest of csrc|compiler|what for
EXPORT const char* made_of() { return LAB_SOURCES "|nvcc " TEXT(__CUDACC_VER_MAJOR__) "." TEXT(__CUDACC_VER_MINOR__) "|" LAB_ARCHITECTURES; }
#else
extern "C" {
int64_t backwards = 0;
}
#endif
