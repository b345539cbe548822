// A small persistent pool of threads. One thread is the caller alone: a plain loop without synchronisation.
#pragma once
#include <cstdint>
#include <type_traits>

namespace erollout {

class Threads {
 public:
  explicit Threads(int count);  // count >= 1, the caller included
  ~Threads();
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

  int count() const { return count_; }

  // Run function(task) for each task in [0, tasks) and return when all are done. Tasks go to threads in no fixed order.
  // Not reentrant: no parallel_for inside a task, one caller at a time. function must not throw.
  template <class Function>
  void parallel_for(int64_t tasks, Function&& function) {
    if (count_ == 1 || tasks <= 1) {
      for (int64_t task = 0; task < tasks; ++task) function(task);
      return;
    }
    using Plain = std::remove_reference_t<Function>;
    run(tasks, [](void* context, int64_t task) { (*static_cast<Plain*>(context))(task); },
        const_cast<void*>(static_cast<const void*>(&function)));
  }

 private:
  using Task = void (*)(void* context, int64_t task);
  struct Pool;
  void run(int64_t tasks, Task task, void* context);
  int count_;
  Pool* pool_ = nullptr;  // made at the first parallel call, and again in a forked child, whose parent keeps the threads
};

}  // namespace erollout
