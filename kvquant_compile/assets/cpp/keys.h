// Keys of sixteen tokens of a page: looked up, scaled and turned. Fragment order gives a vector four
// tokens of four pairs each. Token 4 g + i of the sixteen is lane group g of set i; a set holds
// its pairs four at a time, member a then member b.
struct HeadConstants {
  const float* table;    // [256] levels of key codes, repeated up to sixteen entries
  const float* zero;     // [2][PAIRS] key zeros, members a then b
  const float* ratio;    // [PAIRS] scale of member b over that of member a
  const float* inverse;  // [2 PAIRS] 1 / scale of member a, by channel in pair order
};

constexpr int SETS = 4, QUADS = PAIRS / 4;
constexpr int SET_FLOATS = QUADS * 32;

// Where pair `lane`'s member a of token set i starts.
INLINE float* key_at(float* keys, int set, int quad) { return keys + (set * QUADS + quad) * 32; }

// Cosines then sines of a set's turning pairs.
INLINE const float* turns_at(const float* turns, int set, int quad) {
  return turns + (set * TURNING_QUADS + quad) * 32;
}

// One vector of members a and b with their common rotation.
template <bool turns_round>
INLINE void put_pair(vf a, vf b, vf scale, const HeadConstants& head, int quad, const float* turns,
                     float* out) {
  a = a * scale + repeat4(head.zero + 4 * quad);
  b = (b * scale + repeat4(head.zero + PAIRS + 4 * quad)) * repeat4(head.ratio + 4 * quad);
  if (turns_round) {
    vf c = load<vf>(turns), s = load<vf>(turns + 16);
    vf turned = a * c - b * s;
    b = a * s + b * c;
    a = turned;
  }
  store(out, a);
  store(out + 16, b);
}

// Sixteen pairs: a selector of members a and one of members b.
template <bool turns_round, class Levels>
INLINE void put_slices(Levels levels, int tile, int quad, const vf* scales,
                       const HeadConstants& head, const float* turns, float* keys) {
#pragma GCC unroll 2
  for (int r = 0; r < 2; r++) {
    int set = 2 * tile + r;
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
      put_pair<turns_round>(levels(0, 4 * r + i), levels(1, 4 * r + i), scales[set], head,
                            quad + i, turns_at(turns, set, quad + i), key_at(keys, set, quad + i));
  }
}

// The last eight pairs of a head whose pairs are 8 modulo 16: one selector of both members.
template <bool turns_round, class Levels>
INLINE void put_last(Levels levels, int tile, int quad, const vf* scales, const HeadConstants& head,
                     const float* turns, float* keys) {
#pragma GCC unroll 2
  for (int r = 0; r < 2; r++) {
    int set = 2 * tile + r;
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++)
      put_pair<turns_round>(levels(0, 4 * r + i), levels(0, 4 * r + 2 + i), scales[set], head,
                            quad + i, turns_at(turns, set, quad + i), key_at(keys, set, quad + i));
  }
}

// Token scales of the four sets, each repeated over the lanes of its token.
INLINE void token_scales(const uint8_t* at, vf* out) {
  vf x = load_halves(at);
  out[0] = SHUFFLE(x, x, 0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12);
  out[1] = SHUFFLE(x, x, 1, 1, 1, 1, 5, 5, 5, 5, 9, 9, 9, 9, 13, 13, 13, 13);
  out[2] = SHUFFLE(x, x, 2, 2, 2, 2, 6, 6, 6, 6, 10, 10, 10, 10, 14, 14, 14, 14);
  out[3] = SHUFFLE(x, x, 3, 3, 3, 3, 7, 7, 7, 7, 11, 11, 11, 11, 15, 15, 15, 15);
}

// Sums over the four lanes of every token: sets 0..3 -> sixteen tokens in order.
INLINE vf sum_lanes(vf a, vf b, vf c, vf d) {
#define LOW 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29
#define HIGH 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31
  vf ab = SHUFFLE(a, b, LOW) + SHUFFLE(a, b, HIGH);
  vf cd = SHUFFLE(c, d, LOW) + SHUFFLE(c, d, HIGH);
#undef LOW
#undef HIGH
  return SHUFFLE(ab, cd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
         SHUFFLE(ab, cd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}

// Scores of sixteen tokens for COUNT queries [QUADS][2][4] each.
template <int COUNT>
INLINE void scores_of(const float* keys, const float* queries, float* scores) {
  vf sums[COUNT][SETS] = {};
  for (int quad = 0; quad < QUADS; quad++) {
    vf a[COUNT], b[COUNT];
    for (int q = 0; q < COUNT; q++) {
      a[q] = repeat4(queries + q * 2 * PAIRS + 8 * quad);
      b[q] = repeat4(queries + q * 2 * PAIRS + 8 * quad + 4);
    }
#pragma GCC unroll 4
    for (int set = 0; set < SETS; set++) {
      const float* at = keys + (set * QUADS + quad) * 32;
      vf x = load<vf>(at), y = load<vf>(at + 16);
#pragma GCC unroll 4
      for (int q = 0; q < COUNT; q++) sums[q][set] += a[q] * x, sums[q][set] += b[q] * y;
    }
  }
  for (int q = 0; q < COUNT; q++)
    store(scores + 64 * q, sum_lanes(sums[q][0], sums[q][1], sums[q][2], sums[q][3]));
}

INLINE void multiply_keys(const float* keys, const float* queries, int count, float* scores) {
  int q = 0;
  for (; q + 4 <= count; q += 4)
    scores_of<4>(keys, queries + q * 2 * PAIRS, scores + 64 * q);
  if (count - q == 3) scores_of<3>(keys, queries + q * 2 * PAIRS, scores + 64 * q);
  if (count - q == 2) scores_of<2>(keys, queries + q * 2 * PAIRS, scores + 64 * q);
  if (count - q == 1) scores_of<1>(keys, queries + q * 2 * PAIRS, scores + 64 * q);
}
