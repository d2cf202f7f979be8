/* A loop is shared by OpenMP's threads, torch's own, which the other operations of a step keep awake anyway. They go on
   spinning for a while after each loop, on a core that by then somebody else wants: whoever sends off what the step
   brought. A step of many short loops has helpers of its own instead. They take a part after the other, and are not
   waited for unless they have taken one; after the step they wait for the next one in favour of whoever wants the core,
   and soon fall asleep. Where a part that was taken lies about, since its helper's core has other work, and the step
   would have been quicker alone, the next steps are. */

#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <time.h>

#include "sharing.h"

enum { MOST_HELPERS = 63, PATIENCE = 64 };
enum { PARTS_EACH = 4, SMALLEST_PART = 1 << 16 }; /* parts of a loop for each thread, and products of a part */
enum { FEWEST_ALONE = 16, MOST_ALONE = 256 };
static const double WORTH_IT = 0.9; /* of a shared step's time: who would need as much alone goes on sharing */
static const double LINGER_S = 2e-3; /* longer than what lies between two steps of a small model */

static struct {
    pthread_mutex_t turn;     /* of the one thread whose loops are shared */
    pthread_mutex_t sleeping; /* guards falling asleep */
    pthread_cond_t begun;
    size started;
    int apart_from; /* the processor that helpers keep off: that of the thread whose loops are shared */
    pthread_t helpers[MOST_HELPERS];
    _Atomic size wanted; /* helpers that are to look for parts */
    Part run;
    const void *job;
    _Atomic size left, done; /* parts that nobody took, and those that are done */
    _Atomic size helped;
    size own, all;         /* parts of this step that the caller took, and all of them */
    size alone, was_alone; /* steps left without helpers, and how many they were at first */
    double begun_at, waited;
} pool = {.turn = PTHREAD_MUTEX_INITIALIZER, .sleeping = PTHREAD_MUTEX_INITIALIZER, .begun = PTHREAD_COND_INITIALIZER};

static _Thread_local int has_turn;

static inline void pause_briefly(size *times) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
    if (++*times % PATIENCE == 0) sched_yield();
}

/* Whoever takes a part may read what the loop is: it cannot end before this part is done. */
static size take_parts(void) {
    size left = atomic_load_explicit(&pool.left, memory_order_acquire), taken = 0;
    while (left > 0)
        if (atomic_compare_exchange_weak_explicit(&pool.left, &left, left - 1, memory_order_acq_rel,
                                                  memory_order_acquire)) {
            pool.run(pool.job, left - 1);
            atomic_fetch_add_explicit(&pool.done, 1, memory_order_release);
            left = atomic_load_explicit(&pool.left, memory_order_acquire);
            taken++;
        }
    return taken;
}

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static inline int is_wanted(size helper) {
    return atomic_load_explicit(&pool.wanted, memory_order_relaxed) > helper;
}

static void *help(void *number) {
    size own = (size)(intptr_t)number;
#ifdef __linux__
    pthread_setname_np(pthread_self(), "step helper");
#endif
    for (;;) {
        pthread_mutex_lock(&pool.sleeping);
        while (!is_wanted(own)) pthread_cond_wait(&pool.begun, &pool.sleeping);
        pthread_mutex_unlock(&pool.sleeping);
        for (double until = seconds() + LINGER_S; seconds() < until; sched_yield()) {
            if (!is_wanted(own)) continue;
            for (size times = 0; is_wanted(own);) {
                size taken = take_parts();
                if (taken)
                    atomic_fetch_add_explicit(&pool.helped, taken, memory_order_relaxed);
                else
                    pause_briefly(&times);
            }
            until = seconds() + LINGER_S;
        }
    }
    return 0;
}

/* A forked process has none of the helpers. */
static void forget_helpers(void) {
    pthread_mutex_init(&pool.turn, 0);
    pthread_mutex_init(&pool.sleeping, 0);
    pthread_cond_init(&pool.begun, 0);
    pool.started = pool.alone = pool.was_alone = 0;
    atomic_store(&pool.wanted, 0);
    atomic_store(&pool.left, 0);
    has_turn = 0;
}

static void watch_forks(void) { pthread_atfork(0, 0, forget_helpers); }

/* As many as can be had: what they do not take is left to the one who asked. */
static void start_helpers(size count) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, watch_forks);
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are not for them */
    for (; pool.started < count && pool.started < MOST_HELPERS; pool.started++) {
        pthread_t *thread = pool.helpers + pool.started;
        if (pthread_create(thread, 0, help, (void *)(intptr_t)pool.started)) break;
        pthread_detach(*thread);
        pool.apart_from = -1;
    }
    pthread_sigmask(SIG_SETMASK, &before, 0);
}

/* Some schedulers wake a thread where its waker runs, and let it wait there for milliseconds. */
static void keep_apart(void) {
#ifdef __linux__
    int here = sched_getcpu();
    cpu_set_t others;
    if (here < 0 || here == pool.apart_from || sched_getaffinity(0, sizeof others, &others)) return;
    pool.apart_from = here;
    CPU_CLR(here, &others);
    for (size i = 0; CPU_COUNT(&others) && i < pool.started; i++)
        pthread_setaffinity_np(pool.helpers[i], sizeof others, &others);
#endif
}

size steps_alone(double waited, double elapsed, double share, size before) {
    if (share <= 0 || (elapsed - waited) / share >= WORTH_IT * elapsed) return 0;
    return before ? (before < MOST_ALONE ? 2 * before : before) : FEWEST_ALONE;
}

enum Sharing begin_sharing(size threads) {
    if (threads < 2 || has_turn || pthread_mutex_trylock(&pool.turn)) return BUSY;
    if (pool.alone > 0) {
        pool.alone--;
        pthread_mutex_unlock(&pool.turn);
        return ALONE;
    }
    if (pool.started < threads - 1) start_helpers(threads - 1);
    keep_apart();
    pthread_mutex_lock(&pool.sleeping);
    atomic_store(&pool.wanted, threads - 1);
    pthread_cond_broadcast(&pool.begun);
    pthread_mutex_unlock(&pool.sleeping);
    pool.own = pool.all = 0, pool.waited = 0, pool.begun_at = seconds();
    has_turn = 1;
    return SHARED;
}

void end_sharing(void) {
    atomic_store(&pool.wanted, 0);
    double share = pool.all ? (double)pool.own / (double)pool.all : 1;
    pool.alone = pool.was_alone = steps_alone(pool.waited, seconds() - pool.begun_at, share, pool.was_alone);
    has_turn = 0;
    pthread_mutex_unlock(&pool.turn);
}

size parts_taken_by_helpers(void) { return atomic_load(&pool.helped); }

size parts_of(size products, size most, size threads) {
    size parts = has_turn ? PARTS_EACH * threads : threads;
    if (has_turn && products / SMALLEST_PART < parts) parts = products / SMALLEST_PART;
    if (parts > most) parts = most;
    return threads < 2 || parts < 1 ? 1 : parts;
}

void share(size parts, size threads, Part run, const void *job) {
    if (has_turn && threads > 1 && parts > 1) {
        pool.run = run, pool.job = job;
        atomic_store_explicit(&pool.done, 0, memory_order_relaxed);
        atomic_store_explicit(&pool.left, parts, memory_order_release);
        pool.own += take_parts(), pool.all += parts;
        double waits_since = 0;
        for (size times = 0; atomic_load_explicit(&pool.done, memory_order_acquire) < parts;) {
            pause_briefly(&times);
            if (times == PATIENCE) waits_since = seconds();
        }
        if (waits_since > 0) pool.waited += seconds() - waits_since;
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1 && parts > 1)
    for (size part = 0; part < parts; part++) run(job, part);
}
