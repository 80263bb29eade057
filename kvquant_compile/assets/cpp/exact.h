// Rows of exact tokens beside the pages, in the model's dtype: leading tokens, a ring of the last
// ones, and a row that begins with two int32: the first token in the ring, and the one after its
// last. The rules are those of the torch path.
enum ExactType { FLOAT32, FLOAT16, BFLOAT16 };

template <class A> INLINE int64_t exact_lines(const A& a) {
  return a.sinks + (a.ring ? a.ring + 1 : 0);
}

INLINE int exact_bytes(int type) { return type == FLOAT32 ? 4 : 2; }

// Where the bytes are that say what the ring of a row holds.
template <class A, class Byte> INLINE Byte* ring_state(const A& a, Byte* rows, int row) {
  int64_t line = (int64_t(row) * a.heads + 1) * exact_lines(a) - 1;
  return rows + line * (KEY_DIM + a.value_dim) * exact_bytes(a.exact_type);
}

// First element of a line of the row and head number `place`.
template <class A> INLINE int64_t exact_line(const A& a, int64_t place, int line) {
  return (place * exact_lines(a) + line) * (KEY_DIM + a.value_dim);
}

INLINE float exact_element(const uint8_t* rows, int type, int64_t at) {
  float x;
  if (type == FLOAT32) {
    std::memcpy(&x, rows + 4 * at, 4);
    return x;
  }
  uint16_t half;
  std::memcpy(&half, rows + 2 * at, 2);
  if (type == FLOAT16) return half_to_float(half);
  uint32_t bits = uint32_t(half) << 16;
  std::memcpy(&x, &bits, 4);
  return x;
}
