// Attention of a packed row over the slots of a KV cache in blocks: serve/engine/kv_cache.py describes the layout.
//
// A tile is some columns of one sequence.  Its query heads that share keys are the rows of one matrix, whose scores are
// computed block by block with a running softmax (Milakov and Gimelshein, 2018).  Scores, weights' sums and results are
// float32 and rounded once, weights are multiplied as bfloat16.

#include <math.h>

#include "exponential.h"
#include "products.h"

enum { BLOCK = 128, BLOCK_VECTORS = BLOCK / VECTOR };

typedef struct {
  const uint16_t *query, *key, *value; // [heads][columns][dim], heads and columns at any distance
  int64_t query_head, query_column, key_head, key_column, value_head, value_column;
  uint16_t *keys, *values; // a layer's cache: [num_blocks][num_slots][num_kv_heads][BLOCK][dim]
  uint16_t *out;           // [columns][num_heads][value_dim]
  const float *sinks;      // [num_heads] or null
  const int32_t *tiles;    // [num_tiles][3]: first column, the one after the last, slot
  const int32_t *spans;    // [columns][2]: the first key that a column sees, and the last, which is its own
  int64_t num_tiles, num_slots, num_heads, num_kv_heads, dim, value_dim;
  char *scratch; // of each thread scratch_size bytes
  int64_t scratch_size;
  float scaling, softcap; // softcap 0: none
} Step;

typedef struct {
  uint16_t *query;   // [rows][dim]
  uint32_t *keys;    // [dim / 2][BLOCK], in pairs
  uint32_t *values;  // [BLOCK / 2][value_dim], in pairs
  float *scores;     // [rows][BLOCK]
  uint16_t *weights; // [rows][BLOCK]
  float *out;        // [rows][value_dim]
  float *most;       // [rows]: the greatest score so far
  float *total;      // [rows]: of weights
} Scratch;

typedef struct {
  const Step *step;
  int64_t next_item, next_thread;
} Work;

static int64_t lay_out(char *memory, int64_t rows, int64_t dim, int64_t value_dim, Scratch *scratch) {
  const int64_t sizes[] = {rows * dim * 2,   dim / 2 * BLOCK * 4,  BLOCK / 2 * value_dim * 4, rows * BLOCK * 4,
                           rows * BLOCK * 2, rows * value_dim * 4, rows * 4,                  rows * 4};
  int64_t places[8], at = 0;
  for (int i = 0; i < 8; i++) {
    places[i] = at;
    at += (sizes[i] + 63) / 64 * 64;
  }
  if (scratch)
    *scratch = (Scratch){(uint16_t *)(memory + places[0]), (uint32_t *)(memory + places[1]),
                         (uint32_t *)(memory + places[2]), (float *)(memory + places[3]),
                         (uint16_t *)(memory + places[4]), (float *)(memory + places[5]),
                         (float *)(memory + places[6]),    (float *)(memory + places[7])};
  return at;
}

// Bytes of a thread; rows: columns of the largest tile times query heads of a key head.
int64_t attend_scratch_size(int64_t rows, int64_t dim, int64_t value_dim) {
  return lay_out(0, rows, dim, value_dim, 0);
}

// softcap * tanh(score / softcap), by tanh(y) = 1 - 2 / (exp(2y) + 1)
static inline __m512 capped(__m512 score, float softcap) {
  const __m512 twice = _mm512_min_ps(_mm512_set1_ps(80), _mm512_mul_ps(score, _mm512_set1_ps(2 / softcap)));
  const __m512 one = _mm512_set1_ps(1), sum = _mm512_add_ps(exponential(twice), one);
  return _mm512_mul_ps(_mm512_sub_ps(one, _mm512_div_ps(_mm512_set1_ps(2), sum)), _mm512_set1_ps(softcap));
}

static inline int64_t within(int64_t key) { return key < 0 ? 0 : key > VECTOR ? VECTOR : key; }

// A block's scores become weights, of the keys first to last alone; what was summed before shrinks to the new maximum.
static void soften(const Step *s, const Scratch *m, int64_t row, int64_t vectors, int64_t first, int64_t last) {
  float *scores = m->scores + row * BLOCK, *out = m->out + row * s->value_dim;
  const __m512 hidden = _mm512_set1_ps(-INFINITY), scaling = _mm512_set1_ps(s->scaling);
  __m512 kept[BLOCK_VECTORS], greatest = hidden, total = _mm512_setzero_ps();
  for (int64_t v = 0; v < vectors; v++) {
    __m512 score = _mm512_mul_ps(_mm512_loadu_ps(scores + v * VECTOR), scaling);
    if (s->softcap > 0) score = capped(score, s->softcap);
    const uint32_t before = (1u << within(first - v * VECTOR)) - 1, until = (1u << within(last + 1 - v * VECTOR)) - 1;
    kept[v] = _mm512_mask_mov_ps(hidden, (__mmask16)(until & ~before), score);
    greatest = _mm512_max_ps(greatest, kept[v]);
  }
  const float old = m->most[row], reached = _mm512_reduce_max_ps(greatest), most = reached > old ? reached : old;
  // While nothing is seen, subtract 0, but keep -INFINITY: the scores to come may all be far below 0.
  const float top = most == -INFINITY ? 0 : most;
  for (int64_t v = 0; v < vectors; v++) {
    const __m512 weight = exponential(_mm512_sub_ps(kept[v], _mm512_set1_ps(top)));
    total = _mm512_add_ps(total, weight);
    _mm256_storeu_si256((__m256i *)(m->weights + row * BLOCK + v * VECTOR), (__m256i)_mm512_cvtneps_pbh(weight));
  }
  const __m512 shrunk = exponential(_mm512_set1_ps(old - top));
  m->total[row] = m->total[row] * _mm512_cvtss_f32(shrunk) + _mm512_reduce_add_ps(total);
  m->most[row] = most;
  if (most != old)
    for (int64_t d = 0; d < s->value_dim; d += VECTOR)
      _mm512_storeu_ps(out + d, _mm512_mul_ps(_mm512_loadu_ps(out + d), shrunk));
}

static void finish(const Step *s, const Scratch *m, int64_t row, uint16_t *out) {
  const __m512 share = _mm512_set1_ps(1 / m->total[row]);
  for (int64_t d = 0; d < s->value_dim; d += VECTOR) {
    const __m512 sum = _mm512_loadu_ps(m->out + row * s->value_dim + d);
    _mm256_storeu_si256((__m256i *)(out + d), (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(sum, share)));
  }
}

static int64_t place_of(const Step *s, int64_t slot, int64_t head, int64_t block) {
  return ((block * s->num_slots + slot) * s->num_kv_heads + head) * BLOCK;
}

static int64_t count_of(int64_t block, int64_t end) {
  const int64_t left = end - block * BLOCK;
  return left < BLOCK ? left : BLOCK;
}

// A block's keys before the one at end.
static Memory keys_of(const Step *s, int64_t slot, int64_t head, int64_t block, int64_t end) {
  const uint16_t *keys = s->keys + place_of(s, slot, head, block) * s->dim;
  return (Memory){(const char *)keys, (const char *)(keys + count_of(block, end) * s->dim)};
}

static void attend_block(const Step *s, const Scratch *m, const int32_t *tile, int64_t head, int64_t block, int64_t end,
                         Memory soon) {
  const int64_t group = s->num_heads / s->num_kv_heads, rows = (tile[1] - tile[0]) * group, start = block * BLOCK;
  const int64_t count = count_of(block, end), vectors = (count + VECTOR - 1) / VECTOR;
  const uint16_t *values = s->values + place_of(s, tile[2], head, block) * s->value_dim;
  const uint16_t *keys = s->keys + place_of(s, tile[2], head, block) * s->dim;
  int64_t row = 0; // the first that sees any of it: of a prompt's columns the later ones see more
  while (row < rows && s->spans[2 * (tile[0] + row / group) + 1] < start) row++;
  const Memory values_soon = {(const char *)values, (const char *)(values + count * s->value_dim)};
  pair_along_rows(keys, s->dim, vectors, m->keys, BLOCK, values_soon);
  const Product scores = {m->query + row * s->dim, s->dim, m->keys, BLOCK, s->dim / 2,
                          m->scores + row * BLOCK, BLOCK, 0};
  multiply(&scores, rows - row, vectors);
  for (int64_t r = row; r < rows; r++) {
    const int32_t *span = s->spans + 2 * (tile[0] + r / group);
    soften(s, m, r, vectors, span[0] - start, span[1] - start);
  }
  pair_across_rows(values, s->value_dim, vectors * VECTOR, m->values, soon);
  const Product out = {m->weights + row * BLOCK, BLOCK, m->values, s->value_dim, vectors * VECTOR / 2,
                       m->out + row * s->value_dim, s->value_dim, 1};
  multiply(&out, rows - row, s->value_dim / VECTOR);
}

static void attend_tile(const Step *s, const Scratch *m, const int32_t *tile, int64_t head, Memory soon) {
  const int64_t group = s->num_heads / s->num_kv_heads, rows = (tile[1] - tile[0]) * group;
  int64_t first = INT32_MAX, last = 0;
  for (int64_t row = 0; row < rows; row++) {
    const int64_t column = tile[0] + row / group, query_head = head * group + row % group;
    memcpy(m->query + row * s->dim, s->query + column * s->query_column + query_head * s->query_head, s->dim * 2);
    // A sink is a key with a score of its own and no value.
    m->most[row] = s->sinks ? s->sinks[query_head] : -INFINITY;
    m->total[row] = s->sinks ? 1 : 0;
    const int32_t *span = s->spans + 2 * column;
    first = span[0] < first ? span[0] : first;
    last = span[1] > last ? span[1] : last;
  }
  memset(m->out, 0, rows * s->value_dim * sizeof(float));
  for (int64_t block = first / BLOCK; block <= last / BLOCK; block++) {
    const Memory next = block == last / BLOCK ? soon : keys_of(s, tile[2], head, block + 1, last + 1);
    attend_block(s, m, tile, head, block, last + 1, next);
  }
  for (int64_t row = 0; row < rows; row++) {
    const int64_t column = tile[0] + row / group, query_head = head * group + row % group;
    finish(s, m, row, s->out + (column * s->num_heads + query_head) * s->value_dim);
  }
}

// What an item reads first.
static Memory first_keys(const Step *s, int64_t item) {
  if (item >= s->num_tiles * s->num_kv_heads) return (Memory){0, 0};
  const int32_t *tile = s->tiles + 3 * (item / s->num_kv_heads), *span = s->spans + 2 * tile[0];
  return keys_of(s, tile[2], item % s->num_kv_heads, span[0] / BLOCK, span[1] + 1);
}

static void run(void *data) {
  Work *work = data;
  const Step *s = work->step;
  const int64_t thread = __atomic_fetch_add(&work->next_thread, 1, __ATOMIC_RELAXED);
  int64_t most = 0;
  for (int64_t i = 0; i < s->num_tiles; i++) {
    const int64_t columns = s->tiles[3 * i + 1] - s->tiles[3 * i];
    most = columns > most ? columns : most;
  }
  Scratch scratch;
  const int64_t rows = most * (s->num_heads / s->num_kv_heads);
  lay_out(s->scratch + thread * s->scratch_size, rows, s->dim, s->value_dim, &scratch);
  for (;;) {
    const int64_t item = __atomic_fetch_add(&work->next_item, 1, __ATOMIC_RELAXED);
    if (item >= s->num_tiles * s->num_kv_heads) return;
    attend_tile(s, &scratch, s->tiles + 3 * (item / s->num_kv_heads), item % s->num_kv_heads, first_keys(s, item + 1));
  }
}

static void store(const Step *s, const uint16_t *from, int64_t head, int64_t column, int64_t dim, uint16_t *to) {
  for (int64_t i = 0; i < s->num_tiles; i++) {
    const int32_t *tile = s->tiles + 3 * i;
    for (int64_t c = tile[0]; c < tile[1]; c++) {
      const int64_t key = s->spans[2 * c + 1];
      const int64_t place = place_of(s, tile[2], 0, key / BLOCK) + key % BLOCK;
      for (int64_t h = 0; h < s->num_kv_heads; h++)
        memcpy(to + (place + h * BLOCK) * dim, from + c * column + h * head, dim * 2);
    }
  }
}

// Keys and values go to their slots, then every column attends over its own.
void attend(const Step *s, Parallel *parallel, int64_t num_threads) {
  store(s, s->key, s->key_head, s->key_column, s->dim, s->keys);
  store(s, s->value, s->value_head, s->value_column, s->value_dim, s->values);
  Work work = {s, 0, 0};
  int64_t num_keys = 0;
  for (int64_t i = 0; i < s->num_tiles; i++) {
    const int32_t *tile = s->tiles + 3 * i;
    num_keys += (s->spans[2 * tile[1] - 1] + 1 - s->spans[2 * tile[0]]) * (1 + (tile[1] - tile[0]) / 4);
  }
  run_parallel(run, &work, parallel, num_threads, num_keys * s->num_kv_heads * (s->dim + s->value_dim) * 2);
}
