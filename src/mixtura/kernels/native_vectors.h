/* Vectors of the compiler's own kind, which become those of the machine. */

#include <stdint.h>

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8 /* two registers on NEON */
#endif

typedef float vec_t __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t mask_t __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float oct_t __attribute__((vector_size(32), aligned(4), may_alias));
typedef float quartet_t __attribute__((vector_size(16), aligned(4), may_alias));

/* The numbers at those places of x, then y; the places are a vector of the type that is named. */
#if defined(__clang__) || __GNUC__ >= 12
#define MIX(places_t, x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
typedef int32_t eight_places_t __attribute__((vector_size(32)));
typedef int32_t four_places_t __attribute__((vector_size(16)));
#define MIX(places_t, x, y, ...) __builtin_shuffle(x, y, (places_t){__VA_ARGS__})
#endif
