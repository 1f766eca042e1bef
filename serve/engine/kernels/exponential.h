// The exponential of 16 numbers at once.

#ifndef EXPONENTIAL_H
#define EXPONENTIAL_H

#include <immintrin.h>

// exp(x): 2 to a whole number times a polynomial of the rest, off by less than 3e-6 of the result.
static inline __m512 exponential(__m512 x) {
  // The constant first: of a NaN and a number the instruction returns the second, and a NaN must stay one.
  const __m512 y = _mm512_max_ps(_mm512_set1_ps(-150.0f), _mm512_mul_ps(x, _mm512_set1_ps(1.442695041f)));
  const __m512 n = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), f = _mm512_sub_ps(y, n);
  __m512 p = _mm512_set1_ps(1.33335581e-3f); // Taylor's series of 2^f
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.61812911e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.55041087e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.40226507e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.93147181e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

#endif
