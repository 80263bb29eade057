// Quantises tokens and sets their bits, by the definition in the torch codec, to the last bit: sums
// over channels are float64, feedback is exact in any order, nothing is contracted.
struct Arguments {
  int32_t batch, heads, steps, value_dim, table_row, slabs, threads, sinks, ring, exact_type;
  const float* keys;    // [batch, heads, steps, KEY_DIM], before RoPE, in pair order
  const float* values;  // [batch, heads, steps, VALUE_DIM]
  const int32_t* slots;  // [batch, steps]
  const int32_t* table;  // [batch, table_row]
  uint8_t* const* slab;
  const int64_t* slab_pages;
  uint8_t* exact_rows;  // see exact.h; null where torch writes them
  // of the layer, [heads, ...]
  const float *key_levels, *key_scale, *key_zero, *key_weight, *key_share, *key_norm, *key_stretch;
  const int8_t* key_feedback;  // [heads, KEY_DIM, KEY_DIM] or null
  const float *value_levels, *gain, *offset;
  const int8_t* value_feedback;
  Parallel parallel;
};

constexpr float HALF_MAX = 65504.0f;
constexpr int STAGE = 16;

INLINE float clamped(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

static uint16_t to_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (bits == 0x7f800000) return uint16_t(sign | 0x7c00);
  float size;
  std::memcpy(&size, &bits, 4);
  if (size > HALF_MAX) return uint16_t(sign | 0x7bff);
  if (bits < 0x38800000) return uint16_t(sign | uint32_t(std::nearbyint(size * 0x1p24f)));
  uint32_t rest = bits & 0x1fff, half = (bits - 0x38000000) >> 13;
  half += rest > 0x1000 || (rest == 0x1000 && (half & 1));
  return uint16_t(sign | half);
}
INLINE float rounded(float x) { return half_to_float(to_half(x)); }

// Nearest levels: the midpoints at or below x. NaN gets code 0.
template <int LEVELS>
INLINE void nearest(const float* x, int count, const float* levels, uint8_t* codes) {
  int32_t found[MOST_CHANNELS] = {};
  for (int i = 0; i + 1 < LEVELS; i++) {
    float middle = (levels[i + 1] + levels[i]) / 2;
    for (int c = 0; c < count; c++) found[c] += x[c] >= middle;
  }
  for (int c = 0; c < count; c++) codes[c] = uint8_t(found[c]);
}

// Channels of the COUNT largest scores, ascending; NaN is largest, equal ones go to the lower.
template <int COUNT> INLINE void largest_of(float* score, int dim, int* out) {
  for (int k = 0; k < COUNT; k++) {
    int best = 0;
    for (int c = 1; c < dim; c++) {
      if (score[best] != score[best]) break;
      if (score[c] > score[best] || score[c] != score[c]) best = c;
    }
    out[k] = best;
    score[best] = -1;
  }
  std::sort(out, out + COUNT);
}

// Codes by stages; errors of a stage are moved onto later channels. `exact` channels pass none on.
template <int LEVELS, int SLOTS>
INLINE void feedback_codes(const float* x, int dim, const float* levels, const int8_t* matrix,
                           const int* exact, uint8_t* codes) {
  float moved[MOST_CHANNELS] = {}, wanted[STAGE];
  for (int start = 0; start < dim; start += STAGE) {
    int stop = std::min(start + STAGE, dim);
    for (int c = start; c < stop; c++) wanted[c - start] = x[c] + moved[c];
    nearest<LEVELS>(wanted, stop - start, levels, codes + start);
    for (int c = start; c < stop && stop < dim; c++) {
      float error = wanted[c - start] - levels[codes[c]];
      error = error != error ? 0 : clamped(std::nearbyint(error * 8) / 8, -63, 63);
      for (int k = 0; k < SLOTS; k++)
        if (exact[k] == c) error = 0;
      if (error == 0) continue;
      const int8_t* row = matrix + size_t(c) * dim;
      float unit = error / 64;
      for (int later = stop; later < dim; later++) moved[later] += unit * row[later];
    }
  }
}

// Sets one code of `bits` bits among the words at `page`.
template <int BITS, int SELECTORS>
INLINE void put_code(uint8_t* page, int chunk, int lane, int selector, int nibble, uint32_t code) {
  constexpr int sections = SELECTORS % 4 ? 1 : 2;
  constexpr int per_lane = 2 * SELECTORS / sections * BITS / 4;
  constexpr int width = per_lane % 4 == 0 ? 4 : per_lane % 2 == 0 ? 2 : 1;
  int index = sections == 2 ? selector : chunk * SELECTORS + selector;
  uint8_t* section = page + (sections == 2 ? chunk * 128 * per_lane : 0);
  auto put = [&](int word, uint32_t mask, uint32_t value) {
    int i = index / 4 * BITS + word;
    uint8_t* at = section + i / width * 128 * width + lane * 4 * width + i % width * 4;
    uint32_t x;
    std::memcpy(&x, at, 4);
    x = (x & ~(mask << 4 * nibble)) | value << 4 * nibble;
    std::memcpy(at, &x, 4);
  };
  auto put_part = [&](int first, int bits, uint32_t part) {
    int j = index % 4;
    if (bits == 4) put(first + j, 15, part);
    else if (bits == 2) put(first + j / 2, 3u << 2 * (j & 1), part << 2 * (j & 1));
    else if (bits == 1) put(first, 1u << j, part << j);
    else if (j < 3) put(first + j, 7, part);
    else
      for (int k = 0; k < 3; k++) put(first + k, 8, (part >> k & 1) << 3);
  };
  put_part(0, BITS < 4 ? BITS : 4, code & 15);
  if (BITS > 4) put_part(4, BITS - 4, code >> 4);
}

INLINE void put_key_codes(uint8_t* page, int token, const uint8_t* codes) {
  constexpr int pairs = KEY_DIM / 2, full = pairs / 16;
  int chunk = token / 32, g = token % 32 / 4, tile = token >> 1 & 1, r = token & 1;
  for (int c = 0; c < KEY_DIM; c++) {
    int member = c >= pairs, pair = c - member * pairs, u = pair / 16, k = pair % 16;
    bool last = u >= full;
    int t = (k & 7) >> 1, slice = last ? 2 * full : 2 * u + member;
    int nibble = 4 * r + 2 * (last ? member : k >> 3) + (k & 1);
    put_code<KEY_BITS, KEY_DIM / 8>(page + KEY_CODES, chunk, 4 * g + t,
                                    tile * (pairs / 8) + slice, nibble, codes[c]);
  }
}

INLINE void put_value_codes(uint8_t* page, int token, const uint8_t* codes) {
  int chunk = token / 32, t = token % 32 / 8, xy = token >> 1 & 1;
  int bit = 2 * (token >> 2 & 1) + (token & 1);
  for (int c = 0; c < VALUE_CHANNELS; c++) {
    int g = c / (VALUE_CHANNELS / 8), rest = c % (VALUE_CHANNELS / 8);
    put_code<VALUE_BITS, VALUE_CHANNELS / 8>(page + VALUE_CODES, chunk, 4 * g + t,
                                             (rest & ~1) + xy, 4 * (rest & 1) + bit, codes[c]);
  }
}

template <class Index>
INLINE void put_slot(uint8_t* indices, uint8_t* residuals, int slot, int token, int channel,
                     float residual) {
  Index index = Index(channel);
  uint16_t half = to_half(residual);
  std::memcpy(indices + sizeof index * (64 * slot + token), &index, sizeof index);
  std::memcpy(residuals + 2 * (64 * slot + token), &half, 2);
}

// A token's scale: root mean square, then least squares, both without the largest errors.
static uint16_t key_token_scale(const float* x, const float* levels, const float* share, float norm,
                                float stretch) {
  float finite[KEY_DIM], score[KEY_DIM], left[KEY_DIM];
  uint8_t codes[KEY_DIM];
  int out[KEY_SLOTS + 1];
  for (int c = 0; c < KEY_DIM; c++) {
    finite[c] = x[c] != x[c] ? 0 : std::isinf(x[c]) ? (x[c] > 0 ? HALF_MAX : -HALF_MAX) : x[c];
    left[c] = score[c] = finite[c] * finite[c] * share[c];
  }
  largest_of<KEY_SLOTS>(score, KEY_DIM, out);
  for (int k = 0; k < KEY_SLOTS; k++) left[out[k]] = 0;
  double sum = 0, over = 0, under = 0;
  for (int c = 0; c < KEY_DIM; c++) sum += left[c];
  float start = clamped(std::sqrt(float(sum)) / norm, 1e-4f, HALF_MAX);
  for (int c = 0; c < KEY_DIM; c++) score[c] = finite[c] / start;
  nearest<1 << KEY_BITS>(score, KEY_DIM, levels, codes);
  for (int c = 0; c < KEY_DIM; c++) {
    float error = finite[c] - levels[codes[c]] * start;
    score[c] = error * error * share[c];
    left[c] = share[c];
  }
  largest_of<KEY_SLOTS>(score, KEY_DIM, out);
  for (int k = 0; k < KEY_SLOTS; k++) left[out[k]] = 0;
  for (int c = 0; c < KEY_DIM; c++) {
    float level = levels[codes[c]], weighted = level * left[c];
    over += weighted * finite[c];
    under += weighted * level;
  }
  float fit = float(over) / float(under);
  if (fit != fit) fit = 1;
  if (std::isinf(fit)) fit = fit > 0 ? 3.40282347e38f : -3.40282347e38f;
  return to_half(clamped(fit * stretch, 1e-4f, HALF_MAX));
}

static void append_key(const Arguments& a, int head, const float* key, uint8_t* page, int token) {
  const float* levels = a.key_levels + 256 * head;
  const float *scale = a.key_scale + KEY_DIM * head, *zero = a.key_zero + KEY_DIM * head;
  const float *weight = a.key_weight + KEY_DIM * head, *share = a.key_share + KEY_DIM * head;
  float x[KEY_DIM], residual[KEY_DIM], score[KEY_DIM], factor = 1;
  uint8_t codes[KEY_DIM];
  int exact[KEY_SLOTS + 1];
  for (int c = 0; c < KEY_DIM; c++) x[c] = key[c] / scale[c] - zero[c];
  if (TOKEN_SCALE) {
    uint16_t half = key_token_scale(x, levels, share, a.key_norm[head], a.key_stretch[head]);
    std::memcpy(page + KEY_TOKEN_SCALE + 2 * token, &half, 2);
    factor = half_to_float(half);
    for (int c = 0; c < KEY_DIM; c++) x[c] = x[c] / factor;
  }
  auto residuals = [&] {
    for (int c = 0; c < KEY_DIM; c++) {
      float scaled = TOKEN_SCALE ? levels[codes[c]] * factor : levels[codes[c]];
      residual[c] = key[c] - (scaled + zero[c]) * scale[c];
    }
  };
  nearest<1 << KEY_BITS>(x, KEY_DIM, levels, codes);
  if (KEY_SLOTS) {
    residuals();
    for (int c = 0; c < KEY_DIM; c++) score[c] = residual[c] * residual[c] * weight[c];
    largest_of<KEY_SLOTS>(score, KEY_DIM, exact);
  }
  if (a.key_feedback)
    feedback_codes<1 << KEY_BITS, KEY_SLOTS>(
        x, KEY_DIM, levels, a.key_feedback + size_t(KEY_DIM) * KEY_DIM * head, exact, codes);
  put_key_codes(page, token, codes);
  if (!KEY_SLOTS) return;
  residuals();
  for (int k = 0; k < KEY_SLOTS; k++)
    put_slot<KeyIndex>(page + KEY_SLOT_INDEX, page + KEY_SLOT_RESIDUAL, k, token, exact[k],
                       residual[exact[k]]);
}

// The narrowest range that leaves VALUE_SLOTS elements out; NaN is larger than anything.
static void inlier_range(const float* u, float& low, float& high) {
  float small[VALUE_SLOTS + 1], large[VALUE_SLOTS + 1];
  auto below = [](float x, float y) { return x < y || (y != y && x == x); };
  std::fill(small, small + VALUE_SLOTS + 1, NAN);
  std::fill(large, large + VALUE_SLOTS + 1, -INFINITY);
  for (int c = 0; c < VALUE_DIM; c++) {
    for (int k = VALUE_SLOTS; k >= 0 && below(u[c], small[k]); k--) {
      if (k < VALUE_SLOTS) small[k + 1] = small[k];
      small[k] = u[c];
    }
    for (int k = 0; k <= VALUE_SLOTS && below(large[k], u[c]); k++) {
      if (k) large[k - 1] = large[k];
      large[k] = u[c];
    }
  }
  int best = 0;
  for (int k = 1; k <= VALUE_SLOTS; k++) {
    float gap = large[k] - small[k], least = large[best] - small[best];
    if (least == least && (gap < least || gap != gap)) best = k;
  }
  low = small[best], high = large[best];
}

static void append_value(const Arguments& a, int head, const float* value, uint8_t* page,
                         int token) {
  const float *levels = a.value_levels + 256 * head, *gain = a.gain + VALUE_DIM * head;
  const float* offset = a.offset + VALUE_DIM * head;
  float u[VALUE_DIM], x[VALUE_DIM], score[VALUE_DIM], low, high;
  uint8_t codes[VALUE_CHANNELS] = {};
  int exact[VALUE_SLOTS + 1];
  for (int c = 0; c < VALUE_DIM; c++) u[c] = (value[c] - offset[c]) / gain[c];
  inlier_range(u, low, high);
  bool number = true;
  for (int c = 0; c < VALUE_DIM && !VALUE_SLOTS; c++) number &= u[c] == u[c];
  low = number ? clamped(low, -HALF_MAX, HALF_MAX) : NAN;
  high = number ? clamped(high, -HALF_MAX, HALF_MAX) : NAN;
  uint16_t halves[2] = {to_half((high - low) * float(1.0 / (2 * VALUE_LIMIT))),
                        to_half((high + low) * 0.5f)};
  std::memcpy(page + VALUE_SCALE_ZERO + 4 * token, halves, 4);
  float scale = half_to_float(halves[0]), zero = half_to_float(halves[1]);
  float step = scale == 0 ? 1 : scale;
  for (int c = 0; c < VALUE_DIM; c++) x[c] = (u[c] - zero) / step;
  nearest<1 << VALUE_BITS>(x, VALUE_DIM, levels, codes);
  if (VALUE_SLOTS) {
    for (int c = 0; c < VALUE_DIM; c++) score[c] = std::fabs(x[c] - levels[codes[c]]);
    largest_of<VALUE_SLOTS>(score, VALUE_DIM, exact);
  }
  if (a.value_feedback)
    feedback_codes<1 << VALUE_BITS, VALUE_SLOTS>(
        x, VALUE_DIM, levels, a.value_feedback + size_t(VALUE_DIM) * VALUE_DIM * head, exact,
        codes);
  put_value_codes(page, token, codes);
  for (int k = 0; k < VALUE_SLOTS; k++) {
    int c = exact[k];
    put_slot<ValueIndex>(page + VALUE_SLOT_INDEX, page + VALUE_SLOT_RESIDUAL, k, token, c,
                         u[c] - (levels[codes[c]] * scale + zero));
  }
}

INLINE uint8_t* page_address(const Arguments& a, int64_t id) {
  for (int i = 0; i < a.slabs; i++) {
    if (id < a.slab_pages[i]) return a.slab[i] + id * a.heads * PAGE_BYTES;
    id -= a.slab_pages[i];
  }
  return nullptr;
}

// COUNT elements into an exact row, rounded to nearest.
INLINE void put_exact(const Arguments& a, int64_t at, const float* x, int count) {
  for (int c = 0; c < count; c++) {
    if (a.exact_type == FLOAT32) {
      std::memcpy(a.exact_rows + 4 * (at + c), x + c, 4);
      continue;
    }
    uint32_t bits;
    std::memcpy(&bits, x + c, 4);
    uint16_t half = x[c] != x[c] ? 0x7fff : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    if (a.exact_type == FLOAT16) half = to_half(x[c]);
    std::memcpy(a.exact_rows + 2 * (at + c), &half, 2);
  }
}

// Keeps the leading and the last tokens of a row and head, and what its ring then holds.
static void keep_exact(const Arguments& a, int row, int head) {
  const int32_t* slots = a.slots + row * a.steps;
  int64_t place = int64_t(row) * a.heads + head;
  int32_t start = INT32_MAX, end = 0;
  for (int step = 0; step < a.steps; step++) {
    if (slots[step] < 0) continue;
    start = std::min(start, slots[step]);
    end = std::max(end, slots[step] + 1);
  }
  for (int step = 0; step < a.steps; step++) {
    int slot = slots[step];
    if (slot < 0 || (slot >= a.sinks && slot < end - a.ring)) continue;
    int64_t to = exact_line(a, place, slot < a.sinks ? slot : a.sinks + slot % a.ring);
    int64_t from = place * a.steps + step;
    put_exact(a, to, a.keys + from * KEY_DIM, KEY_DIM);
    put_exact(a, to + KEY_DIM, a.values + from * VALUE_DIM, VALUE_DIM);
  }
  if (head || !end) return;
  int32_t held[2];
  uint8_t* state = ring_state(a, a.exact_rows, row);
  std::memcpy(held, state, sizeof held);
  held[0] = std::max(std::min(held[0], start), end - a.ring);
  held[1] = end;
  std::memcpy(state, held, sizeof held);
}

extern "C" void append(const Arguments* arguments) {
  const Arguments& a = *arguments;
  auto body = [&](size_t i) {
    int row = int(i) / a.heads, head = int(i) % a.heads;
    for (int step = 0; step < a.steps; step++) {
      int slot = a.slots[row * a.steps + step];
      if (slot < 0) continue;
      uint8_t* page = page_address(a, a.table[int64_t(row) * a.table_row + slot / 64]);
      if (!page) continue;
      page += head * PAGE_BYTES;
      if (slot % 64 == 0) std::memset(page, 0, PAGE_BYTES);
      int64_t at = (int64_t(i)) * a.steps + step;
      append_key(a, head, a.keys + at * KEY_DIM, page, slot % 64);
      append_value(a, head, a.values + at * VALUE_DIM, page, slot % 64);
    }
    if (a.exact_rows) keep_exact(a, row, head);
  };
  size_t tasks = size_t(a.batch) * a.heads;
  unsigned threads = tasks * a.steps < 64 ? 1 : unsigned(a.threads);
  for_each(tasks, threads, a.parallel, body);
}
