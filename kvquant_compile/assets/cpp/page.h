// One page for all queries of a kv head: scores, weights, and what its values add.
struct Head {
  HeadConstants keys;
  const float* value_table;  // [256]
  const float* gain;         // [VALUE_DIM]
  const float* offset;       // [VALUE_DIM]
};

struct Rotation {
  const uint64_t* steps;  // [PAIRS] frequency in turns a position, as a fraction of 2**64
  const float* scale;     // [PAIRS] factor of cosine and sine
  const float* offsets;   // turns of the 64 places of a page
};

// The first COUNT (8 or 16) of sixteen elements; the rest is 0.
template <int COUNT, class V> INLINE V load_part(const void* at) {
  V x = {};
  std::memcpy(&x, at, 4 * COUNT);
  return x;
}

// Cosines and sines of a position for COUNT pairs; exact at any position.
template <int COUNT>
INLINE void turns_of(const uint64_t* steps, int32_t position, vf& cosine, vf& sine) {
  alignas(64) uint32_t angles[16] = {};
  for (int i = 0; i < COUNT; i++)
    angles[i] = uint32_t(steps[i] * uint64_t(int64_t(position)) >> 32);
  turn(load<vu>(angles), cosine, sine);
}

// Everything one task needs beside its arguments; reused from page to page.
struct Scratch {
  std::vector<float> memory;
  float *keys, *turned, *scores, *weights, *sums, *slot_sums, *turns;
  explicit Scratch(int queries) {
    int sizes[] = {SETS * SET_FLOATS, queries * 2 * PAIRS, queries * 64, queries * 64,
                   queries * VALUE_SUMS * 16, VALUE_CHANNELS * width(queries),
                   16 * TURNING_QUADS * 32};
    float** names[] = {&keys, &turned, &scores, &weights, &sums, &slot_sums, &turns};
    size_t count = 16;
    for (int size : sizes) count += (size + 15) / 16 * 16;
    memory.assign(count, 0.0f);
    size_t at = (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64 / 4;
    for (int i = 0; i < 7; i++) {
      *names[i] = memory.data() + at;
      at += (sizes[i] + 15) / 16 * 16;
    }
  }
  static int width(int queries) { return (queries + 3) / 4 * 4; }
};

// COUNT pairs of all queries turned back by `position`, in quads of members a and b.
template <int COUNT>
INLINE void turn_part(const float* query, const float* scale, int queries, const Rotation& rope,
                      int pair, int32_t position, float* out) {
  vf c = splat(1), s = {};
  if (pair < 4 * TURNING_QUADS) turns_of<COUNT>(rope.steps + pair, position, c, s);
  vf factor = load_part<COUNT, vf>(rope.scale + pair) * load_part<COUNT, vf>(scale + pair);
  c *= factor;
  s *= factor;
  for (int q = 0; q < queries; q++, query += 2 * PAIRS, out += 2 * PAIRS) {
    vf a = load_part<COUNT, vf>(query + pair), b = load_part<COUNT, vf>(query + PAIRS + pair);
    vf x = a * c + b * s, y = b * c - a * s;
    store(out + 2 * pair, SHUFFLE(x, y, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23));
    if (COUNT == 16)
      store(out + 2 * pair + 16,
            SHUFFLE(x, y, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31));
  }
}

// The queries of a kv head turned back by `position`, scaled as the keys' codes want it.
static void turn_queries(const float* query, const float* scale, int queries, const Rotation& rope,
                         int32_t position, float* out) {
  int pair = 0;
  for (; pair + 16 <= PAIRS; pair += 16)
    turn_part<16>(query, scale, queries, rope, pair, position, out);
  if (pair < PAIRS) turn_part<8>(query, scale, queries, rope, pair, position, out);
}

// Turns of 64 arbitrary positions relative to the first one, as `Rotation::offsets` holds them.
static void make_turns(const Rotation& rope, const int32_t* offsets, float* out) {
  for (int token = 0; token < 64; token++) {
    int set = token / 16 * SETS + (token & 3), group = token % 16 / 4;
    for (int quad = 0; quad < TURNING_QUADS; quad += 2) {
      vf c, s;
      turns_of<8>(rope.steps + 4 * quad, offsets[token], c, s);
      for (int i = 0; i < 8; i++) {
        float* to = out + (set * TURNING_QUADS + quad + i / 4) * 32 + group * 4 + i % 4;
        to[0] = c[i], to[16] = s[i];
      }
    }
  }
}

// Outlier slots of sixteen keys: residuals before the rotation, added to scores.
static void add_key_slots(const uint8_t* page, int hc, const Head& head, const float* turns,
                          int queries, const float* turned, float* scores) {
  const vi token = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (int slot = 0; slot < KEY_SLOTS; slot++) {
    int first = 64 * slot + 16 * hc;
    vi channel;
    for (int i = 0; i < 16; i++) {
      KeyIndex x;
      std::memcpy(&x, page + KEY_SLOT_INDEX + sizeof x * (first + i), sizeof x);
      channel[i] = x;
    }
    vi second = channel >= PAIRS, pair = channel - (second & PAIRS);
    vi quad = (pair >> 3) * 2 + (pair & 1), lane = pair >> 1 & 3;
    vf r = load_halves(page + KEY_SLOT_RESIDUAL + 2 * first) * gather(head.keys.inverse, channel);
    vf c = splat(1), s = {};
    if (TURNING_QUADS) {
      vi still = quad >= TURNING_QUADS;
      vi at = (((token & 3) * TURNING_QUADS + quad) * 32 + (token >> 2) * 4 + lane) & ~still;
      c = choose(still, c, gather(turns, at));
      s = choose(still, s, gather(turns + 16, at));
    }
    vf on_a = r * choose(second, -s, c), on_b = r * choose(second, c, s);
    for (int q = 0; q < queries; q++) {
      const float* query = turned + q * 2 * PAIRS;
      vf a = gather(query, quad * 8 + lane), b = gather(query + 4, quad * 8 + lane);
      store(scores + 64 * q, load<vf>(scores + 64 * q) + on_a * a + on_b * b);
    }
  }
}

// Scores [queries][64] of a page.
INLINE void page_scores(const uint8_t* page, const Head& head, const float* turns, int queries,
                        Scratch& s) {
  for (int hc = 0; hc < 4; hc++) {
    const float* mine = turns + hc * SETS * TURNING_QUADS * 32;
    unpack_keys(page, hc >> 1, hc & 1, head.keys, mine, s.keys);
    multiply_keys(s.keys, s.turned, queries, s.scores + 16 * hc);
    add_key_slots(page, hc, head, mine, queries, s.turned, s.scores + 16 * hc);
  }
}

// Four queries' products of sixteen tokens, by token: quad 4 j + g is of token 4 g + j.
INLINE void by_token(const float* weights, int queries, vf residual, float* out) {
  vf x[4];
  for (int q = 0; q < 4; q++)
    x[q] = q < queries ? load<vf>(weights + 64 * q) * residual : vf{};
#define LOW 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29
#define HIGH 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31
#define FIRST 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define SECOND 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
  vf low = SHUFFLE(x[0], x[1], LOW), other_low = SHUFFLE(x[2], x[3], LOW);
  vf high = SHUFFLE(x[0], x[1], HIGH), other_high = SHUFFLE(x[2], x[3], HIGH);
  store(out, SHUFFLE(low, other_low, FIRST));
  store(out + 16, SHUFFLE(low, other_low, SECOND));
  store(out + 32, SHUFFLE(high, other_high, FIRST));
  store(out + 48, SHUFFLE(high, other_high, SECOND));
#undef LOW
#undef HIGH
#undef FIRST
#undef SECOND
}

// A slot of every token: its weighted residual, to the sum of its channel.
INLINE void add_value_slot(const uint8_t* page, int slot, int queries, uint64_t seen, Scratch& s) {
  const uint8_t* index = page + VALUE_SLOT_INDEX + sizeof(ValueIndex) * 64 * slot;
  int width = Scratch::width(queries);
  for (int first = 0; first < 64; first += 16) {
    vf residual = load_halves(page + VALUE_SLOT_RESIDUAL + 2 * (64 * slot + first));
    for (int q = 0; q < queries; q += 4) {
      alignas(64) float products[64];
      by_token(s.scores + 64 * q + first, queries - q, residual, products);
      for (int i = 0; i < 16; i++) {
        if (~seen && !(seen >> (first + i) & 1)) continue;
        ValueIndex channel;
        std::memcpy(&channel, index + sizeof(ValueIndex) * (first + i), sizeof channel);
        float* to = s.slot_sums + channel * width + q;
        store(to, load<quad>(to) + load<quad>(products + 16 * (i & 3) + 4 * (i >> 2)));
      }
    }
  }
}

// Weights p [queries][64] times token scales, values, zeros and slots into the running sums.
// `seen` says which tokens any query sees: what the others hold counts for nothing.
INLINE void add_values(const uint8_t* page, const Head& head, int queries, const uint64_t seen,
                       float* zeros, float* units, Scratch& s) {
  alignas(64) float scale[64], zero[64];
  for (int i = 0; i < 4; i++) {
    vf x = load_halves(page + VALUE_SCALE_ZERO + 64 * i);
    vf y = load_halves(page + VALUE_SCALE_ZERO + 64 * i + 32);
    store(scale + 16 * i, SHUFFLE(x, y, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30));
    store(zero + 16 * i, SHUFFLE(x, y, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31));
  }
  if (~seen)
    for (int i = 0; i < 64; i++)
      if (!(seen >> i & 1)) scale[i] = zero[i] = 0;
  for (int q = 0; q < queries; q++) {
    vf sum = {};
    alignas(64) float scaled[64];
    for (int i = 0; i < 64; i += 16) {
      vf p = load<vf>(s.scores + 64 * q + i);
      sum += p * load<vf>(zero + i);
      store(scaled + i, p * load<vf>(scale + i));
    }
    zeros[q] += total(sum);
#if BYTE_VALUES
    units[q] = byte_weights(scaled, reinterpret_cast<uint8_t*>(s.weights) + 128 * q);
#else
    lane_weights(scaled, s.weights + 64 * q);
    lane_weights(scaled + 32, s.weights + 64 * q + 32);
#endif
  }
#if BYTE_VALUES
  for (int half = 0; half < 2; half++)
    add_bytes(page, half, head.value_table, reinterpret_cast<const uint8_t*>(s.weights), units,
              queries, s.sums);
#else
  for (int hc = 0; hc < 4; hc++)
    unpack_values(page, hc >> 1, hc & 1, head.value_table, s.weights + 32 * (hc >> 1), queries,
                  s.sums);
#endif
  for (int slot = 0; slot < VALUE_SLOTS; slot++)
    add_value_slot(page, slot, queries, seen, s);
}
