/* A pool of threads, one per process, shared by all models.
 *
 * Workers wait for a job: they spin for at most 50 microseconds, then sleep in the kernel until woken, so that they
 * cost nothing between steps and yield a core that another process needs. Barriers wait the same way. */
#ifndef SELFDRAFT_THREADS_H
#define SELFDRAFT_THREADS_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

enum { MAX_THREADS = 64 };

typedef struct {
    _Atomic int32_t arrived, round;
    int32_t count;
} Barrier;

typedef void (*Job)(void *argument, int thread, int threads);

/* Runs a job on so many threads, the caller being thread 0, and returns when all are done. b is made ready for
 * them. Returns the number of threads, which is smaller where the system does not start more. One job runs at a
 * time in a process; a second caller waits, unless it asks for one thread. */
int pool_run(Job job, void *argument, int threads, Barrier *b);

/* Waits until all threads of a job are here. */
void barrier(Barrier *b);

#endif
