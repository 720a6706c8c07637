/* Connections of a socket device, for pump_connection.c (the table, the hosts' ends, Python's orders),
 * pump_vsock.c and pump_vsock_send.c (packets to the guest, and from it). Only the thread touches
 * connections. */
#ifndef VIRTIO_PUMP_VSOCK_H
#define VIRTIO_PUMP_VSOCK_H

#include "pump.h"

enum { HEADER = VP_VSOCK_HEADER, HOST_CID = 2, STREAM = 1, NONE = 0xFFFF };
enum { REQUEST = 1, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST };
enum { SHUTDOWN_RCV = 1, SHUTDOWN_SEND = 2, SHUTDOWN_BOTH = 3 };
/* How many packets of a queue are moved before the other has its turn. */
enum { BUDGET = 64 };
/* So many resets wait before the guest is heard again; each connection may add one. */
enum { WAITING = 256, RESETS = 2048, BUCKETS = 1024 };

struct header {
    uint64_t src_cid, dst_cid;
    uint32_t src_port, dst_port, len;
    uint16_t type, op;
    uint32_t flags, buf_alloc, fwd_cnt;
};

/* Now, or when nothing of what is at hand is left. */
enum hurry { SOON = 1, NOW };
enum state { FREE, ASKED, CALLING, OPEN, LEAVING /* the guest is through with it */ };

struct connection {
    uint32_t guest_port, host_port;
    uint16_t next;              /* of those that are free, or have the same hash */
    uint8_t state;
    uint8_t owed;               /* bit n: a packet with the operation n */
    uint8_t queued;             /* among those that are ready */
    uint8_t readable, last, gone; /* the host's end: with its own end to be read; taking no more */
    uint8_t guest_shut;         /* flags of the guest's SHUTDOWN */
    uint8_t ended;              /* the guest knows that the host sends no more */
    uint8_t asked;              /* for credit, and the guest has said nothing since */
    uint8_t greeting_length;
    char greeting[VP_GREETING];
    int fd;                     /* the host's end, or -1 */
    uint32_t tx_cnt, peer_buf_alloc, peer_fwd_cnt;
    uint32_t fwd_cnt, told;     /* and what the guest knows of it */
    uint32_t ahead;             /* bytes of packets at hand that the host has before their turn */
    struct vp_window kept;      /* what the host has not taken */
};

struct reset {
    uint32_t guest_port, host_port;
    uint16_t type;
};

struct order {
    uint32_t guest_port, host_port;
    int fd, calls;
    uint32_t length;
    char greeting[VP_GREETING];
};

struct vp_vsock {
    uint64_t cid;
    int epoll;
    uint32_t count;             /* Python reads it */
    uint16_t free;
    uint16_t buckets[BUCKETS];
    struct connection connections[VP_CONNECTIONS];
    uint16_t ready[VP_CONNECTIONS]; /* a ring: connections take turns */
    uint32_t ready_first, ready_count;
    uint32_t turns;             /* since events were heard */
    int hurry;                  /* whether a guest is to be told of credit: 0, SOON or NOW */
    struct reset resets[RESETS]; /* a ring */
    uint32_t reset_first, reset_count;
    /* Guarded by the pump's lock. */
    struct order orders[VP_ORDERS];
    uint32_t order_count;
    uint32_t asked[VP_ASKED][2]; /* a ring of ports */
    uint32_t asked_first, asked_count;
};

/* NULL when there is none of that name. */
struct connection *vp_connection_find(struct vp_vsock *vsock, uint32_t guest_port,
                                      uint32_t host_port);
/* NULL when there are too many. */
struct connection *vp_connection_add(struct vp_vsock *vsock, uint32_t guest_port,
                                     uint32_t host_port);
/* The guest is through with it; what it has sent is still given to the host. */
void vp_connection_leave(struct vp_vsock *vsock, struct connection *connection);
/* Break a connection off, which is counted. */
void vp_connection_break(struct vp_vsock *vsock, struct connection *connection, uint64_t *counter,
                         uint16_t type);
/* Tell the guest that something is no connection. */
void vp_vsock_reset(struct vp_vsock *vsock, uint32_t guest_port, uint32_t host_port, uint16_t type);
/* It has its turn, once, to send what it owes and has. */
void vp_connection_enqueue(struct vp_vsock *vsock, struct connection *connection);
/* The next of those that have their turn; there is one. */
struct connection *vp_connection_next(struct vp_vsock *vsock);
/* A packet with this operation is to be sent. */
void vp_connection_owe(struct vp_vsock *vsock, struct connection *connection, int op);
/* Send pieces to a host's end: how many bytes were taken, or -errno. */
int64_t vp_connection_put(int fd, struct iovec *pieces, int count);
/* Keep pieces until the host has room. 0 or -errno. */
int vp_connection_keep(struct vp_vsock *vsock, struct connection *connection,
                       const struct iovec *pieces, int count);
/* Close the halves that the guest has closed, as far as nothing waits. */
void vp_connection_close_halves(struct connection *connection);
/* Have a queue's kicks. */
int vp_vsock_listen(struct vp_pump *pump, uint32_t queue);
/* Do what Python wants. */
void vp_vsock_follow(struct vp_pump *pump);

/* How much a guest may have on its way: no more than it takes itself, as Linux has it, whatever it was
 * given credit for. */
static inline uint32_t vp_connection_window(const struct connection *connection)
{
    return connection->peer_buf_alloc < VP_CREDIT ? connection->peer_buf_alloc : VP_CREDIT;
}

/* How much room there may be at most that the guest does not know of. */
static inline uint32_t vp_connection_most(const struct connection *connection)
{
    uint32_t window = vp_connection_window(connection);
    return window > 2 * VP_PACKET ? window - VP_PACKET : window / 2;
}

/* Whether the guest should hear of room that it does not know of. */
static inline int vp_connection_untold(const struct connection *connection)
{
    uint32_t untold = connection->fwd_cnt - connection->told;
    return untold != 0 && untold >= vp_connection_most(connection);
}

#endif
