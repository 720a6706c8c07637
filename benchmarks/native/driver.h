/* A driver's side of split rings in a shared memory, with EVENT_IDX and without asking for interrupts:
 * it looks for used buffers in a loop, and kicks when it is asked to. A ring has its descriptors at
 * 0x1000 behind its place, the available ring at 0x3000, the used ring at 0x4000. */
#ifndef DRIVER_H
#define DRIVER_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { SIZE = 256, DESC = 0x1000, AVAIL = 0x3000, USED = 0x4000, DATA = 0x100000 };
enum { NEXT = 1, WRITE = 2 };

struct descriptor {
    uint64_t address;
    uint32_t length;
    uint16_t flags, next;
};

struct used {
    uint32_t head, length;
};

struct ring {
    struct descriptor *table;
    uint16_t *available, *idx, *event;
    struct used *used;
    uint16_t next, published, last;
    int kick;
};

static inline double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static inline void die(const char *what)
{
    perror(what);
    exit(1);
}

static inline uint8_t *map_shared(int memory, uint64_t size)
{
    uint8_t *base = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
    if (base == MAP_FAILED)
        die("mmap");
    return base;
}

static inline struct ring ring_at(uint8_t *base, int kick)
{
    struct ring ring = {.table = (struct descriptor *)(base + DESC),
                        .available = (uint16_t *)(base + AVAIL),
                        .idx = (uint16_t *)(base + USED) + 1,
                        .event = (uint16_t *)(base + USED + 4 + 8 * SIZE),
                        .used = (struct used *)(base + USED + 4),
                        .kick = kick};
    return ring;
}

/* Make a chain available, with others at the next `publish`. */
static inline void offer(struct ring *ring, unsigned head)
{
    ring->available[2 + ring->next++ % SIZE] = (uint16_t)head;
}

static inline void publish(struct ring *ring)
{
    uint64_t one = 1;
    if (ring->next == ring->published)
        return;
    __atomic_store_n(&ring->available[1], ring->next, __ATOMIC_RELEASE);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    uint16_t event = __atomic_load_n(ring->event, __ATOMIC_RELAXED);
    if ((uint16_t)(ring->next - event - 1) < (uint16_t)(ring->next - ring->published) &&
        write(ring->kick, &one, sizeof one) < 0)
        die("kick");
    ring->published = ring->next;
}

/* How many buffers are used that `take` has not returned; asks for no interrupt. */
static inline uint16_t count_used(struct ring *ring)
{
    ring->available[2 + SIZE] = (uint16_t)(ring->last + 0x8000); /* used_event: far away */
    return (uint16_t)(__atomic_load_n(ring->idx, __ATOMIC_ACQUIRE) - ring->last);
}

static inline struct used take(struct ring *ring)
{
    return ring->used[ring->last++ % SIZE];
}

#endif
