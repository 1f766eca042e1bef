// What a model does between its matrices, row by row: norms, gates and rotary embeddings of bfloat16.
//
// Every intermediate result that torch would round to bfloat16 is rounded here, too.

#include "exponential.h"
#include "products.h"

enum { TASK = 16 }; // rows that a thread takes at once

typedef struct Rows {
  void (*function)(const struct Rows *, int64_t row);
  int64_t num_rows, size, next;
  const uint16_t *x, *y, *z;
  int64_t x_row, y_row, x_head, num_heads;
  uint16_t *out;
  float eps;
} Rows;

static void run(void *data) {
  Rows *work = data;
  for (;;) {
    const int64_t begin = __atomic_fetch_add(&work->next, TASK, __ATOMIC_RELAXED);
    if (begin >= work->num_rows) return;
    const int64_t end = begin + TASK < work->num_rows ? begin + TASK : work->num_rows;
    for (int64_t row = begin; row < end; row++) work->function(work, row);
  }
}

static inline __mmask16 kept(int64_t left) { return left < VECTOR ? (__mmask16)((1u << left) - 1) : (__mmask16)0xffff; }

static inline __m512 load(const uint16_t *from, __mmask16 mask) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

static inline void store(uint16_t *to, __mmask16 mask, __m512 x) {
  _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(x));
}

static inline __m512 rounded(__m512 x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)), 16));
}

static void norm_row(const Rows *w, int64_t row) {
  const uint16_t *x = w->x + row * w->x_row;
  __m512 squares = _mm512_setzero_ps();
  for (int64_t i = 0; i < w->size; i += VECTOR) {
    const __m512 each = load(x + i, kept(w->size - i));
    squares = _mm512_fmadd_ps(each, each, squares);
  }
  const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(squares) / (float)w->size + w->eps);
  const __m512 root = _mm512_div_ps(_mm512_set1_ps(1), _mm512_sqrt_ps(mean));
  for (int64_t i = 0; i < w->size; i += VECTOR) {
    const __mmask16 mask = kept(w->size - i);
    const __m512 scaled = rounded(_mm512_mul_ps(load(x + i, mask), root));
    store(w->out + row * w->size + i, mask, _mm512_mul_ps(scaled, load(w->y + i, mask)));
  }
}

static void gate_row(const Rows *w, int64_t row) {
  for (int64_t i = 0; i < w->size; i += VECTOR) {
    const __mmask16 mask = kept(w->size - i);
    const __m512 x = load(w->x + row * w->x_row + i, mask), one = _mm512_set1_ps(1);
    const __m512 silu = _mm512_div_ps(x, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
    store(w->out + row * w->size + i, mask, _mm512_mul_ps(rounded(silu), load(w->y + row * w->y_row + i, mask)));
  }
}

static void rotate_row(const Rows *w, int64_t row) {
  const int64_t half = w->size / 2;
  for (int64_t head = 0; head < w->num_heads; head++)
    for (int64_t i = 0; i < w->size; i += VECTOR) {
      const uint16_t *x = w->x + head * w->x_head + row * w->x_row;
      const __m512 turned = load(x + (i < half ? i + half : i - half), 0xffff);
      const __m512 sine = rounded(_mm512_mul_ps(turned, load(w->z + row * w->size + i, 0xffff)));
      const __m512 cosine = rounded(_mm512_mul_ps(load(x + i, 0xffff), load(w->y + row * w->size + i, 0xffff)));
      store(w->out + (head * w->num_rows + row) * w->size + i, 0xffff, _mm512_add_ps(sine, cosine));
    }
}

// out = x / sqrt(mean(x * x) + eps) * weight; x: [num_rows][size], rows at any distance; out: [num_rows][size]
void rms_norm(const uint16_t *x, int64_t x_row, int64_t num_rows, int64_t size, const uint16_t *weight, float eps,
              uint16_t *out, Parallel *parallel, int64_t num_threads) {
  Rows work = {.function = norm_row, .num_rows = num_rows, .size = size, .x = x, .x_row = x_row, .y = weight,
               .out = out, .eps = eps};
  run_parallel(run, &work, parallel, num_threads, 8 * num_rows * size);
}

// out = silu(x) * y
void silu_gate(const uint16_t *x, int64_t x_row, const uint16_t *y, int64_t y_row, int64_t num_rows, int64_t size,
               uint16_t *out, Parallel *parallel, int64_t num_threads) {
  Rows work = {.function = gate_row, .num_rows = num_rows, .size = size, .x = x, .x_row = x_row, .y = y,
               .y_row = y_row, .out = out};
  run_parallel(run, &work, parallel, num_threads, 8 * num_rows * size);
}

// out = x * cosines + (x with its halves exchanged) * sines, the first half of the sines negated before.
// x: [num_heads][num_rows][size]; cosines, sines: [num_rows][size]; size in steps of 32
void rotate(const uint16_t *x, int64_t x_head, int64_t x_row, int64_t num_heads, int64_t num_rows, int64_t size,
            const uint16_t *cosines, const uint16_t *sines, uint16_t *out, Parallel *parallel, int64_t num_threads) {
  Rows work = {.function = rotate_row, .num_rows = num_rows, .size = size, .x = x, .x_head = x_head, .x_row = x_row,
               .num_heads = num_heads, .y = cosines, .z = sines, .out = out};
  run_parallel(run, &work, parallel, num_threads, 8 * num_heads * num_rows * size);
}
