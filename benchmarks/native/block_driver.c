/* The driver's side and the floor of `benchmarks/block.py`.
 *
 * `block_driver drive MEMORY KICK BYTES DEPTH COUNT SECTORS` drives a ring at the beginning of a shared
 * memory (see `driver.h`). `block_driver floor ENGINE FILE BYTES DEPTH COUNT SECTORS` does the same
 * reads by pread or io_uring. Both print operations a second. */

#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <sched.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#include "driver.h"

/* Header and status of a request lie together, and apart from others', as Linux has them. */
enum { REQUESTS = 0x8000, STRIDE = 128, STATUS = 16 };

/* Where request `number` reads: scattered for small ones, one after the other for large ones. */
static uint64_t sector_of(uint64_t number, uint64_t bytes, uint64_t sectors)
{
    uint64_t blocks = sectors * 512 / bytes;
    uint64_t block = bytes > 65536 ? number : number * 0x9E3779B97F4A7C15u >> 20;
    return block % blocks * (bytes / 512);
}

static void drive(int memory, int kick, uint64_t bytes, unsigned depth, uint64_t count,
                  uint64_t sectors)
{
    uint8_t *base = map_shared(memory, DATA + depth * bytes);
    struct ring ring = ring_at(base, kick);
    unsigned free_slots[SIZE], free_count = 0;
    for (unsigned i = 0; i < depth; i++) {
        unsigned at = 3 * i;
        ring.table[at] = (struct descriptor){REQUESTS + STRIDE * i, 16, NEXT, (uint16_t)(at + 1)};
        ring.table[at + 1] = (struct descriptor){DATA + i * bytes, (uint32_t)bytes, NEXT | WRITE,
                                                 (uint16_t)(at + 2)};
        ring.table[at + 2] = (struct descriptor){REQUESTS + STRIDE * i + STATUS, 1, WRITE, 0};
        free_slots[free_count++] = i;
    }
    uint64_t sent = 0, done = 0;
    double start = now();
    while (done < count) {
        while (free_count != 0 && sent < count) {
            unsigned slot = free_slots[--free_count];
            uint64_t *header = (uint64_t *)(base + REQUESTS + STRIDE * slot);
            header[0] = 0;
            header[1] = sector_of(sent++, bytes, sectors);
            offer(&ring, 3 * slot);
        }
        publish(&ring);
        for (uint16_t left = count_used(&ring); left != 0; left--, done++) {
            unsigned slot = take(&ring).head / 3;
            if (base[REQUESTS + STRIDE * slot + STATUS] != 0) {
                fprintf(stderr, "a request failed\n");
                exit(1);
            }
            free_slots[free_count++] = slot;
        }
        __builtin_ia32_pause();
    }
    printf("%f\n", (double)count / (now() - start));
}

static void with_pread(int file, uint8_t *data, uint64_t bytes, unsigned depth, uint64_t count,
                       uint64_t sectors)
{
    for (uint64_t i = 0; i < count; i++)
        if (pread(file, data + i % depth * bytes, bytes,
                  (off_t)(512 * sector_of(i, bytes, sectors))) != (ssize_t)bytes)
            die("pread");
}

static void with_uring(int file, uint8_t *data, uint64_t bytes, unsigned depth, uint64_t count,
                       uint64_t sectors)
{
    struct io_uring_params params = {0};
    int ring = (int)syscall(__NR_io_uring_setup, 64, &params);
    if (ring < 0)
        die("io_uring_setup");
    int rights = PROT_READ | PROT_WRITE, shared = MAP_SHARED | MAP_POPULATE;
    uint8_t *sq = mmap(NULL, params.sq_off.array + 4 * params.sq_entries, rights, shared, ring,
                       IORING_OFF_SQ_RING);
    uint8_t *cq = mmap(NULL, params.cq_off.cqes + 16 * params.cq_entries, rights, shared, ring,
                       IORING_OFF_CQ_RING);
    struct io_uring_sqe *sqes = mmap(NULL, 64 * sizeof *sqes, rights, shared, ring,
                                     IORING_OFF_SQES);
    uint32_t *sq_tail = (uint32_t *)(sq + params.sq_off.tail), mask = params.sq_entries - 1;
    uint32_t *sq_array = (uint32_t *)(sq + params.sq_off.array);
    uint32_t *cq_head = (uint32_t *)(cq + params.cq_off.head);
    uint32_t *cq_tail = (uint32_t *)(cq + params.cq_off.tail), cq_mask = params.cq_entries - 1;
    struct io_uring_cqe *cqes = (struct io_uring_cqe *)(cq + params.cq_off.cqes);
    struct iovec iovecs[SIZE];
    unsigned free_slots[SIZE], free_count = 0;
    for (unsigned i = 0; i < depth; i++) {
        iovecs[i] = (struct iovec){data + i * bytes, bytes};
        free_slots[free_count++] = i;
    }
    uint64_t sent = 0, done = 0;
    while (done < count) {
        unsigned queued = 0;
        while (free_count != 0 && sent < count) {
            unsigned slot = free_slots[--free_count], at = *sq_tail & mask;
            sqes[at] = (struct io_uring_sqe){
                .opcode = IORING_OP_READV, .fd = file, .addr = (uint64_t)(uintptr_t)&iovecs[slot],
                .len = 1, .off = 512 * sector_of(sent++, bytes, sectors), .user_data = slot};
            sq_array[at] = at;
            __atomic_store_n(sq_tail, *sq_tail + 1, __ATOMIC_RELEASE);
            queued++;
        }
        if (syscall(__NR_io_uring_enter, ring, queued, 1, IORING_ENTER_GETEVENTS, NULL, 0) < 0)
            die("io_uring_enter");
        uint32_t head = *cq_head, tail = __atomic_load_n(cq_tail, __ATOMIC_ACQUIRE);
        for (; head != tail; head++, done++) {
            if (cqes[head & cq_mask].res != (int)bytes)
                die("a read");
            free_slots[free_count++] = (unsigned)cqes[head & cq_mask].user_data;
        }
        __atomic_store_n(cq_head, head, __ATOMIC_RELEASE);
    }
}

int main(int argc, char **argv)
{
    if (argc != 8)
        return 2;
    uint64_t bytes = strtoull(argv[4], NULL, 10), count = strtoull(argv[6], NULL, 10);
    uint64_t sectors = strtoull(argv[7], NULL, 10);
    unsigned depth = (unsigned)atoi(argv[5]);
    if (strcmp(argv[1], "drive") == 0) {
        drive(atoi(argv[2]), atoi(argv[3]), bytes, depth, count, sectors);
        return 0;
    }
    int file = open(argv[3], O_RDONLY);
    /* Of the same kind as a guest's, page for page. */
    int memory = (int)syscall(__NR_memfd_create, "floor", 0);
    if (memory < 0 || ftruncate(memory, (off_t)(depth * bytes)) < 0)
        die("memfd");
    uint8_t *data = mmap(NULL, depth * bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE,
                         memory, 0);
    if (file < 0 || data == MAP_FAILED)
        die(argv[3]);
    double start = now();
    (strcmp(argv[2], "sync") == 0 ? with_pread : with_uring)(file, data, bytes, depth, count,
                                                            sectors);
    printf("%f\n", (double)count / (now() - start));
    return 0;
}
