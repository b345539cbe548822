#include "threads.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "common.h"

namespace erollout {
namespace {

constexpr int kSpins = 2000;  // pauses before a waiting thread sleeps: some tens of microseconds

std::atomic<int> forks{0};

void count_forks() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1); });
  (void)registered;
}

// Wait until ready(): first spinning, then asleep on the condition, whose waker must hold the mutex to change it.
template <class Ready>
void wait(std::mutex& mutex, std::condition_variable& condition, Ready ready) {
  for (int spin = 0; spin < kSpins; ++spin) {
    if (ready()) return;
    _mm_pause();
  }
  std::unique_lock<std::mutex> lock(mutex);
  condition.wait(lock, ready);
}

}  // namespace

struct Threads::Pool {
  explicit Pool(int workers) : fork_of(forks.load()) {
    for (int i = 0; i < workers; ++i) threads.emplace_back([this] { work(); });
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex);
      stop.store(true);
    }
    start.notify_all();
    for (auto& thread : threads) thread.join();
  }

  void run(int64_t tasks, Task task, void* context) {
    {
      std::lock_guard<std::mutex> lock(mutex);
      job_task = task;
      job_context = context;
      job_tasks = tasks;
      next.store(0);
      running.store(static_cast<int>(threads.size()));
      round.fetch_add(1);
    }
    start.notify_all();
    take_tasks();
    wait(mutex, done, [this] { return running.load() == 0; });
  }

  void work() {
    uint64_t seen = 0;
    for (;;) {
      wait(mutex, start, [this, seen] { return stop.load() || round.load() != seen; });
      if (stop.load()) return;
      ++seen;  // run() returns only when all workers have taken part: no round is skipped
      take_tasks();
      if (running.fetch_sub(1) == 1) {
        std::lock_guard<std::mutex> lock(mutex);
        done.notify_one();
      }
    }
  }

  void take_tasks() {
    for (int64_t task = next.fetch_add(1); task < job_tasks; task = next.fetch_add(1)) job_task(job_context, task);
  }

  const int fork_of;
  std::mutex mutex;
  std::condition_variable start, done;
  std::atomic<uint64_t> round{0};
  std::atomic<bool> stop{false};
  std::atomic<int> running{0};
  std::atomic<int64_t> next{0};
  Task job_task = nullptr;
  void* job_context = nullptr;
  int64_t job_tasks = 0;
  std::vector<std::thread> threads;
};

Threads::Threads(int count) : count_(count < 1 ? 1 : count) { count_forks(); }

Threads::~Threads() {
  if (pool_ && pool_->fork_of == forks.load()) delete pool_;  // a parent's pool is not ours to join
}

void Threads::run(int64_t tasks, Task task, void* context) {
  if (!pool_ || pool_->fork_of != forks.load()) pool_ = new Pool(count_ - 1);
  pool_->run(tasks, task, context);
}

}  // namespace erollout

extern "C" {

void* erollout_threads_create(int32_t count) { return new (std::nothrow) erollout::Threads(count); }

void erollout_threads_destroy(void* threads) { delete static_cast<erollout::Threads*>(threads); }
}
