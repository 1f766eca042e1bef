// Linear layers: x @ weight.T + bias, of bfloat16, from weights that were put into panels of 64 outputs once.

#include "products.h"

enum { PANEL = VECTORS * VECTOR };

typedef struct {
  const uint16_t *x; // [num_rows][in_features], rows at any distance
  int64_t x_row, num_rows, in_features, out_features;
  const uint32_t *panels; // each [in_features / 2][outputs], the last one's outputs filled up to a multiple of 16
  const uint16_t *bias;   // [out_features] or null
  uint16_t *out;          // [num_rows][out_features]
  int64_t next;           // output that no thread has taken yet
} Linear;

static int64_t vectors_from(int64_t output, int64_t out_features) {
  const int64_t left = (out_features - output + VECTOR - 1) / VECTOR;
  return left < VECTORS ? left : VECTORS;
}

// How many numbers linear_pack writes.
int64_t linear_packed_size(int64_t in_features, int64_t out_features) {
  return (out_features + VECTOR - 1) / VECTOR * VECTOR * in_features;
}

// weight: [out_features][in_features], in_features even.
void linear_pack(const uint16_t *weight, int64_t in_features, int64_t out_features, uint32_t *panels) {
  for (int64_t output = 0; output < out_features; output += PANEL) {
    const int64_t vectors = vectors_from(output, out_features), filled = (out_features - output) / VECTOR;
    const int64_t whole = filled < vectors ? filled : vectors;
    uint32_t *panel = panels + output * (in_features / 2);
    pair_along_rows(weight + output * in_features, in_features, whole, panel, vectors * VECTOR, (Memory){0, 0});
    if (whole == vectors) continue;
    for (int64_t d = 0; d < in_features; d += 2)
      for (int64_t o = whole * VECTOR; o < vectors * VECTOR; o++) {
        uint32_t *to = panel + d / 2 * vectors * VECTOR + o;
        if (output + o < out_features) memcpy(to, weight + (output + o) * in_features + d, 4);
        else *to = 0;
      }
  }
}

static void round_rows(const Linear *l, const float *sums, int64_t row, int64_t rows, int64_t output, int64_t vectors) {
  for (int64_t v = 0; v < vectors; v++) {
    const int64_t at = output + v * VECTOR, left = l->out_features - at;
    const __mmask16 kept = left < VECTOR ? (__mmask16)((1u << left) - 1) : (__mmask16)0xffff;
    __m512 bias = _mm512_setzero_ps();
    if (l->bias) {
      const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(kept, l->bias + at));
      bias = _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    }
    for (int64_t r = 0; r < rows; r++) {
      __m512 y = _mm512_loadu_ps(sums + r * PANEL + v * VECTOR);
      if (l->bias) y = _mm512_add_ps(y, bias);
      _mm256_mask_storeu_epi16(l->out + (row + r) * l->out_features + at, kept, (__m256i)_mm512_cvtneps_pbh(y));
    }
  }
}

static void run(void *data) {
  Linear *l = data;
  float sums[ROWS * PANEL];
  for (;;) {
    const int64_t output = __atomic_fetch_add(&l->next, PANEL, __ATOMIC_RELAXED);
    if (output >= l->out_features) return;
    const int64_t vectors = vectors_from(output, l->out_features);
    Product product = {0, l->x_row, l->panels + output * (l->in_features / 2), vectors * VECTOR,
                       l->in_features / 2, sums, PANEL, 0};
    for (int64_t row = 0; row < l->num_rows; row += ROWS) {
      const int64_t rows = l->num_rows - row < ROWS ? l->num_rows - row : ROWS;
      product.left = l->x + row * l->x_row;
      multiply(&product, rows, vectors);
      round_rows(l, sums, row, rows, output, vectors);
    }
  }
}

void linear(const uint16_t *x, int64_t x_row, int64_t num_rows, int64_t in_features, int64_t out_features,
            const uint32_t *panels, const uint16_t *bias, uint16_t *out, Parallel *parallel, int64_t num_threads) {
  Linear work = {x, x_row, num_rows, in_features, out_features, panels, bias, out, 0};
  run_parallel(run, &work, parallel, num_threads, in_features * out_features * (2 + num_rows / 4));
}
