// The nine functions of libgomp that csrc/ calls, on pthreads alone: ThreadSanitizer sees what these do, and of libgomp's
// own barriers, which are futexes, nothing. A parallel region starts its threads anew, and its end waits for them. An
// iteration is handed out by a relaxed counter, which orders nothing between threads, as OpenMP promises nothing.
#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <vector>

namespace {

struct Team {
  explicit Team(int count) : count(count) { pthread_barrier_init(&barrier, nullptr, count); }
  ~Team() { pthread_barrier_destroy(&barrier); }
  const int count;
  pthread_barrier_t barrier;
  std::atomic<long> loops[64] = {};  // how far each dynamic loop of the region is
};

struct Place {
  Team* team = nullptr;
  int index = 0;
  int loop = -1;  // of team->loops
  long end = 0, step = 1, chunk = 1, start = 0;
};

thread_local Place here;

struct Job {
  void (*run)(void*);
  void* data;
  Team* team;
  int index;
};

void* work(void* pointer) {
  Job job = *static_cast<Job*>(pointer);
  Place before = here;
  here = Place{job.team, job.index};
  job.run(job.data);
  here = before;
  return nullptr;
}

int threads() {
  const char* text = getenv("OMP_NUM_THREADS");
  return text && atoi(text) > 0 ? atoi(text) : 3;
}

}  // namespace

extern "C" {

int omp_get_thread_num() { return here.index; }
int omp_get_num_threads() { return here.team ? here.team->count : 1; }
int omp_get_max_threads() { return threads(); }
int omp_get_num_procs() { return threads(); }

void GOMP_parallel(void (*run)(void*), void* data, unsigned count, unsigned) {
  Team team(here.team ? 1 : count ? static_cast<int>(count) : threads());
  std::vector<Job> jobs;
  for (int i = 0; i < team.count; ++i) jobs.push_back({run, data, &team, i});
  std::vector<pthread_t> others(team.count);
  for (int i = 1; i < team.count; ++i) pthread_create(&others[i], nullptr, work, &jobs[i]);
  work(&jobs[0]);
  for (int i = 1; i < team.count; ++i) pthread_join(others[i], nullptr);
}

void GOMP_barrier() {
  if (here.team) pthread_barrier_wait(&here.team->barrier);
}

bool GOMP_loop_nonmonotonic_dynamic_next(long* first, long* last) {
  long rounds = (here.end - here.start + here.step - (here.step > 0 ? 1 : -1)) / here.step;
  long at = here.team->loops[here.loop].fetch_add(here.chunk, std::memory_order_relaxed);
  if (at >= rounds) return false;
  long until = at + here.chunk < rounds ? at + here.chunk : rounds;
  *first = here.start + at * here.step;
  *last = here.start + until * here.step;
  return true;
}

bool GOMP_loop_nonmonotonic_dynamic_start(long start, long end, long step, long chunk, long* first, long* last) {
  if (!here.team) abort();
  if (++here.loop >= 64) abort();  // more dynamic loops in a region than there is room for
  here.start = start, here.end = end, here.step = step, here.chunk = chunk;
  return GOMP_loop_nonmonotonic_dynamic_next(first, last);
}

void GOMP_loop_end() { GOMP_barrier(); }
void GOMP_loop_end_nowait() {}
}
