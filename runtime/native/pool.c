/* A few threads that wait for work, for engines that lend none of theirs. */
#include "kernel.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define RELAX() _mm_pause()
#elif defined(__aarch64__)
#define RELAX() __asm__ volatile("yield")
#else
#define RELAX() ((void)0)
#endif

enum { MAX_THREADS = 256, SPINS = 20000 }; /* some 200 microseconds: the next kernel of a step comes sooner */

/* `ticket` is the number of the job in its upper half and the parts left to take in the lower: a thread that comes late
   cannot take a part of another job, and what belongs to a job is read only by those who hold a part of it. */
static struct {
  pthread_mutex_t busy, sleep;
  pthread_cond_t wake;
  _Atomic uint64_t ticket;
  atomic_int sleepers;
  atomic_long left, failure;
  ag_function function;
  int64_t *frame, nparts;
  int threads;
} pool = {.busy = PTHREAD_MUTEX_INITIALIZER, .sleep = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

static void run(int64_t part) {
  long failed = (long)pool.function(pool.frame, part, pool.nparts);
  long none = 0;
  if (failed) atomic_compare_exchange_strong(&pool.failure, &none, failed);
  atomic_fetch_sub_explicit(&pool.left, 1, memory_order_release);
}

static void take(uint32_t job) {
  uint64_t ticket = atomic_load_explicit(&pool.ticket, memory_order_acquire);
  while ((uint32_t)(ticket >> 32) == job && (uint32_t)ticket) {
    if (atomic_compare_exchange_weak_explicit(&pool.ticket, &ticket, ticket - 1, memory_order_acq_rel, memory_order_acquire)) {
      run((int64_t)(uint32_t)ticket - 1);
      ticket = atomic_load_explicit(&pool.ticket, memory_order_acquire);
    }
  }
}

static void *worker(void *unused) {
  (void)unused;
  uint32_t seen = 0;
  for (;;) {
    uint32_t now;
    for (int spins = 0; (now = (uint32_t)(atomic_load_explicit(&pool.ticket, memory_order_acquire) >> 32)) == seen;) {
      if (++spins < SPINS) {
        RELAX();
        continue;
      }
      pthread_mutex_lock(&pool.sleep);
      atomic_fetch_add(&pool.sleepers, 1);
      while ((uint32_t)(atomic_load(&pool.ticket) >> 32) == seen) pthread_cond_wait(&pool.wake, &pool.sleep);
      atomic_fetch_sub(&pool.sleepers, 1);
      pthread_mutex_unlock(&pool.sleep);
    }
    seen = now;
    take(now);
  }
  return NULL;
}

static void forked(void) { /* the child has none of the threads */
  pool.threads = 0;
  atomic_store(&pool.sleepers, 0);
  pthread_mutex_init(&pool.busy, NULL);
  pthread_mutex_init(&pool.sleep, NULL);
  pthread_cond_init(&pool.wake, NULL);
}

static void grow(int64_t wanted) {
  static int watched;
  if (!watched) watched = !pthread_atfork(NULL, NULL, forked);
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
  while (pool.threads < wanted && pool.threads < MAX_THREADS) {
    pthread_t thread;
    if (pthread_create(&thread, &attributes, worker, NULL)) break; /* the caller does the work itself */
    pool.threads++;
  }
  pthread_attr_destroy(&attributes);
}

AG_SHARED int64_t ag_parallel(ag_function f, int64_t *frame, int64_t nparts) {
  if (nparts <= 1 || nparts > UINT32_MAX || pthread_mutex_trylock(&pool.busy)) { /* busy: by another thread's kernel */
    int64_t failure = 0;
    for (int64_t part = 0; part < nparts; part++) {
      int64_t failed = f(frame, part, nparts);
      failure = failure ? failure : failed;
    }
    return failure;
  }
  grow(nparts - 1);
  pool.function = f, pool.frame = frame, pool.nparts = nparts;
  atomic_store(&pool.left, (long)nparts);
  atomic_store(&pool.failure, 0);
  uint32_t job = (uint32_t)(atomic_load(&pool.ticket) >> 32) + 1;
  atomic_store(&pool.ticket, (uint64_t)job << 32 | (uint64_t)nparts);
  if (atomic_load(&pool.sleepers)) {
    pthread_mutex_lock(&pool.sleep);
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.sleep);
  }
  take(job);
  for (int spins = 0; atomic_load_explicit(&pool.left, memory_order_acquire) > 0;) {
    if (++spins < SPINS) RELAX();
    else sched_yield(); /* a thread with a part was put aside */
  }
  int64_t failure = atomic_load(&pool.failure);
  pthread_mutex_unlock(&pool.busy);
  return failure;
}

static _Thread_local struct { void *memory; size_t size; } scratch;
static pthread_key_t scratch_key;
static pthread_once_t scratch_once = PTHREAD_ONCE_INIT;
static void make_key(void) { pthread_key_create(&scratch_key, free); }

void *ag_scratch(size_t bytes) {
  if (scratch.memory && bytes <= scratch.size) return scratch.memory;
  pthread_once(&scratch_once, make_key);
  size_t size = (bytes + bytes / 4 + 4096) / 4096 * 4096;
  void *memory = NULL;
  if (posix_memalign(&memory, 64, size)) return NULL;
  free(scratch.memory);
  scratch.memory = memory, scratch.size = size;
  pthread_setspecific(scratch_key, memory);
  return memory;
}

/* For callers that have no engine: a frame whose outputs are allocated already. */
AG_SHARED int64_t ag_run(const ag_variant *variant, int64_t *frame, int64_t nparts) {
  frame[1] = nparts;
  if (variant->scratch) {
    frame[0] = (int64_t)(intptr_t)ag_scratch((size_t)variant->scratch(frame, 0, 1));
    if (!frame[0]) return -1;
  }
  for (int64_t i = 0; i < variant->stages; i++) { /* the scratch function may have asked for fewer parts */
    int64_t failed = variant->parallel[i] ? ag_parallel(variant->stage[i], frame, frame[1]) : variant->stage[i](frame, 0, 1);
    if (failed) return failed;
  }
  return 0;
}

/* The parallel stages of several frames as one: each thread does its part of all of them. */
typedef struct { const ag_step *first, *last; } Section;

static int64_t run_section(int64_t *section, int64_t part, int64_t nparts) {
  const Section *own = (const Section *)section;
  for (const ag_step *step = own->first; step < own->last; step++) {
    for (int64_t i = 0; i < step->variant->stages; i++)
      if (step->variant->parallel[i]) {
        int64_t failed = step->variant->stage[i](step->frame, part, nparts);
        if (failed) return failed;
      }
  }
  return 0;
}

/* Steps that need nothing of each other: the first stages of all, one parallel section, the last stages of all. */
static int64_t run_group(const ag_step *first, const ag_step *last, int64_t nparts, const ag_step **failed) {
  int64_t wanted = 0;
  for (const ag_step *step = first; step < last; step++) {
    step->frame[1] = nparts;
    if (!step->shares && step->variant->scratch) wanted += (step->variant->scratch(step->frame, 0, 1) + 63) / 64 * 64;
  }
  char *memory = wanted ? ag_scratch((size_t)wanted) : NULL;
  if (wanted && !memory) return *failed = first, -1;
  for (const ag_step *step = first; step < last; step++) {
    const ag_variant *variant = step->variant;
    *failed = step;
    if (step->shares) {
      step->frame[0] = step[-1].frame[0];
      continue;
    }
    step->frame[0] = (int64_t)(intptr_t)memory;
    if (variant->scratch) memory += (variant->scratch(step->frame, 0, 1) + 63) / 64 * 64;
    for (int64_t i = 0; i < variant->stages && !variant->parallel[i]; i++) {
      int64_t error = variant->stage[i](step->frame, 0, 1);
      if (error) return error;
    }
  }
  Section section = {first, last};
  *failed = first;
  int64_t error = ag_parallel(run_section, (int64_t *)&section, nparts);
  if (error) return error;
  for (const ag_step *step = first; step < last; step++) {
    const ag_variant *variant = step->variant;
    int behind = 0;
    *failed = step;
    for (int64_t i = 0; i < variant->stages; i++) {
      if (variant->parallel[i]) behind = 1;
      else if (behind && (error = variant->stage[i](step->frame, 0, 1))) return error;
    }
  }
  return 0;
}

/* Runs `count` steps in order, those of the same group (neighbours, and not 0) together. Returns the first error and puts its
   place at `place`. */
AG_SHARED int64_t ag_replay(const ag_step *steps, int64_t count, int64_t nparts, int64_t *place) {
  for (int64_t i = 0; i < count;) {
    int64_t end = i + 1;
    const ag_step *failed = steps + i;
    while (steps[i].group && end < count && steps[end].group == steps[i].group) end++;
    int64_t error = end == i + 1 ? ag_run(steps[i].variant, steps[i].frame, nparts)
                                 : run_group(steps + i, steps + end, nparts, &failed);
    if (error) return *place = failed - steps, error;
    i = end;
  }
  return 0;
}

AG_SHARED int64_t ag_variant_size(void) { return (int64_t)sizeof(ag_variant); }
AG_SHARED int64_t ag_op_size(void) { return (int64_t)sizeof(ag_op); }
