#define _GNU_SOURCE
#include "threads.h"

#include <time.h>
#include <unistd.h>

#if defined(__linux__)
#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
static void sleep_while(_Atomic int32_t *word, int32_t value) {
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}
static void wake_all(_Atomic int32_t *word) { syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0); }
#else
static pthread_mutex_t sleepers = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t woken = PTHREAD_COND_INITIALIZER;
static void sleep_while(_Atomic int32_t *word, int32_t value) {
    pthread_mutex_lock(&sleepers);
    while (atomic_load(word) == value) pthread_cond_wait(&woken, &sleepers);
    pthread_mutex_unlock(&sleepers);
}
static void wake_all(_Atomic int32_t *word) {
    (void)word;
    pthread_mutex_lock(&sleepers);
    pthread_cond_broadcast(&woken);
    pthread_mutex_unlock(&sleepers);
}
#endif

enum { SPIN_NANOSECONDS = 50000 };

static void pause_cpu(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static _Atomic int32_t asleep; /* threads that are in the kernel, or about to be */

/* Waits until the word differs from a value. */
static void wait_change(_Atomic int32_t *word, int32_t value) {
    const int64_t until = now() + SPIN_NANOSECONDS;
    do {
        for (int i = 0; i < 64; i++) {
            if (atomic_load_explicit(word, memory_order_acquire) != value) return;
            pause_cpu();
        }
    } while (now() < until);
    atomic_fetch_add(&asleep, 1);
    while (atomic_load(word) == value) sleep_while(word, value);
    atomic_fetch_sub(&asleep, 1);
}

static void change(_Atomic int32_t *word, int32_t value) {
    atomic_store(word, value);
    if (atomic_load(&asleep) > 0) wake_all(word);
}

void barrier(Barrier *b) {
    if (b->count == 1) return;
    const int32_t round = atomic_load_explicit(&b->round, memory_order_relaxed);
    if (atomic_fetch_add(&b->arrived, 1) + 1 == b->count) {
        atomic_store_explicit(&b->arrived, 0, memory_order_relaxed);
        change(&b->round, round + 1);
    } else {
        wait_change(&b->round, round);
    }
}

/* ---- The pool. */

static struct {
    pthread_mutex_t lock; /* one job at a time */
    int started;          /* workers, numbered from 1 */
    _Atomic int32_t turn; /* raised by 256 for each job; its low 8 bits are the job's threads */
    _Atomic int32_t left; /* workers that have not finished the job */
    Job job;
    void *argument;
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER};

static void *work(void *number) {
    const int thread = (int)(intptr_t)number;
    int32_t seen = 0;
    for (;;) {
        wait_change(&pool.turn, seen);
        seen = atomic_load(&pool.turn);
        const int threads = seen & 0xff;
        if (thread >= threads) continue; /* this job does without */
        pool.job(pool.argument, thread, threads);
        const int32_t before = atomic_fetch_sub(&pool.left, 1);
        if (before == 1 && atomic_load(&asleep) > 0) wake_all(&pool.left);
    }
    return NULL;
}

static void forget_workers(void) { /* in the child of a fork, which has none of them */
    pool.started = 0;
    atomic_store(&pool.turn, 0);
    atomic_store(&pool.left, 0);
    atomic_store(&asleep, 0);
    pthread_mutex_init(&pool.lock, NULL);
}

static void watch_forks(void) { pthread_atfork(NULL, NULL, forget_workers); }

static int start_workers(int threads) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, watch_forks);
    while (pool.started + 1 < threads) {
        pthread_t worker;
        if (pthread_create(&worker, NULL, work, (void *)(intptr_t)(pool.started + 1)) != 0) break;
        pthread_detach(worker);
        pool.started++;
    }
    return pool.started + 1 < threads ? pool.started + 1 : threads;
}

int pool_run(Job job, void *argument, int threads, Barrier *b) {
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    b->count = threads;
    if (threads == 1) { /* needs no worker, so it waits for nobody's job */
        job(argument, 0, 1);
        return 1;
    }
    pthread_mutex_lock(&pool.lock);
    b->count = threads = start_workers(threads);
    pool.job = job;
    pool.argument = argument;
    atomic_store(&pool.left, threads - 1);
    const int32_t turn = atomic_load(&pool.turn);
    change(&pool.turn, (int32_t)(((uint32_t)turn & ~0xffu) + 256u) | threads);
    job(argument, 0, threads);
    for (int32_t left; (left = atomic_load(&pool.left)) > 0;) wait_change(&pool.left, left);
    pthread_mutex_unlock(&pool.lock);
    return threads;
}
