// Attention of a few queries to all pages of a cache: tasks, their softmax, and the merge.
struct Arguments {
  // shapes
  int32_t batch, heads, rep, steps, value_dim, sinks, table_row, position_row, slabs, window;
  int32_t exact, threads, ring, exact_type;
  float softcap;
  // of the step, contiguous; channels of keys and queries: members a, then b, pairs in lane order
  const float *query;       // [batch, heads, rep, steps, 2 PAIRS]
  const float *own_keys;    // [batch, heads, steps, 2 PAIRS], rotated
  const float *own_values;  // [batch, heads, steps, VALUE_DIM]
  const float *sink_keys;   // [batch, heads, sinks, 2 PAIRS], not rotated
  const float *sink_values;
  const float *sink_logits;  // [heads, rep] or null
  const uint8_t *exact_rows;  // [batch, heads, sinks + ring + 1, KEY_DIM + VALUE_DIM], see exact.h
  const int64_t *pair_channels;  // [2 PAIRS], channel of an exact row at every place of lane order
  const int32_t *slots;      // [batch, steps]
  const int32_t *history;    // [batch]
  const int32_t *table;      // [batch, table_row]
  const int32_t *positions;  // [batch, position_row]
  const uint8_t *const *slab;
  const int64_t *slab_pages;
  // of the layer
  const float *key_table, *key_zero, *key_ratio, *key_inverse, *key_scale;
  const float *value_table, *gain, *offset;
  Rotation rope;
  // results
  float *output;  // [batch, steps, heads * rep, VALUE_DIM]
  float *lse;     // [batch, heads * rep, steps]
  Parallel parallel;
};

struct Task {
  int row, head, first, end;  // pages; first < 0: exact tokens
};

// What a task found for one query: maximum, mass, and the weighted sum of values.
struct Part {
  float peak, mass;
};

constexpr float NOTHING = -INFINITY;

INLINE bool page_address(const Arguments& a, int64_t id, const uint8_t*& out) {
  for (int i = 0; i < a.slabs; i++) {
    if (id < a.slab_pages[i]) {
      out = a.slab[i] + id * a.heads * PAGE_BYTES;
      return true;
    }
    id -= a.slab_pages[i];
  }
  return false;
}

// Tokens of a row that are stored: those before the step, or those after it.
INLINE int stored_of(const Arguments& a, int row) {
  int limit = a.history[row];
  if (!a.exact)
    for (int s = 0; s < a.steps; s++) limit = std::max(limit, a.slots[row * a.steps + s] + 1);
  return limit;
}

// First token of a row that its ring of exact last tokens holds.
INLINE int held_from(const Arguments& a, int row) {
  if (!a.ring) return INT32_MAX;
  int32_t first;
  std::memcpy(&first, ring_state(a, a.exact_rows, row), sizeof first);
  return first;
}

// Tokens of a row that pages give.
INLINE int limit_of(const Arguments& a, int row) {
  return std::min(stored_of(a, row), held_from(a, row));
}

INLINE float product(const float* x, const float* y) {
  vf sum = {};
  for (int c = 0; c < 2 * PAIRS; c += 16) sum += load<vf>(x + c) * load<vf>(y + c);
  return total(sum);
}

// Adds scores and their weights to a softmax: scores become weights, sums are brought to the new
// maximum by `decay`.
INLINE float absorb(float* scores, int count, Part& part) {
  vf top = splat(part.peak);
  vi numbers = top == top;
  for (int i = 0; i < count; i += 16) {
    vf x = load<vf>(scores + i);
    top = larger(x, top);
    numbers &= x == x;
  }
  float peak = all(numbers) ? largest(top) : NAN;
  float decay = 1;
  if (peak != part.peak) {
    decay = part.peak == NOTHING ? 0 : std::exp(part.peak - peak);
    part.peak = peak;
  }
  vf shift = splat(peak == NOTHING ? 0.0f : peak), mass = {};
  for (int i = 0; i < count; i += 16) {
    vf p = exponential(load<vf>(scores + i) - shift);
    store(scores + i, p);
    mass += p;
  }
  part.mass = part.mass * decay + total(mass);
  return peak == peak ? decay : NAN;
}

INLINE void cap(float* scores, int count, float softcap) {
  for (int i = 0; i < count; i += 16)
    store(scores + i, hyperbolic_tangent(load<vf>(scores + i) * (1 / softcap)) * softcap);
}

// Which of a page's tokens the query at `slot` sees.
INLINE uint64_t visible(const Arguments& a, int first, int slot, int limit, uint64_t shown) {
  int low = a.window ? std::max(a.sinks, slot - a.window + 1) : a.sinks;
  int end = std::min(slot + 1, limit);
  int from = std::max(low - first, 0), to = std::min(end - first, 64);
  if (from >= to) return 0;
  uint64_t up_to = to == 64 ? ~0ull : (1ull << to) - 1;
  return up_to & ~((1ull << from) - 1) & shown;
}

// Positions of a page's tokens.
struct Places {
  int32_t first;     // of its first token
  bool even;         // whether they are consecutive
  uint64_t shown;    // tokens that are not hidden
  int32_t away[64];  // from the first; set where they are not even
  Places(const int32_t* where, int tokens) : first(where[0]), even(tokens >= 64 && first >= 0) {
    vi step = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, same = step == step;
    for (int i = 0; i < 64; i += 16) same &= load<vi>(where + i) == step + (first + i);
    shown = ~0ull;
    even = even && all(same);
    if (even) return;
    first = first < 0 ? -1 - first : first;
    even = true;
    for (int i = 0; i < 64; i++) {
      int32_t at = where[i] < 0 ? -1 - where[i] : where[i];
      if (where[i] < 0) shown &= ~(1ull << i);
      away[i] = i < tokens ? at - first : i;
      even &= away[i] == i;
    }
  }
};

static void attend_pages(const Arguments& a, const Task& task, Part* parts, float* sums) {
  int queries = a.rep * a.steps, width = Scratch::width(queries);
  const int32_t *slots = a.slots + task.row * a.steps, *table = a.table + task.row * a.table_row;
  const int32_t* positions = a.positions + int64_t(task.row) * a.position_row;
  const float* query = a.query + int64_t(task.row * a.heads + task.head) * queries * 2 * PAIRS;
  const float* scale = a.key_scale + task.head * PAIRS;
  Head head = {{a.key_table + 256 * task.head, a.key_zero + 2 * PAIRS * task.head,
                a.key_ratio + PAIRS * task.head, a.key_inverse + 2 * PAIRS * task.head},
               a.value_table + 256 * task.head, a.gain + a.value_dim * task.head,
               a.offset + a.value_dim * task.head};
  Scratch s(queries);
  std::vector<float> zeros(queries, 0.0f), units(queries);
  std::vector<uint64_t> masks(queries);
  int limit = limit_of(a, task.row);
  if (!TURNING_QUADS) turn_queries(query, scale, queries, a.rope, 0, s.turned);
  for (int page = task.first; page < task.end; page++) {
    Places places(positions + 64 * page, limit - 64 * page);
    uint64_t seen = 0;
    bool whole = true;
    for (int q = 0; q < queries; q++) {
      masks[q] = visible(a, 64 * page, slots[q % a.steps], limit, places.shown);
      seen |= masks[q];
      whole &= masks[q] == ~0ull;
    }
    const uint8_t* at;
    if (!seen || !page_address(a, table[page], at)) continue;
    at += task.head * PAGE_BYTES;
    const float* turns = a.rope.offsets;
    if (TURNING_QUADS) {
      turn_queries(query, scale, queries, a.rope, places.first, s.turned);
      if (!places.even) {
        make_turns(a.rope, places.away, s.turns);
        turns = s.turns;
      }
    }
    page_scores(at, head, turns, queries, s);
    if (a.softcap) cap(s.scores, 64 * queries, a.softcap);
    for (int q = 0; q < queries; q++) {
      float* mine = s.scores + 64 * q;
      if (!whole)
        for (int i = 0; i < 64; i++)
          if (!(masks[q] >> i & 1)) mine[i] = NOTHING;
      float decay = absorb(mine, 64, parts[q]);
      if (decay == 1) continue;
      zeros[q] *= decay;
      for (int i = 0; i < VALUE_SUMS; i++) {
        float* to = s.sums + (q * VALUE_SUMS + i) * 16;
        store(to, load<vf>(to) * decay);
      }
      if (VALUE_SLOTS)
        for (int c = 0; c < VALUE_CHANNELS; c++) s.slot_sums[c * width + q] *= decay;
    }
    add_values(at, head, queries, seen, zeros.data(), units.data(), s);
  }
  for (int q = 0; q < queries; q++)
    for (int i = 0; i < VALUE_SUMS; i++)
      for (int g = 0; g < 4; g++) {
        int r = i & 1, mt = i / 2 % (VALUE_CHANNELS / 16), half = i / 2 / (VALUE_CHANNELS / 16);
        int channel = (4 * half + g) * (VALUE_CHANNELS / 8) + 2 * mt + r;
        if (channel >= a.value_dim) continue;
        const float* x = s.sums + (q * VALUE_SUMS + i) * 16 + 4 * g;
        float sum = x[0] + x[1] + x[2] + x[3] + zeros[q];
        if (VALUE_SLOTS) sum += s.slot_sums[channel * width + q];
        sums[q * a.value_dim + channel] =
            head.gain[channel] * sum + head.offset[channel] * parts[q].mass;
      }
}

// Exact stored tokens of a row and head: leading ones, then the last ones.
struct Exact {
  int sinks, first, count;         // tokens 0 .. sinks - 1, then `first` and those that follow
  std::vector<float> keys, values;  // turned keys of all, values of the last ones
  int token(int i) const { return i < sinks ? i : first + i - sinks; }
  Exact(const Arguments& a, const Task& task, const int32_t* positions) : sinks(a.sinks) {
    int64_t place = int64_t(task.row) * a.heads + task.head;
    first = std::max(held_from(a, task.row), sinks);
    count = sinks + (a.ring ? std::max(0, stored_of(a, task.row) - first) : 0);
    keys.resize(size_t(count) * 2 * PAIRS);
    values.resize(size_t(count - sinks) * a.value_dim);
    std::vector<float> ones(PAIRS, 1.0f), raw(2 * PAIRS), turned(2 * PAIRS);
    for (int i = 0; i < count && token(i) < a.position_row; i++) {
      const float* in = a.sink_keys + (place * sinks + i) * 2 * PAIRS;
      if (i >= sinks) {
        int64_t at = exact_line(a, place, sinks + token(i) % a.ring);
        for (int c = 0; c < 2 * PAIRS; c++)
          raw[c] = exact_element(a.exact_rows, a.exact_type, at + a.pair_channels[c]);
        for (int c = 0; c < a.value_dim; c++)
          values[(i - sinks) * a.value_dim + c] =
              exact_element(a.exact_rows, a.exact_type, at + KEY_DIM + c);
        in = raw.data();
      }
      int32_t position = positions[token(i)];
      position = position < 0 ? -1 - position : position;
      turn_queries(in, ones.data(), 1, a.rope, -position, turned.data());
      for (int pair = 0; pair < PAIRS; pair++)
        for (int member = 0; member < 2; member++)
          keys[i * 2 * PAIRS + member * PAIRS + pair] =
              turned[pair / 4 * 8 + 4 * member + pair % 4];
    }
  }
};

// Exact stored tokens and, where they are read exactly, the step's own.
static void attend_exact(const Arguments& a, const Task& task, Part* parts, float* sums) {
  int queries = a.rep * a.steps, own = a.exact ? a.steps : 0;
  int64_t place = int64_t(task.row) * a.heads + task.head;
  const int32_t* slots = a.slots + task.row * a.steps;
  const int32_t* positions = a.positions + int64_t(task.row) * a.position_row;
  const float* query = a.query + place * queries * 2 * PAIRS;
  Exact exact(a, task, positions);
  int limit = stored_of(a, task.row), count = exact.count + own, room = (count + 15) / 16 * 16;
  std::vector<float> scores(room + 16);
  for (int q = 0; q < queries; q++) {
    int step = q % a.steps, slot = slots[step];
    for (int i = 0; i < room; i++) {
      bool stored = i < exact.count, seen = i < count && slot >= 0;
      int token = stored ? exact.token(i) : i - exact.count;
      if (stored)
        seen = seen && token <= slot && token < limit && positions[token] >= 0 &&
               (!a.window || token > slot - a.window);
      else if (i < count)
        seen = seen && token <= step && slots[token] >= 0 &&
               (!a.window || slots[token] > slot - a.window);
      scores[i] = NOTHING;
      if (!seen) continue;
      const float* key = stored ? exact.keys.data() + i * 2 * PAIRS
                                : a.own_keys + (place * a.steps + token) * 2 * PAIRS;
      float sum = product(key, query + q * 2 * PAIRS);
      scores[i] = a.softcap ? std::tanh(sum / a.softcap) * a.softcap : sum;
    }
    absorb(scores.data(), room, parts[q]);
    float* to = sums + q * a.value_dim;
    for (int i = 0; i < count; i++) {
      if (scores[i] == 0) continue;
      const float* value = a.own_values + (place * a.steps + i - exact.count) * a.value_dim;
      if (i < a.sinks) value = a.sink_values + (place * a.sinks + i) * a.value_dim;
      else if (i < exact.count) value = exact.values.data() + (i - a.sinks) * a.value_dim;
      for (int c = 0; c < a.value_dim; c++) to[c] += scores[i] * value[c];
    }
  }
}

// Tasks of every row and head: its exact tokens, then shares of its pages.
static std::vector<Task> tasks_of(const Arguments& a) {
  std::vector<Task> tasks;
  int64_t pages = 0;
  for (int row = 0; row < a.batch; row++) pages += (limit_of(a, row) + 63) / 64;
  int64_t share = std::max<int64_t>(8, pages * a.heads / (4 * a.threads) + 1);
  if (a.threads == 1) share = INT32_MAX;
  for (int row = 0; row < a.batch; row++) {
    int limit = limit_of(a, row), oldest = INT32_MAX, newest = -1;
    for (int s = 0; s < a.steps; s++) {
      int slot = a.slots[row * a.steps + s];
      if (slot >= 0) oldest = std::min(oldest, slot);
      newest = std::max(newest, slot);
    }
    int end = newest < 0 ? 0 : (std::min(limit, newest + 1) + 63) / 64;
    int begin = a.window && newest >= 0 ? std::max(0, oldest - a.window + 1) / 64 : 0;
    for (int head = 0; head < a.heads; head++) {
      tasks.push_back({row, head, -1, -1});
      for (int64_t at = begin; at < end; at += share)
        tasks.push_back({row, head, int(at), int(std::min<int64_t>(end, at + share))});
    }
  }
  return tasks;
}

struct Run {
  const Arguments& a;
  const std::vector<Task>& tasks;
  std::vector<Part>& parts;
  std::vector<float>& sums;
};

// Joins the parts of a row and head, normalises, and takes learned logits in.
static void merge(const Run& run, size_t first, size_t end) {
  const Arguments& a = run.a;
  int queries = a.rep * a.steps;
  const Task& task = run.tasks[first];
  for (int q = 0; q < queries; q++) {
    int query_head = task.head * a.rep + q / a.steps, step = q % a.steps;
    bool real = a.slots[task.row * a.steps + step] >= 0;
    float logit = a.sink_logits ? a.sink_logits[query_head] : NOTHING;
    float peak = logit, mass = 0;
    for (size_t i = first; i < end; i++) peak = std::max(run.parts[i * queries + q].peak, peak);
    for (size_t i = first; i < end; i++)
      if (run.parts[i * queries + q].peak != run.parts[i * queries + q].peak) peak = NAN;
    if (peak == NOTHING) peak = 0;
    if (a.sink_logits) mass = std::exp(logit - peak);
    float* out = a.output +
                 ((int64_t(task.row) * a.steps + step) * a.heads * a.rep + query_head) * a.value_dim;
    std::fill(out, out + a.value_dim, 0.0f);
    for (size_t i = first; i < end; i++) {
      const Part& part = run.parts[i * queries + q];
      if (part.peak == NOTHING) continue;
      float weight = std::exp(part.peak - peak);
      mass += weight * part.mass;
      const float* sums = run.sums.data() + (i * queries + q) * a.value_dim;
      for (int c = 0; c < a.value_dim; c++) out[c] += weight * sums[c];
    }
    bool any = real && !(mass == 0);
    for (int c = 0; c < a.value_dim; c++) out[c] = any ? out[c] / mass : 0;
    a.lse[(int64_t(task.row) * a.heads * a.rep + query_head) * a.steps + step] =
        any ? peak + std::log(mass) : NOTHING;
  }
}

extern "C" void attend(const Arguments* arguments) {
  const Arguments& a = *arguments;
  std::vector<Task> tasks = tasks_of(a);
  std::vector<Part> parts(tasks.size() * a.rep * a.steps, Part{NOTHING, 0});
  std::vector<float> sums(tasks.size() * a.rep * a.steps * a.value_dim, 0.0f);
  auto body = [&](size_t i) {
    int queries = a.rep * a.steps;
    (tasks[i].first < 0 ? attend_exact : attend_pages)(
        a, tasks[i], parts.data() + i * queries, sums.data() + i * queries * a.value_dim);
  };
  for_each(tasks.size(), a.threads, a.parallel, body);
  Run run{a, tasks, parts, sums};
  for (size_t first = 0; first < tasks.size();) {
    size_t end = first + 1;
    while (end < tasks.size() && tasks[end].first >= 0) end++;
    merge(run, first, end);
    first = end;
  }
}
