/* The driver's side and the floor of `benchmarks/vsock.py`, with the host's end of the stream.
 *
 * `vsock_driver drive MEMORY RXKICK TXKICK SOCKET WAY BYTES DEPTH COUNT` agrees to the connection that
 * the device asks for, and moves COUNT times so many bytes: WAY 0 sends them to the host, one packet
 * each and at most DEPTH of them in the ring; 1 has the host write them; 2 has each answered by as many
 * before the next. The rings are those of `driver.h`, that of sending in front. `vsock_driver floor
 * WAY BYTES COUNT` moves the same between two threads over a socket. Both print moves a second. */

#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <string.h>
#include <sys/socket.h>

#include "driver.h"

/* Headers end where a line of the cache does: data that begin there are copied like the floor's. */
enum { LEAD = 84, HEADER = 44, RX = 0x10000, BUFFERS = 128, BUFFER = 4096, BUF_ALLOC = 256 << 10 };
enum { RESPONSE = 2, RW = 5, CREDIT_UPDATE = 6 };
enum { HOST = 2, TO_HOST = 0, TO_GUEST = 1 };

struct header {
    uint64_t src_cid, dst_cid;
    uint32_t src_port, dst_port, len;
    uint16_t type, op;
    uint32_t flags, buf_alloc, fwd_cnt;
} __attribute__((packed));

static uint8_t bytes_of_host[1 << 16], bytes_of_guest[1 << 21];
static uint64_t next_of_guest;

/* Each of the two threads has a processor, where there are two: one that is woken by the other, which
 * goes on, would often wait for it to pause. */
static void stay(pthread_t thread, int processor)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(processor, &set);
    pthread_setaffinity_np(thread, sizeof set, &set);
}

/* Bytes of a socket that are there, or 0. */
static uint64_t take_some(int fd, int flags)
{
    ssize_t got = recv(fd, bytes_of_host, sizeof bytes_of_host, flags);
    if (got < 0 && errno != EAGAIN)
        die("recv");
    return got < 0 ? 0 : (uint64_t)got;
}

/* From as much memory as a driver's packets lie in. */
static uint64_t give_some(int fd, uint64_t bytes, int flags)
{
    ssize_t sent = send(fd, bytes_of_guest + next_of_guest, bytes, flags);
    next_of_guest = (next_of_guest + bytes) % (sizeof bytes_of_guest - bytes);
    if (sent < 0 && errno != EAGAIN)
        die("send");
    return sent < 0 ? 0 : (uint64_t)sent;
}

/* --- the driver --- */

static uint8_t *base;
static struct ring rx, tx;
static struct header name; /* of packets to the host */
static uint64_t credit, came;
static uint32_t told;

static void tell(uint64_t place, uint32_t slot, uint16_t op, uint32_t length)
{
    struct header header = name;
    header.op = op;
    header.len = length;
    header.fwd_cnt = told = (uint32_t)came;
    memcpy(base + place + LEAD, &header, sizeof header);
    tx.table[slot] = (struct descriptor){place + LEAD, HEADER + length, 0, 0};
    offer(&tx, slot);
}

/* Take what came, and give the buffers back. */
static void hear(void)
{
    for (uint16_t left = count_used(&rx); left != 0; left--) {
        uint32_t head = take(&rx).head;
        struct header header;
        memcpy(&header, base + rx.table[head].address, sizeof header);
        came += header.len;
        credit = header.buf_alloc + header.fwd_cnt;
        name = (struct header){header.dst_cid, HOST, header.dst_port, header.src_port, 0, 1, 0, 0,
                               BUF_ALLOC, 0};
        offer(&rx, head);
    }
    publish(&rx);
}

static void drive(int host, int way, uint64_t bytes, unsigned depth, uint64_t count)
{
    uint64_t stride = (HEADER + bytes + 127) / 128 * 128, place = DATA;
    unsigned slots[SIZE], spare = 0;
    for (unsigned i = 0; i < BUFFERS; i++, place += BUFFER + 128) {
        rx.table[i] = (struct descriptor){place + LEAD, HEADER + BUFFER, WRITE, 0};
        offer(&rx, i);
    }
    publish(&rx);
    while (name.dst_cid != HOST)
        hear();
    tell(place, SIZE - 1, RESPONSE, 0);
    publish(&tx);
    while (count_used(&tx) == 0)
        continue;
    take(&tx);
    for (unsigned i = 0; i < depth; i++)
        slots[spare++] = i;
    uint64_t asked = 0, written = 0, arrived = 0, total = bytes * count;
    double start = now();
    while (way == TO_HOST ? arrived < total : came < total) {
        uint64_t done = way == TO_GUEST ? total : way == TO_HOST ? asked : came;
        while (way != TO_GUEST && spare != 0 && asked < total && asked + bytes <= credit &&
               (way == TO_HOST || asked == done)) {
            spare--;
            tell(place + 4096 + slots[spare] * stride, slots[spare], RW, (uint32_t)bytes);
            asked += bytes;
        }
        uint64_t wanted = way == TO_GUEST ? total : way == TO_HOST ? 0 : arrived;
        if (written < wanted)
            written += give_some(host, wanted - written < bytes ? wanted - written : bytes,
                                 MSG_DONTWAIT);
        if (way != TO_GUEST)
            arrived += take_some(host, MSG_DONTWAIT);
        hear();
        if ((uint32_t)came - told >= BUF_ALLOC / 2 && spare != 0) {
            spare--;
            tell(place + 4096 + slots[spare] * stride, slots[spare], CREDIT_UPDATE, 0);
        }
        publish(&tx);
        for (uint16_t left = count_used(&tx); left != 0; left--)
            slots[spare++] = take(&tx).head;
    }
    printf("%f\n", (double)count / (now() - start));
}

/* --- the floor --- */

static int ends[2];
static uint64_t floor_bytes, floor_count;
static int floor_way;

static void *other_end(void *nothing)
{
    uint64_t total = floor_bytes * floor_count;
    if (floor_way == TO_GUEST) {
        for (uint64_t got = 0; got < total;)
            got += take_some(ends[1], 0);
    } else if (floor_way == TO_HOST) {
        for (uint64_t i = 0; i < floor_count; i++)
            give_some(ends[1], floor_bytes, 0);
    } else {
        for (uint64_t got = 0, some; got < total; got += some) {
            some = take_some(ends[1], 0);
            give_some(ends[1], some, 0);
        }
    }
    return nothing;
}

static void floor_of(void)
{
    pthread_t thread;
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, ends) < 0)
        die("socketpair");
    for (int i = 0, size = 1 << 20; i < 2; i++)
        setsockopt(ends[i], SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
    double start = now();
    if (pthread_create(&thread, NULL, other_end, NULL))
        die("pthread_create");
    stay(thread, 1);
    for (uint64_t i = 0, total = floor_bytes * floor_count, got = 0; i < floor_count; i++) {
        if (floor_way != TO_HOST)
            give_some(ends[0], floor_bytes, 0);
        uint64_t wanted = floor_way == TO_HOST ? total : floor_bytes * (i + 1);
        while (floor_way != TO_GUEST && got < wanted)
            got += take_some(ends[0], MSG_DONTWAIT);
    }
    pthread_join(thread, NULL);
    printf("%f\n", (double)floor_count / (now() - start));
}

int main(int argc, char **argv)
{
    stay(pthread_self(), 0);
    /* Memory that was never written is one page of zeros, over and over, which a processor has at
     * hand: to copy from that is not to copy as much. */
    memset(bytes_of_guest, 1, sizeof bytes_of_guest);
    if (argc == 10) {
        base = map_shared(atoi(argv[2]), 16 << 20);
        rx = ring_at(base + RX, atoi(argv[3]));
        tx = ring_at(base, atoi(argv[4]));
        drive(atoi(argv[5]), atoi(argv[6]), strtoull(argv[7], NULL, 10), (unsigned)atoi(argv[8]),
              strtoull(argv[9], NULL, 10));
    } else if (argc == 5) {
        floor_way = atoi(argv[2]);
        floor_bytes = strtoull(argv[3], NULL, 10);
        floor_count = strtoull(argv[4], NULL, 10);
        floor_of();
    } else {
        return 2;
    }
    return 0;
}
