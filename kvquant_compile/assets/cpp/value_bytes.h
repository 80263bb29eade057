// Values of a page times weights in whole numbers, where the machine multiplies bytes: levels are
// bytes, a weight is two, in units of the page's largest over 65535. Products and sums are exact.
#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__) && VALUE_BITS_LOOKED_UP
#define BYTE_VALUES 1

// Levels of sixteen lanes for two channels (r) of four tokens each: offsets 0, 4, 1, 5.
INLINE void byte_levels(vu selector, __m512i table, __m512i& even, __m512i& odd) {
  __m512i s = (__m512i)selector;
  const __mmask32 upper = 0xaaaaaaaa;
  even = _mm512_mask_blend_epi16(upper, s, _mm512_slli_epi32(s, 12));
  odd = _mm512_mask_blend_epi16(upper, _mm512_srli_epi32(s, 16), _mm512_srli_epi32(s, 4));
  even = _mm512_permutexvar_epi8(even, table);
  odd = _mm512_permutexvar_epi8(odd, table);
}

// Weights [64] as bytes [chunk][high, low][xy][t][4]; returns what a unit is worth.
INLINE float byte_weights(const float* in, uint8_t* out) {
  vf top = {};
  for (int i = 0; i < 64; i += 16) top = larger(load<vf>(in + i), top);
  float most = largest(top);
  vf scale = splat(most > 0 ? 65535 / most : 0);
  alignas(64) uint8_t order[64];
  for (int i = 0; i < 64; i++) {
    int high = i < 32, xy = i >> 4 & 1, t = i >> 2 & 3, k = i & 3;
    order[i] = uint8_t(2 * (8 * t + 2 * xy + (k & 1) * 4 + (k >> 1)) + high);
  }
  for (int chunk = 0; chunk < 2; chunk++) {
    __m256i parts[2];
    for (int i = 0; i < 2; i++) {
      vf x = load<vf>(in + 32 * chunk + 16 * i) * scale;
      parts[i] = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32((__m512)x));
    }
    __m512i words = _mm512_inserti64x4(_mm512_castsi256_si512(parts[0]), parts[1], 1);
    words = _mm512_permutexvar_epi8(_mm512_load_si512(order), words);
    _mm512_storeu_si512(out + 64 * chunk, words);
  }
  return most / 65535;
}

// Two channels of all tokens: selectors of either token bit, of either chunk.
INLINE void add_byte_channels(vu a0, vu a1, vu b0, vu b1, __m512i table, const uint8_t* weights,
                              const float* units, int queries, int sum, float* sums) {
  __m512i even[4], odd[4];
  byte_levels(a0, table, even[0], odd[0]);
  byte_levels(a1, table, even[1], odd[1]);
  byte_levels(b0, table, even[2], odd[2]);
  byte_levels(b1, table, even[3], odd[3]);
  for (int q = 0; q < queries; q++) {
    float* at = sums + (q * VALUE_SUMS + sum) * 16;
    __m512i x = _mm512_setzero_si512(), y = x;
#pragma GCC unroll 2
    for (int low = 0; low < 2; low++) {
      x = _mm512_slli_epi32(x, 8);
      y = _mm512_slli_epi32(y, 8);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        const void* w = weights + 128 * q + 64 * (i >> 1) + 32 * low + 16 * (i & 1);
        __m512i weight = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)w));
        x = _mm512_dpbusd_epi32(x, weight, even[i]);
        y = _mm512_dpbusd_epi32(y, weight, odd[i]);
      }
    }
    store(at, load<vf>(at) + (vf)_mm512_cvtepi32_ps(x) * units[q]);
    store(at + 16, load<vf>(at + 16) + (vf)_mm512_cvtepi32_ps(y) * units[q]);
  }
}

INLINE __m512i byte_table(const float* levels) {
  alignas(64) int8_t table[64];
  for (int i = 0; i < 64; i++) table[i] = int8_t(levels[i & 15]);
  return _mm512_load_si512(table);
}
#else
#define BYTE_VALUES 0
#endif
