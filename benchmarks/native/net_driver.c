/* The driver's side and the floor of `benchmarks/net.py`.
 *
 * `net_driver drive MEMORY KICK BYTES DEPTH COUNT` sends frames of so many bytes, virtio's header
 * apart, over a split ring at the beginning of a shared memory (descriptors at 0x1000, available ring
 * at 0x3000, used ring at 0x4000), with EVENT_IDX and without asking for interrupts. `net_driver
 * floor SOCKET BYTES DEPTH COUNT` writes as many frames to a socket. Both print frames a second. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { SIZE = 256, DESC = 0x1000, AVAIL = 0x3000, USED = 0x4000, DATA = 0x100000, HEADER = 12 };

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static void die(const char *what)
{
    perror(what);
    exit(1);
}

struct descriptor {
    uint64_t address;
    uint32_t length;
    uint16_t flags, next;
};

static void drive(int memory, int kick, uint64_t bytes, unsigned depth, uint64_t count)
{
    uint64_t stride = (bytes + HEADER + 127) / 128 * 128;
    uint8_t *base = mmap(NULL, DATA + depth * stride, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
    if (base == MAP_FAILED)
        die("mmap");
    struct descriptor *table = (struct descriptor *)(base + DESC);
    uint16_t *available = (uint16_t *)(base + AVAIL), *used = (uint16_t *)(base + USED);
    unsigned free_slots[SIZE], free_count = 0;
    for (unsigned i = 0; i < depth; i++) {
        table[i] = (struct descriptor){DATA + i * stride, (uint32_t)bytes + HEADER, 0, 0};
        free_slots[free_count++] = i;
    }
    uint16_t next = 0, published = 0, last = 0;
    uint64_t sent = 0, done = 0;
    double start = now();
    while (done < count) {
        for (; free_count != 0 && sent < count; sent++)
            available[2 + next++ % SIZE] = (uint16_t)free_slots[--free_count];
        if (next != published) {
            __atomic_store_n(&available[1], next, __ATOMIC_RELEASE);
            __atomic_thread_fence(__ATOMIC_SEQ_CST);
            uint16_t event = __atomic_load_n(&used[2 + 4 * SIZE], __ATOMIC_RELAXED);
            uint64_t one = 1;
            if ((uint16_t)(next - event - 1) < (uint16_t)(next - published) &&
                write(kick, &one, sizeof one) < 0)
                die("kick");
            published = next;
        }
        available[2 + SIZE] = (uint16_t)(last + 0x8000); /* used_event: far away */
        uint16_t idx = __atomic_load_n(&used[1], __ATOMIC_ACQUIRE);
        for (; last != idx; last++, done++)
            free_slots[free_count++] = *(uint32_t *)(base + USED + 4 + 8 * (last % SIZE));
        __builtin_ia32_pause();
    }
    printf("%f\n", (double)count / (now() - start));
}

static void send_frames(int socket, uint64_t bytes, unsigned depth, uint64_t count)
{
    uint8_t header[HEADER] = {0};
    uint8_t *frames = mmap(NULL, depth * bytes, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (frames == MAP_FAILED)
        die("mmap");
    double start = now();
    for (uint64_t i = 0; i < count; i++) {
        struct iovec pieces[2] = {{header, HEADER}, {frames + i % depth * bytes, bytes}};
        if (writev(socket, pieces, 2) < 0)
            die("writev");
    }
    printf("%f\n", (double)count / (now() - start));
}

int main(int argc, char **argv)
{
    if (argc == 7)
        drive(atoi(argv[2]), atoi(argv[3]), strtoull(argv[4], NULL, 10),
              (unsigned)atoi(argv[5]), strtoull(argv[6], NULL, 10));
    else if (argc == 6)
        send_frames(atoi(argv[2]), strtoull(argv[3], NULL, 10), (unsigned)atoi(argv[4]),
                    strtoull(argv[5], NULL, 10));
    else
        return 2;
    return 0;
}
