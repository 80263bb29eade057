// Work that threads take from a counter, on the pool of torch's OpenMP runtime where it has one.
#include <atomic>
#include <cstddef>
#include <thread>
#include <vector>

typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);

template <class Body>
struct Work {
  const Body& body;
  size_t count;
  std::atomic<size_t> next{0};
  static void take(void* data) {
    Work& work = *static_cast<Work*>(data);
    for (size_t i; (i = work.next.fetch_add(1)) < work.count;) work.body(i);
  }
};

// body(i) for every i < count.
template <class Body>
static void for_each(size_t count, unsigned threads, Parallel parallel, const Body& body) {
  Work<Body> work{body, count};
  if (threads > count) threads = unsigned(count);
  if (threads <= 1) return Work<Body>::take(&work);
  if (parallel) return parallel(Work<Body>::take, &work, threads, 0);
  std::vector<std::thread> others;
  for (unsigned i = 1; i < threads; i++) others.emplace_back(Work<Body>::take, &work);
  Work<Body>::take(&work);
  for (auto& thread : others) thread.join();
}
