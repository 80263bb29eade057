// Vectors of sixteen 32-bit elements. Compilers lower them to whatever the machine has; only table
// lookups, half-precision loads and broadcasts of four elements are spelt out per instruction set.
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

typedef float vf __attribute__((vector_size(64), may_alias));
typedef int32_t vi __attribute__((vector_size(64), may_alias));
typedef uint32_t vu __attribute__((vector_size(64), may_alias));
typedef float quad __attribute__((vector_size(16), may_alias));

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif

template <class V> INLINE V load(const void* at) {
  V x;
  std::memcpy(&x, at, sizeof x);
  return x;
}
template <class V> INLINE void store(void* at, V x) { std::memcpy(at, &x, sizeof x); }
INLINE vf splat(float x) { return vf{} + x; }
INLINE vf choose(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }
INLINE vf larger(vf a, vf b) { return choose(a > b, a, b); }

// Every element meets the one 8, 4, 2, 1 places on.
#define FOLD(x, op)                                                                        \
  x = op(x, SHUFFLE(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));          \
  x = op(x, SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));          \
  x = op(x, SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));          \
  x = op(x, SHUFFLE(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
INLINE vf sum_of(vf a, vf b) { return a + b; }
INLINE float total(vf x) {
  FOLD(x, sum_of)
  return x[0];
}
INLINE float largest(vf x) {
  FOLD(x, larger)
  return x[0];
}
INLINE vi both(vi a, vi b) { return a & b; }
INLINE bool all(vi mask) {
  FOLD(mask, both)
  return mask[0] != 0;
}

// Four floats, four times.
INLINE vf repeat4(const float* at) {
#ifdef __AVX512F__
  return (vf)_mm512_broadcast_f32x4(_mm_loadu_ps(at));
#else
  quad x = load<quad>(at);
  return vf{x[0], x[1], x[2], x[3], x[0], x[1], x[2], x[3],
            x[0], x[1], x[2], x[3], x[0], x[1], x[2], x[3]};
#endif
}

// Sixteen float16.
INLINE vf load_halves(const uint8_t* at) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)at));
#else
  vf out;
  for (int i = 0; i < 16; i++) {
    uint16_t h;
    std::memcpy(&h, at + 2 * i, 2);
    out[i] = half_to_float(h);
  }
  return out;
#endif
}

// Entries of a table of sixteen by the low four bits of every index; the bits above may be anything.
INLINE vf lookup(vf table, vu index) {
#if defined(__AVX512F__)
  return (vf)_mm512_permutexvar_ps((__m512i)index, (__m512)table);
#elif defined(__AVX2__)
  const __m256* halves = (const __m256*)&table;
  const __m256i* parts = (const __m256i*)&index;
  vf out;
  for (int i = 0; i < 2; i++) {
    __m256 low = _mm256_permutevar8x32_ps(halves[0], parts[i]);
    __m256 high = _mm256_permutevar8x32_ps(halves[1], parts[i]);
    __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(parts[i], 28));
    ((__m256*)&out)[i] = _mm256_blendv_ps(low, high, upper);
  }
  return out;
#else
  vf out;
  for (int i = 0; i < 16; i++) out[i] = table[index[i] & 15];
  return out;
#endif
}

// Elements of an array by index.
INLINE vf gather(const float* from, vi index) {
#if defined(__AVX512F__)
  return (vf)_mm512_i32gather_ps((__m512i)index, from, 4);
#else
  vf out;
  for (int i = 0; i < 16; i++) out[i] = from[index[i]];
  return out;
#endif
}

// Words of sixteen lanes that hold 4, 2 or 1 consecutive words each.
INLINE void load_words4(const uint8_t* at, vu& a, vu& b, vu& c, vu& d) {
  vu x0 = load<vu>(at), x1 = load<vu>(at + 64), x2 = load<vu>(at + 128), x3 = load<vu>(at + 192);
#define EVEN 0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29
#define ODD 2, 6, 10, 14, 18, 22, 26, 30, 3, 7, 11, 15, 19, 23, 27, 31
  vu ab0 = SHUFFLE(x0, x1, EVEN), ab1 = SHUFFLE(x2, x3, EVEN);
  vu cd0 = SHUFFLE(x0, x1, ODD), cd1 = SHUFFLE(x2, x3, ODD);
#undef EVEN
#undef ODD
  a = SHUFFLE(ab0, ab1, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
  b = SHUFFLE(ab0, ab1, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  c = SHUFFLE(cd0, cd1, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
  d = SHUFFLE(cd0, cd1, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}
INLINE void load_words2(const uint8_t* at, vu& a, vu& b) {
  vu x0 = load<vu>(at), x1 = load<vu>(at + 64);
  a = SHUFFLE(x0, x1, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  b = SHUFFLE(x0, x1, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}
INLINE void load_words1(const uint8_t* at, vu& a) { a = load<vu>(at); }

// e**x to 2e-7 for x <= 0; exactly 0 below -87.
INLINE vf exponential(vf x) {
  vf n = x * 1.44269504f + 12582912.0f;  // the whole part sits in the low bits
  vi whole = (vi)n - 0x4b400000;
  n -= 12582912.0f;
  vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vf p = r * (1.0f / 720) + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = (p * r + 1.0f) * r + 1.0f;
  vf out = (vf)((vi)p + (whole << 23));
  return choose(x > splat(-87.0f), out, vf{});
}

INLINE vf hyperbolic_tangent(vf x) {
  vf size = larger(x, -x);
  vf e = exponential(size * -2.0f);
  vf out = (1.0f - e) / (1.0f + e);
  vf square = x * x;  // no cancellation near 0
  vf small = size * (1.0f + square * (-1.0f / 3 + square * (2.0f / 15)));
  out = choose(size < splat(0.06f), small, out);
  out = choose(x < vf{}, -out, out);
  return choose(x == x, out, x);
}

// Cosines and sines of angles in units of 2**-32 turns, to 1e-7.
INLINE void turn(vu angle, vf& cosine, vf& sine) {
  vu quadrant = (angle + 0x20000000u) >> 30;
  vi rest = (vi)(angle - (quadrant << 30));
  vf x = __builtin_convertvector(rest, vf) * 1.46291808e-9f;  // 2 pi / 2**32
  vf y = x * x;
  vf s = ((y * (-1.0f / 5040) + 1.0f / 120) * y - 1.0f / 6) * y * x + x;
  s += x * y * y * y * y * (1.0f / 362880);
  vf c = (((y * (1.0f / 40320) - 1.0f / 720) * y + 1.0f / 24) * y - 0.5f) * y + 1.0f;
  vi swap = -(vi)(quadrant & 1u);
  vf first = choose(swap, s, c), second = choose(swap, c, s);
  cosine = (vf)((vu)first ^ (((quadrant + 1u) & 2u) << 30));
  sine = (vf)((vu)second ^ ((quadrant & 2u) << 30));
}
