/* A thread that serves the queues of a device without Python: it takes and checks chains, moves
 * their bytes between a file descriptor and guest memory, publishes, and notifies.
 *
 * Between `vp_start` and `vp_stop` the rings belong to the thread alone; what Python may change or
 * read meanwhile are the fields marked so (aligned words, one store each) and what takes `lock`. */
#ifndef VIRTIO_PUMP_H
#define VIRTIO_PUMP_H

#include <pthread.h>
#include <sys/uio.h>

#include "virtio_queue.h"

/* The longest frame: a segment of 64 KiB with its headers, one VLAN tag and virtio's included. */
enum { VP_FRAME = 12 + 65535 + 14 + 4 };
/* So much of a stream is received at once; a frame with its length is always less. */
enum { VP_RECEIVED = 256 << 10 };
enum { VP_QUEUES = 64, VP_BATCHES = 64, VP_CHAINS = 64, VP_HEADER = 16 };
enum { VP_VSOCK_HEADER = 44 };
/* Most nanoseconds for which to look for chains before sleeping: about what being woken costs. */
enum { VP_SPIN = 50000 };
/* So many bytes are handed to the kernel at once, so that their driver goes on meanwhile. */
enum { VP_SUBMIT = 512 << 10 };

/* --- pump_limit.c --- */
/* Tokens that come back at a steady rate. Whoever finds a token left may take any number: what is
 * owed then delays the next one, so that the rate holds whatever the requests' sizes. */
struct vp_bucket {
    uint64_t size;   /* 0: no limit */
    uint64_t refill; /* nanoseconds in which an empty bucket fills */
    uint64_t burst;  /* tokens spent before those of the bucket, once */
    int64_t budget;
    uint64_t last;   /* CLOCK_MONOTONIC, in nanoseconds */
};

/* What one device, or several, may do: shared by any number of threads. */
struct vp_limiter {
    pthread_mutex_t lock;
    struct vp_bucket bytes, operations;
};

struct vp_limiter *vp_limiter_new(void);
void vp_limiter_free(struct vp_limiter *limiter);
/* Set a bucket (0: bytes, 1: operations), full, at any time. */
void vp_limiter_set(struct vp_limiter *limiter, int which, uint64_t size, uint64_t refill,
                    uint64_t burst, uint64_t now);
/* Take one operation of so many bytes: 0, or the nanoseconds until there is a token. */
uint64_t vp_limiter_take(struct vp_limiter *limiter, uint64_t bytes, uint64_t now);

/* --- what Python reads at any time --- */
struct vp_counters {
    uint64_t kicks, notifications, notifications_suppressed, chains, publications, throttled;
    uint64_t reads, writes, flushes, discards, write_zeroes, get_ids, handed_over;
    uint64_t read_bytes, written_bytes;
    uint64_t refused_read_only, refused_range, refused_header, refused_segments;
    uint64_t refused_unsupported;
    uint64_t failed_reads, failed_writes, failed_flushes, failed_discards, failed_write_zeroes;
    uint64_t last_errno;
    uint64_t received_frames, received_bytes, sent_frames, sent_bytes;
    uint64_t dropped_no_header, dropped_header, dropped_offload, dropped_short, dropped_long;
    uint64_t dropped_no_room, dropped_link, dropped_filtered, dropped_away;
    uint64_t dropped_bytes;
    uint64_t dropped_length, dropped_cid, dropped_unknown, short_buffers;
    uint64_t refused_nobody, refused_full, refused_guest;
    uint64_t reset_credit, reset_host, reset_protocol;
};

/* --- one chain on its way --- */
enum vp_operation { VP_NONE, VP_READ, VP_WRITE, VP_SYNC, VP_PUNCH, VP_ZERO, VP_FILL };

struct vp_segment { /* 5.2.6: struct virtio_blk_discard_write_zeroes */
    uint64_t sector;
    uint32_t sectors, flags;
};

struct vp_request {
    struct vp_queue *queue;
    struct vp_batch *batch;
    uint32_t chain;             /* index in the batch */
    uint32_t kind;              /* VIRTIO_BLK_T_* */
    uint32_t operation;         /* what the engine has to do next */
    uint32_t prepared;          /* parsed, and not started: 2 when a limit is the reason */
    struct iovec *iovecs;       /* what is left to move */
    uint32_t iovec_count;
    uint32_t segment, segment_count;
    uint64_t offset, left;      /* bytes */
    uint64_t cost;              /* bytes, for the limiter */
    uint64_t written;           /* into the chain, the status byte apart */
    struct vp_segment *segments;
    uint8_t *status;
};

struct vp_batch {
    struct vq_batch *chains;
    int busy;
    struct vp_request requests[VP_CHAINS];
};

struct vp_queue {
    struct vp_pump *pump;
    struct vq_ring *ring;
    int kick;                   /* eventfd, or -1 */
    int interrupt;              /* eventfd, or -1; Python may change it */
    int asked;                  /* the driver was asked for kicks */
    int asleep;                 /* until there is one */
    uint64_t idle;              /* since when nothing was available */
    int (*serve)(struct vp_queue *queue); /* whether there was something to do */
    int fd;                     /* of the device's other end */
    short fd_events;            /* what is waited for there before the queue is served again */
    int broken;                 /* the other end is gone */
    struct vp_request **collected; /* chains for one frame, until there are enough */
    uint32_t collected_count, held; /* and how many descriptors they are */
    uint64_t room;              /* and bytes */
    int faulted;                /* malformed: not served any more; Python reads it */
    struct vp_batch *current;   /* of its chains, those before `next` were started */
    uint32_t next;
    uint32_t adopted, adopted_next; /* batches of chains that were in flight before the start */
    uint32_t batch_count, free_count;
    struct vp_batch **batches, **free; /* room for VP_BATCHES and all that were in flight */
    uint32_t done;              /* completed, to be published */
    uint64_t done_bytes;
    uint32_t *heads, *lengths;  /* room for all that can be in flight */
};

/* --- devices --- */
struct vp_block {
    int fd;
    int is_device;              /* a block device, not a file */
    uint32_t read_only;
    uint32_t may_flush, may_discard, may_write_zeroes; /* negotiated */
    uint32_t writeback;         /* Python may change it */
    uint64_t sectors;           /* Python may change it */
    uint64_t max_data;          /* bytes of one request */
    uint32_t max_discard_sectors, max_discard_segments;
    uint32_t max_write_zeroes_sectors, max_write_zeroes_segments;
    uint8_t id[20];
};

/* Which frames a driver wants (5.1.6.5.1 to 5.1.6.5.3). */
enum { VP_ADDRESSES = 64 };
struct vp_filter {
    uint32_t active;            /* 0: all of them */
    uint32_t modes;             /* bit n: the command n of the class VIRTIO_NET_CTRL_RX is on */
    uint32_t unicast_count, multicast_count;
    uint8_t mac[6];
    uint8_t unicast[VP_ADDRESSES][6], multicast[VP_ADDRESSES][6];
    uint8_t vlans[4096 / 8];
};

enum vp_link {
    VP_TAP,                     /* a `struct virtio_net_hdr` in front of each frame */
    VP_DATAGRAMS,               /* one frame each */
    VP_STREAM,                  /* frames behind their lengths, four bytes, big-endian */
};

struct vp_net {
    int fd, link;
    uint64_t features;          /* negotiated */
    uint32_t length;            /* of the frame that waits, virtio's header included; 0: none */
    uint32_t admitted;          /* a limit has let it through */
    uint8_t *frame, *bounce;    /* room for one each */
    struct vp_filter filter;    /* guarded by `lock` */
    struct vp_limiter *limiters[2]; /* of receiving and of sending, or NULL; Python may give one */
    uint8_t peer[128];          /* address of the other end, of datagrams */
    uint32_t peer_length;
    uint8_t *received;          /* of a stream: bytes from `start` to `end` are not yet taken */
    uint32_t start, end;
    uint8_t *unsent;            /* the rest of a frame whose beginning the stream has taken */
    uint32_t unsent_start, unsent_end;
};

/* The most bytes that are kept for a descriptor that is slower than the driver, and of one connection
 * of a socket device: six packets of Linux's largest, which a socket with a buffer of 416 KiB, the
 * most that Linux gives without privileges, takes at once. */
enum { VP_WINDOW = 256 << 10, VP_CREDIT = 384 << 10 };
struct vp_window {              /* a ring of bytes that wait */
    uint8_t *bytes;             /* room for `size`, or NULL */
    uint32_t size, start, length;
};

struct vp_output {
    int fd;
    int lossy;                  /* what finds no room is dropped: the driver never waits */
    int broken;
    struct vp_request *current; /* under way; `offset` bytes of it are taken */
    uint64_t offset;
    struct vp_window window;
};

struct vp_uring {
    int fd;
    uint32_t *sq_head, *sq_tail, *sq_array, *cq_head, *cq_tail;
    uint32_t sq_mask, cq_mask, sq_entries, cq_entries;
    uint32_t queued, in_kernel;
    uint64_t queued_bytes;
    void *sqes, *cqes, *sq_map, *cq_map;
    size_t sq_size, cq_size, sqes_size;
};

struct vp_pump {
    int control;                /* eventfd that wakes the thread */
    int attention;              /* eventfd that wakes Python */
    int running;
    int stopping;
    int has_uring;
    pthread_t thread;
    int64_t thread_id;
    pthread_mutex_t lock;
    uint32_t queue_count;
    struct vp_queue queues[VP_QUEUES];
    uint32_t *status;           /* interrupt status of the transport, or NULL */
    struct vp_limiter *limiter; /* or NULL; Python may give one */
    uint64_t spin;              /* nanoseconds for which to look for chains before sleeping */
    int alone;                  /* never look: it would keep something else from running */
    uint64_t wake;              /* when there are tokens again; 0: nothing waits */
    struct vp_counters counters;
    struct vp_block block;
    struct vp_net net;
    struct vp_output output;
    struct vp_vsock *vsock;     /* or NULL */
    struct vp_uring uring;
    uint32_t header_size;       /* bytes of each chain to copy */
    /* Guarded by `lock`; room for as many as can be in flight. */
    struct vp_request **handed;
    struct vp_answer *answers;
    uint32_t handed_count, answer_count;
};

struct vp_answer {
    uint32_t queue, head, length;
};

/* --- pump.c --- */
/* NULL with an errno in *error. `uring` asks for that engine. */
struct vp_pump *vp_new(int uring, int *error);
void vp_free(struct vp_pump *pump);
/* 0 or an errno. */
int vp_start(struct vp_pump *pump);
/* End the thread. What was started is finished before; the rest is given back or stays in flight. */
void vp_stop(struct vp_pump *pump);
/* Requests that are Python's: 1 and where it is, or 0. */
int vp_take(struct vp_pump *pump, uint32_t *queue, uint32_t *chain, struct vq_batch **batch);
/* Answer one of them. */
void vp_answer(struct vp_pump *pump, uint32_t queue, uint32_t head, uint32_t length);

uint64_t vp_now(void);
void vp_wake(int fd);
void vp_hand_over(struct vp_request *request);

static inline void vp_pause(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Ask for the line of the cache that is about to be written, which another processor may have. */
static inline void vp_about_to_write(const void *at)
{
#if defined(__x86_64__)
    __asm__ volatile("prefetchw %0" : : "m"(*(const uint8_t *)at));
#else
    __builtin_prefetch(at, 1);
#endif
}

static inline int vp_stopping(struct vp_pump *pump)
{
    return __atomic_load_n(&pump->stopping, __ATOMIC_ACQUIRE);
}

/* --- pump_queue.c --- */
/* Add a ring, before the start. 0; -1 when there are too many; -2 without memory of the host's. */
int vp_add_queue(struct vp_pump *pump, struct vq_ring *ring, int kick, int interrupt);
/* Make a chain that is in flight the thread's own, before the start: `elements` are pairs of guest
 * address and length. 0; -1 when it is not all memory; -2 without memory of the host's. */
int vp_adopt(struct vp_pump *pump, uint32_t queue, uint32_t head, uint32_t readable,
             uint32_t writable, const uint64_t *elements);
/* After the stop: batches of a queue, to look for chains that are still in flight; NULL behind the
 * last. `vp_leave` then makes them chains that were taken one by one, and forgets the queues. */
struct vq_batch *vp_batch(struct vp_pump *pump, uint32_t queue, uint32_t number);
void vp_leave(struct vp_pump *pump);
/* The next chains into `current`: 1; 0 when it is worth asking again at once; -1 when it is not. */
int vp_get_chains(struct vp_queue *queue);
/* Whether there is one in the ring. */
int vp_available(const struct vp_queue *queue);
/* The next of them to be started; NULL until there is one, or the host has room for it. */
struct vp_request *vp_next_request(struct vp_queue *queue);
/* Whether a limit lets a request of so many bytes through now; else the thread wakes when it may. */
int vp_admit(struct vp_pump *pump, struct vp_limiter **limiter, uint64_t bytes);
void vp_give_back(struct vp_queue *queue);
/* A chain is used, to be published with others; `vp_finish` may do that at once. */
void vp_done(struct vp_request *request, uint64_t length);
void vp_finish(struct vp_request *request, uint64_t length);
void vp_publish(struct vp_queue *queue);
/* Publish if there is enough for it. */
void vp_publish_much(struct vp_queue *queue);
/* Copy into a chain, from its beginning; returns how much there was room for. */
uint64_t vp_fill(struct vp_request *request, const uint8_t *from, uint64_t length);
/* Pieces of the readable (0) or writable (1) part of a chain from an offset on, `most` bytes of them
 * and `room` pieces; returns their number, and their bytes in *length. */
int vp_pieces(const struct vp_request *request, int writable, uint64_t offset, uint64_t most,
              struct iovec *pieces, int room, uint64_t *length);

static inline const struct vq_chain *vp_chain(const struct vp_request *request)
{
    return &request->batch->chains->chains[request->chain];
}

/* Where the writable part of a chain, which has one, begins. */
static inline void *vp_writable(const struct vp_request *request)
{
    const struct vq_chain *chain = vp_chain(request);
    const struct vq_iovec *iovecs = request->batch->chains->iovecs + chain->first_iovec;
    return (void *)(uintptr_t)iovecs[chain->readable_iovecs].host;
}

/* Chains that were collected are available again; after `vp_give_back`. */
void vp_give_back_collected(struct vp_queue *queue);

/* Whether there are chains that were popped and not started. */
static inline int vp_at_hand(const struct vp_queue *queue)
{
    return queue->current != NULL && queue->next < queue->current->chains->count;
}

/* --- pump_block.c --- */
/* Let a queue's requests go on: whether there was something to do. */
int vp_block_serve(struct vp_queue *queue);
/* Parse a request. 1: `operation` is to be done; 0: answered; -1: for Python to see. */
int vp_block_prepare(struct vp_request *request);
/* Take note of the operation's result (bytes or -errno). 1: `operation` is to be done; 0: answered. */
int vp_block_step(struct vp_request *request, int64_t result);

/* --- pump_net.c --- */
int vp_net_receive(struct vp_queue *queue);
int vp_net_send(struct vp_queue *queue);
/* Serve the two queues that were added by this link, from the start on. 0, or -1 without memory of
 * the host's. */
int vp_net_open(struct vp_pump *pump, int fd, int link, uint64_t features);
/* Have another filter, at any time. */
void vp_net_set_filter(struct vp_pump *pump, const struct vp_filter *filter);

/* --- pump_link.c --- */
/* The next frame, behind the room for virtio's header, to net->frame: its length with that header;
 * 0 when there is none; or -errno. */
int64_t vp_link_receive(struct vp_net *net, struct vp_counters *counters);
/* Send a frame in pieces, the first of them virtio's header. 0 or -errno; -EAGAIN without room. */
int vp_link_send(struct vp_net *net, struct iovec *pieces, int count, uint64_t size,
                 struct vp_counters *counters);
/* Send what is left of a frame. 0, or -EAGAIN when there is still some. */
int vp_link_flush(struct vp_net *net);
/* Whether a driver wants a frame. */
int vp_link_wants(const struct vp_filter *filter, const uint8_t *frame, uint64_t size);

/* --- pump_window.c --- */
/* Keep as many bytes as there is room for; returns how many. */
uint64_t vp_window_keep(struct vp_window *window, const uint8_t *from, uint64_t length);
/* What waits, in two pieces. */
void vp_window_pieces(const struct vp_window *window, struct iovec pieces[2]);
/* So many bytes of it are gone. */
void vp_window_drop(struct vp_window *window, uint64_t length);

/* --- pump_output.c --- */
int vp_output_serve(struct vp_queue *queue);
/* Have a window. 0, or -1 without memory of the host's. */
int vp_output_new(struct vp_pump *pump);
/* Serve the queue that was added by the descriptor, from the start on. */
void vp_output_open(struct vp_pump *pump);
/* What waits in the window, to be read (1) or set (0); the pump does not run. */
void vp_output_window(struct vp_pump *pump, uint8_t *bytes, uint32_t length, int read);

/* --- pump_vsock.c --- */
enum { VP_PACKET = 64 << 10, VP_CONNECTIONS = 1023, VP_ASKED = 256, VP_ORDERS = 1024, VP_GREETING = 32 };
int vp_vsock_receive(struct vp_queue *queue);
int vp_vsock_send(struct vp_queue *queue);
/* Serve a socket device. 0 or an errno. */
int vp_vsock_new(struct vp_pump *pump, uint64_t cid);
void vp_vsock_free(struct vp_pump *pump);
/* Serve the two queues that were added, from the start on. 0, or -1 without memory of the host's. */
int vp_vsock_open(struct vp_pump *pump);
/* Their kicks are not listened to any more. */
void vp_vsock_leave(struct vp_pump *pump);
/* Hear what has become of the hosts' ends, of kicks and of Python's wishes; wait for something (-1) or
 * not (0). Whether there was something. One set of descriptors that stays, and which tells of changes
 * alone, so that a sleep costs one system call. */
int vp_vsock_hear(struct vp_pump *pump, int timeout);
/* How many connections there are. */
uint32_t vp_vsock_count(struct vp_pump *pump);
/* A connection that the guest asks for: 1 and its ports, or 0. */
int vp_vsock_asked(struct vp_pump *pump, uint32_t *guest_port, uint32_t *host_port);
/* At any time: give the guest, if it still asks for it, a connection with the host's end `fd`, or
 * refuse it (-1); or, with `calls`, ask the guest for one, and send the host's end a greeting when it
 * agrees. The descriptor is the pump's. 0, or -1 when there are too many such orders. */
int vp_vsock_order(struct vp_pump *pump, uint32_t guest_port, uint32_t host_port, int fd, int calls,
                   const char *greeting, uint32_t length);
/* Break off all connections and know of none; the pump does not run. */
void vp_vsock_forget(struct vp_pump *pump);

/* --- pump_file.c --- */
int vp_file_write_flags(const struct vp_block *disk);
int64_t vp_file_do(struct vp_request *request);
/* Flags of `fallocate` for an operation. */
int vp_file_mode(const struct vp_request *request);

/* --- pump_uring.c --- */
int vp_uring_open(struct vp_uring *uring, uint32_t entries);
void vp_uring_close(struct vp_uring *uring);
int vp_uring_has_room(const struct vp_uring *uring);
/* 0, or -1 when the kernel has no room or does not know the operation. */
int vp_uring_start(struct vp_uring *uring, struct vp_request *request);
/* Hand what was started to the kernel, and take results: whether anything moved. */
int vp_uring_turn(struct vp_pump *pump);

#endif
