// Products of bfloat16 matrices with sums in float32, for x86-64 with AVX-512 BF16.  See docs/decisions/0050.
//
// One instruction multiplies pairs of bfloat16 and adds both products to one of 16 sums.  So the right matrix lies in
// "pairs": a row holds, for each column, two numbers that follow each other along the sum.  Every sum is added up in
// the same order whatever is computed beside it: a row's result has the same bits in a batch as alone.

#ifndef PRODUCTS_H
#define PRODUCTS_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

enum { VECTOR = 16, ROWS = 6, VECTORS = 4 }; // float32 in a register; rows and registers of a product held in registers

// OpenMP's GOMP_parallel, of the library that torch has loaded: two of them in one process would fight for processors.
typedef void Parallel(void (*function)(void *), void *data, unsigned num_threads, unsigned flags);

// Bytes to be read, or as long to be computed with: what takes one thread as long as it takes to wake another.
enum { WORTH_WAKING = 1500000 };

static inline void run_parallel(void (*function)(void *), void *data, Parallel *parallel, int64_t num_threads,
                                int64_t num_bytes) {
  if (parallel && num_threads > 1 && num_bytes > WORTH_WAKING) parallel(function, data, (unsigned)num_threads, 0);
  else function(data);
}

// Of 16 vectors the rows become columns.
static inline void transpose(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

typedef struct {
  const char *begin, *end;
} Memory;

// Ask for the beginning of memory that is read soon, so that it is in the cache by then.
static inline void fetch(Memory *soon, int64_t num_bytes) {
  const int64_t left = soon->end - soon->begin;
  const char *last = soon->begin + (left < num_bytes ? left : num_bytes);
  for (; soon->begin < last; soon->begin += 64) _mm_prefetch(soon->begin, _MM_HINT_T1);
}

// A matrix whose rows are to be columns, in pairs: from[16 * vectors][length] to to[length / 2][to_row].  On the way
// "soon" is fetched, as fast as the matrix itself is read.
static inline void pair_along_rows(const uint16_t *from, int64_t length, int64_t vectors, uint32_t *to, int64_t to_row,
                                   Memory soon) {
  const int64_t whole = length / 32 * 32;
  for (int64_t v = 0; v < vectors; v++) {
    fetch(&soon, VECTOR * length * 2);
    const uint16_t *rows = from + v * VECTOR * length;
    for (int64_t d = 0; d < whole; d += 32) {
      __m512i r[16];
      for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(rows + i * length + d);
      transpose(r);
      for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + (d / 2 + i) * to_row + v * VECTOR, r[i]);
    }
    for (int64_t d = whole; d < length; d += 2)
      for (int i = 0; i < VECTOR; i++) memcpy(to + d / 2 * to_row + v * VECTOR + i, rows + i * length + d, 4);
  }
}

// A matrix whose columns stay columns, in pairs: from[count][width] to to[count / 2][width]; width in steps of 32.
static inline void pair_across_rows(const uint16_t *from, int64_t width, int64_t count, uint32_t *to, Memory soon) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,
                                       39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int64_t t = 0; t < count; t += 2) {
    fetch(&soon, 4 * width);
    for (int64_t d = 0; d < width; d += 32) {
      const __m512i a = _mm512_loadu_si512(from + t * width + d), b = _mm512_loadu_si512(from + (t + 1) * width + d);
      _mm512_storeu_si512(to + t / 2 * width + d, _mm512_permutex2var_epi16(a, low, b));
      _mm512_storeu_si512(to + t / 2 * width + d + 16, _mm512_permutex2var_epi16(a, high, b));
    }
  }
}

typedef struct {
  const uint16_t *left; // [rows][2 * num_pairs]
  int64_t left_row;
  const uint32_t *right; // [num_pairs][16 * vectors], in pairs
  int64_t right_row, num_pairs;
  float *sums; // [rows][16 * vectors]
  int64_t sums_row;
  int adds; // whether sums are added to, or begin at 0
} Product;

// Rows and vectors are constants where this is called, so that every sum is a register.
static inline __attribute__((always_inline)) void multiply_registers(
    const Product *p, const int64_t row, const int64_t column, const int rows, const int vectors) {
  const uint16_t *left = p->left + row * p->left_row;
  const uint32_t *right = p->right + column;
  float *sums = p->sums + row * p->sums_row + column;
  __m512 sum[ROWS][VECTORS];
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < vectors; v++)
      sum[r][v] = p->adds ? _mm512_loadu_ps(sums + r * p->sums_row + v * VECTOR) : _mm512_setzero_ps();
  for (int64_t i = 0; i < p->num_pairs; i++) {
    __m512bh columns[VECTORS];
    for (int v = 0; v < vectors; v++) columns[v] = (__m512bh)_mm512_loadu_si512(right + i * p->right_row + v * VECTOR);
    for (int r = 0; r < rows; r++) {
      int32_t pair;
      memcpy(&pair, left + r * p->left_row + 2 * i, sizeof pair);
      const __m512bh factor = (__m512bh)_mm512_set1_epi32(pair);
      for (int v = 0; v < vectors; v++) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], factor, columns[v]);
    }
  }
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < vectors; v++) _mm512_storeu_ps(sums + r * p->sums_row + v * VECTOR, sum[r][v]);
}

static inline void multiply_rows(const Product *p, int64_t row, int64_t column, int64_t rows, const int vectors) {
  switch (rows) {
#define CASE(R) case R: \
    if (vectors == 4) multiply_registers(p, row, column, R, 4); \
    else if (vectors == 2) multiply_registers(p, row, column, R, 2); \
    else multiply_registers(p, row, column, R, 1); \
    break
    CASE(1);
    CASE(2);
    CASE(3);
    CASE(4);
    CASE(5);
    CASE(6);
#undef CASE
  }
}

static inline void multiply(const Product *p, int64_t rows, int64_t vectors) {
  for (int64_t row = 0; row < rows; row += ROWS)
    for (int64_t v = 0; v < vectors;) {
      const int count = vectors - v >= 4 ? 4 : vectors - v >= 2 ? 2 : 1;
      multiply_rows(p, row, v * VECTOR, rows - row < ROWS ? rows - row : ROWS, count);
      v += count;
    }
}

#endif
