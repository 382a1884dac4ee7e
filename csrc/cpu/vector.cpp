// What the Python side must know of the vectors to lay out its buffers.
#include "simd.h"

EXPORT int64_t vector_bytes() { return VECTOR_BYTES; }
