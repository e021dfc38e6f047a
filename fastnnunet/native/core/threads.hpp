// Loops over independent pieces of work, on OpenMP threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace fastnnunet {

// GNU's OpenMP hangs when a forked child uses the thread pool its parent had started. Such a child works on one thread.
inline bool pool_belongs_to_parent() {
#if defined(__unix__) || defined(__APPLE__)
    static std::atomic<pid_t> owner{0};
    pid_t expected = 0;
    const pid_t me = getpid();
    return !owner.compare_exchange_strong(expected, me) && expected != me;
#else
    return false;
#endif
}

// `requested` threads; 0: as many as OpenMP would take (the cores this process may use, or OMP_NUM_THREADS).
inline int thread_count(int requested, std::int64_t pieces) {
#ifdef _OPENMP
    std::int64_t threads = requested > 0 ? requested : omp_get_max_threads();
    if (threads > pieces) threads = pieces;
    return threads <= 1 || pool_belongs_to_parent() ? 1 : static_cast<int>(threads);
#else
    (void)requested;
    (void)pieces;
    return 1;
#endif
}

// body(i, scratch) for i in [0, pieces); every thread has a Scratch of its own. Rethrows the first exception.
template <class Scratch, class Body>
void parallel_for(std::int64_t pieces, int threads, const Body& body) {
    std::exception_ptr failure;
    std::atomic<bool> failed{false};
    threads = thread_count(threads, pieces);
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
#endif
    {
        Scratch scratch;
#ifdef _OPENMP
#pragma omp for schedule(dynamic)
#endif
        for (std::int64_t i = 0; i < pieces; ++i) {
            if (failed.load(std::memory_order_relaxed)) continue;
            try {
                body(i, scratch);
            } catch (...) {
                if (!failed.exchange(true)) failure = std::current_exception();
            }
        }
    }
    if (failure) std::rethrow_exception(failure);
}

struct NoScratch {};

template <class Body>
void parallel_for(std::int64_t pieces, int threads, const Body& body) {
    parallel_for<NoScratch>(pieces, threads, [&](std::int64_t i, NoScratch&) { body(i); });
}

}  // namespace fastnnunet
