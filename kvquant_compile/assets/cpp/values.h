// Values of a page times weights. Fragment order gives a vector four channels of four tokens each;
// sums keep the four tokens apart until the end.
constexpr int VALUE_SUMS = 2 * (VALUE_CHANNELS / 16) * 2;  // vectors a query: half, pair of channels

// Two channels (low bit r) of eight tokens t: selectors of either token bit.
template <class Levels>
INLINE void add_channels(Levels levels, const float* weights, int queries, int sum, float* sums) {
  vf x[2][8];
#pragma GCC unroll 2
  for (int xy = 0; xy < 2; xy++)
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) x[xy][i] = levels(xy, i);
  for (int q = 0; q < queries; q++) {
    float* at = sums + (q * VALUE_SUMS + sum) * 16;
    const float* w = weights + q * 64;
    vf even = load<vf>(at), odd = load<vf>(at + 16);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {  // token bits: ih, xy, il
      vf weight = repeat4(w + 4 * i);
      int bit = i >> 1 & 1, nibble = (i >> 2) * 2 + (i & 1);
      even += x[bit][nibble] * weight;
      odd += x[bit][4 + nibble] * weight;
    }
    store(at, even);
    store(at + 16, odd);
  }
}

// Weights of 32 tokens from order (t, i) into (i, t), as the lanes want them.
INLINE void lane_weights(const float* in, float* out) {
  vf a = load<vf>(in), b = load<vf>(in + 16);
  store(out, SHUFFLE(a, b, 0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27));
  store(out + 16, SHUFFLE(a, b, 4, 12, 20, 28, 5, 13, 21, 29, 6, 14, 22, 30, 7, 15, 23, 31));
}
