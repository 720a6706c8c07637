/* The floors of the memory suite: each returns the nanoseconds of one turn. */

#include <stdint.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return 1e9 * (double)t.tv_sec + (double)t.tv_nsec;
}

/* Memory read once, with nothing done to it but a sum. */
double floor_read(const uint64_t *words, uint64_t count)
{
    typedef uint64_t pair __attribute__((vector_size(16), aligned(8), may_alias));
    const pair *v = (const pair *)words;
    pair sum = {0, 0};
    double start = now();
    for (uint64_t i = 0; i < count / 2; i += 4)
        sum |= (v[i] | v[i + 1]) | (v[i + 2] | v[i + 3]);
    volatile uint64_t kept = sum[0] | sum[1];
    (void)kept;
    return now() - start;
}

double floor_copy(void *target, const void *source, uint64_t length, int calls)
{
    double start = now();
    for (int i = 0; i < calls; i++) {
        memcpy(target, source, length);
        __asm__ volatile("" : : "r"(target) : "memory");
    }
    return (now() - start) / calls;
}

double floor_preadv(int fd, void *target, uint64_t length, int calls)
{
    struct iovec vector = {target, length};
    double start = now();
    for (int i = 0; i < calls; i++)
        if (preadv(fd, &vector, 1, 0) != (ssize_t)length)
            return -1;
    return (now() - start) / calls;
}
