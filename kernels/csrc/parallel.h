// Tasks 0 .. count-1 over `threads` threads; which thread runs a task never changes a result.
//
// The threads are those of PyTorch's own OpenMP pool: the caller passes the address of GOMP_parallel,
// the entry point GCC's and LLVM's runtimes share, found in the running process. A second OpenMP
// runtime would oversubscribe the cores (idle workers of the first spin), and own threads would too.
// Where there is none, or in a forked child, whose pool has lost its threads and would wait for them
// for ever, plain threads are started for the call. ctypes has released the GIL.

#pragma once

#include <atomic>
#include <pthread.h>
#include <stdint.h>

typedef void (*OpenMP)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

struct Team {
  int64_t threads;
  OpenMP openmp;  // null: plain threads
};

template <class Body>
struct Job {
  std::atomic<int64_t> next;
  int64_t count;
  const Body* body;
};

template <class Body>
static void work(void* data) {
  Job<Body>& job = *(Job<Body>*)data;
  for (int64_t i; (i = job.next.fetch_add(1)) < job.count;) (*job.body)(i);
}

template <class Body>
static void parallel_for(const Team& team, int64_t count, const Body& body) {
  Job<Body> job{{0}, count, &body};
  const int64_t threads = team.threads < count ? team.threads : count;
  if (threads <= 1) {
    work<Body>(&job);
  } else if (team.openmp) {
    team.openmp(work<Body>, &job, (unsigned)threads, 0);
  } else {
    constexpr int64_t MOST = 256;
    pthread_t started[MOST];
    int64_t n = 0;
    auto entry = [](void* data) -> void* {
      work<Body>(data);
      return nullptr;
    };
    while (n < threads - 1 && n < MOST && !pthread_create(&started[n], nullptr, entry, &job)) n++;
    work<Body>(&job);  // finishes alone whatever could not be started
    while (n) pthread_join(started[--n], nullptr);
  }
}
