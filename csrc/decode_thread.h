// Who of a decode step's threads does what.
#pragma once

#include <sched.h>

#include "decode_panels.h"
#include "kernels.h"

namespace gpt2 {
namespace GPT2_ISA {
namespace {

// Panels [begin, end) of a matrix.
struct Part {
  int64_t begin, end;
};

// What a step's threads share.
//
// The first half of a matrix's panels is shared out beforehand, the other taken by whoever is done, ever less at a
// time, since one thread is as fast as another only where nothing else runs. Every second product has the same counter;
// nobody looks at the other one meanwhile.
struct Team {
  alignas(64) int64_t taken[2] = {};
  int patience;  // looks at `arrived`
  alignas(64) int64_t arrived = 0;  // at meetings, by all threads together
};

// One thread's view of a step.
struct Thread {
  const DecodeModel& m;
  const DecodeCache& c;
  Team& team;
  int64_t thread, threads;
  mutable int64_t products = 0, meetings = 0;  // so far

  // Returns when all threads are here. libgomp's barrier would ask the system at every meeting to wake whoever sleeps.
  // Here nobody does: a meeting is over in microseconds. Who waits much longer, or soon where there are more threads
  // than processors, lets others run.
  void meet() const {
    const int64_t all = ++meetings * threads;
    __atomic_add_fetch(&team.arrived, 1, __ATOMIC_ACQ_REL);
    for (int64_t looks = 0; __atomic_load_n(&team.arrived, __ATOMIC_ACQUIRE) < all; ++looks) {
      if (looks < team.patience)
        relax();
      else
        sched_yield();
    }
  }

  int64_t part(int64_t n, int64_t i) const { return n * i / threads; }
  int64_t first(int64_t n) const { return part(n, thread); }
  int64_t last(int64_t n) const { return part(n, thread + 1); }
  // Panels of a matrix of `all` that nobody has; none: begin is `all`.
  Part claim(int64_t* taken, int64_t all) const {
    const int64_t rest = all - all / 2;
    int64_t at = __atomic_load_n(taken, __ATOMIC_RELAXED), count;
    do {
      if (at >= rest) return {all, all};
      count = (rest - at) / (2 * threads);
      if (count < 1) count = 1;
    } while (!__atomic_compare_exchange_n(taken, &at, at + count, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return {all / 2 + at, all / 2 + at + count};
  }

  int64_t C16() const { return round_up(m.C, 16); }
  int64_t S16() const { return round_up(c.S, 16); }
};

}  // namespace
}  // namespace GPT2_ISA
}  // namespace gpt2
