/* The driver's side and the floor of `benchmarks/net.py`.
 *
 * `net_driver drive MEMORY KICK BYTES DEPTH COUNT` sends frames of so many bytes, virtio's header
 * apart, over a ring at the beginning of a shared memory (see `driver.h`). `net_driver floor
 * SOCKET BYTES DEPTH COUNT` writes as many frames to a socket. Both print frames a second. */

#include <sys/uio.h>

#include "driver.h"

enum { HEADER = 12 };

static void drive(int memory, int kick, uint64_t bytes, unsigned depth, uint64_t count)
{
    uint64_t stride = (bytes + HEADER + 127) / 128 * 128;
    uint8_t *base = map_shared(memory, DATA + depth * stride);
    struct ring ring = ring_at(base, kick);
    unsigned free_slots[SIZE], free_count = 0;
    for (unsigned i = 0; i < depth; i++) {
        ring.table[i] = (struct descriptor){DATA + i * stride, (uint32_t)bytes + HEADER, 0, 0};
        free_slots[free_count++] = i;
    }
    uint64_t sent = 0, done = 0;
    double start = now();
    while (done < count) {
        for (; free_count != 0 && sent < count; sent++)
            offer(&ring, free_slots[--free_count]);
        publish(&ring);
        for (uint16_t left = count_used(&ring); left != 0; left--, done++)
            free_slots[free_count++] = take(&ring).head;
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
