/* The floor of `benchmarks/queue.py`: the same memory traffic without a check.
 *
 * `queue_floor WORKLOAD` prints the nanoseconds of one turn, of one request for cycle-N; the median
 * of many. Indirect tables cost one descriptor more; chains are followed by index, not by `next`. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { COUNT = 128, TURNS = 3000 };

struct descriptor {
    uint64_t address;
    uint32_t length;
    uint16_t flags, next;
};

static volatile struct descriptor table[2 * COUNT];
static volatile uint16_t available[2 * COUNT], idx, event;
static volatile uint32_t used[2 * COUNT];
static uint8_t data[64 * COUNT];
static volatile uint64_t out[2 * COUNT];

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec * 1e9 + (double)time.tv_nsec;
}

static void walk(int heads, int levels)
{
    for (int i = 0; i < COUNT; i++) {
        if (heads)
            (void)available[i];
        for (int level = 0; level < levels; level++) {
            const volatile uint64_t *at = (const volatile uint64_t *)&table[i + level];
            out[2 * i] = at[0];
            out[2 * i + 1] = at[1];
        }
    }
}

static void add_used(int first, int count)
{
    for (int i = first; i < first + count; i++) {
        used[2 * i] = (uint32_t)i;
        used[2 * i + 1] = 64;
    }
    __atomic_store_n(&idx, (uint16_t)(first + count), __ATOMIC_RELEASE);
}

static void cycle(int batch)
{
    static volatile uint8_t header[16];
    for (int first = 0; first < COUNT; first += batch) {
        for (int i = first; i < first + batch; i++) {
            (void)available[i];
            for (int part = 0; part < 2; part++) {
                const volatile uint64_t *at = (const volatile uint64_t *)&table[2 * i + part];
                out[2 * part] = at[0];
                out[2 * part + 1] = at[1];
            }
            memcpy((void *)header, data + 64 * i, sizeof header);
        }
        add_used(first, batch);
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        (void)event;
    }
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

int main(int argc, char **argv)
{
    static double times[TURNS];
    const char *workload = argc > 1 ? argv[1] : "";
    int batch = strncmp(workload, "cycle-", 6) == 0 ? atoi(workload + 6) : 0;
    for (int turn = 0; turn < TURNS; turn++) {
        double start = now();
        if (batch > 0)
            cycle(batch);
        else if (strcmp(workload, "add-used") == 0)
            add_used(0, COUNT);
        else
            walk(strstr(workload, "multiple") != NULL, strcmp(workload, "indirect-multiple") ? 1 : 2);
        times[turn] = now() - start;
    }
    qsort(times, TURNS, sizeof *times, compare);
    printf("%f\n", times[TURNS / 2] / (batch > 0 ? COUNT : 1));
    return 0;
}
