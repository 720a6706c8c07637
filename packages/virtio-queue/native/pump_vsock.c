/* Packets of stream sockets between two queues and sockets of the host, section 5.10.6.
 *
 * Only the thread touches connections. Python looks for the host's end of those that the guest asks
 * for, and orders those that the host asks for. What is owed to the guest is a bit of its connection,
 * not a list, so that nothing grows however slowly it takes its packets; behind resets of what was no
 * connection, and behind questions to Python, its own packets wait.
 *
 * A header is copied, checked, and only the copy is used. Counters wrap at 32 bits (5.10.6.3). */

#include "pump_vsock.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

enum { HEADER = VP_VSOCK_HEADER, HOST_CID = 2 };
/* How many packets are moved before the other queue has its turn. */
enum { BUDGET = 64, SELDOM = 8 };
/* Packets of so many bytes, and as many as one call receives. */
enum { MOST = VP_PACKET, TOGETHER = 16 };

struct header {
    uint64_t src_cid, dst_cid;
    uint32_t src_port, dst_port, len;
    uint16_t type, op;
    uint32_t flags, buf_alloc, fwd_cnt;
};

/* --- from the guest --- */

static void ask_python(struct vp_pump *pump, const struct header *header)
{
    struct vp_vsock *vsock = pump->vsock;
    struct connection *connection = vp_connection_add(vsock, header->src_port, header->dst_port);
    if (connection == NULL) {
        pump->counters.refused_full++;
        vp_vsock_reset(vsock, header->src_port, header->dst_port, STREAM);
        return;
    }
    connection->state = ASKED;
    connection->peer_buf_alloc = header->buf_alloc;
    connection->peer_fwd_cnt = header->fwd_cnt;
    pthread_mutex_lock(&pump->lock);
    uint32_t last = (vsock->asked_first + vsock->asked_count) % VP_ASKED;
    vsock->asked[last][0] = header->src_port;
    vsock->asked[last][1] = header->dst_port;
    __atomic_store_n(&vsock->asked_count, vsock->asked_count + 1, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&pump->lock);
    vp_wake(pump->attention);
}

static void take_data(struct vp_pump *pump, struct vp_request *request,
                      struct connection *connection, uint32_t length)
{
    struct vp_vsock *vsock = pump->vsock;
    struct iovec pieces[IOV_MAX];
    uint64_t offset = HEADER, left = length;
    if (connection->guest_shut & SHUTDOWN_SEND) {
        vp_connection_break(vsock, connection, &pump->counters.reset_protocol, STREAM);
        return;
    }
    if (length > VP_CREDIT - connection->kept.length) {
        vp_connection_break(vsock, connection, &pump->counters.reset_credit, STREAM);
        return;
    }
    pump->counters.sent_bytes += length;
    while (left != 0) {
        uint64_t size;
        int count = vp_pieces(request, 0, offset, left, pieces, IOV_MAX, &size);
        int64_t done = 0;
        if (connection->kept.length == 0)
            done = vp_connection_put(connection->fd, pieces, count);
        connection->fwd_cnt += done > 0 ? (uint32_t)done : 0;
        if (done == 0) {
            done = vp_connection_keep(vsock, connection, pieces, count);
            done = done == 0 ? (int64_t)size : done;
        }
        if (done < 0) {
            vp_connection_break(vsock, connection, &pump->counters.reset_host, STREAM);
            return;
        }
        offset += (uint64_t)done;
        left -= (uint64_t)done;
    }
    if (vp_connection_untold(connection)) {
        uint32_t untold = connection->fwd_cnt - connection->told;
        uint32_t window = vp_connection_window(connection);
        vsock->hurry = 1;
        vsock->rest = window > untold ? window - untold : 0;
        vp_connection_enqueue(vsock, connection);
    }
}

static void begin(struct vp_vsock *vsock, struct connection *connection)
{
    struct iovec greeting = {connection->greeting, connection->greeting_length};
    connection->state = OPEN;
    if (greeting.iov_len != 0)
        vp_connection_put(connection->fd, &greeting, 1); /* the first bytes: there is room for them */
    vp_connection_enqueue(vsock, connection);
}

static void close_guest(struct vp_vsock *vsock, struct connection *connection, uint32_t flags)
{
    connection->guest_shut |= flags & SHUTDOWN_BOTH;
    if (connection->guest_shut == SHUTDOWN_BOTH) {
        vp_vsock_reset(vsock, connection->guest_port, connection->host_port, STREAM);
        vp_connection_leave(vsock, connection);
    } else {
        vp_connection_close_halves(connection);
        vp_connection_enqueue(vsock, connection);
    }
}

static void take_packet(struct vp_pump *pump, struct vp_request *request,
                        struct connection *connection, const struct header *header)
{
    struct vp_vsock *vsock = pump->vsock;
    struct vp_counters *counters = &pump->counters;
    connection->peer_buf_alloc = header->buf_alloc;
    connection->peer_fwd_cnt = header->fwd_cnt;
    if (connection->asked || vp_connection_untold(connection))
        vp_connection_enqueue(vsock, connection);
    connection->asked = 0;
    if (header->op == RST) {
        counters->refused_guest += connection->state == CALLING;
        vp_connection_leave(vsock, connection);
    } else if (header->op == RESPONSE && connection->state == CALLING &&
               !(connection->owed & 1 << REQUEST)) {
        begin(vsock, connection);
    } else if (connection->state != OPEN) {
        vp_connection_break(vsock, connection, &counters->reset_protocol, STREAM);
    } else if (header->op == RW) {
        take_data(pump, request, connection, header->len);
    } else if (header->op == SHUTDOWN) {
        close_guest(vsock, connection, header->flags);
    } else if (header->op == CREDIT_REQUEST) {
        vp_connection_owe(vsock, connection, CREDIT_UPDATE);
    } else if (header->op != CREDIT_UPDATE) {
        vp_connection_break(vsock, connection, &counters->reset_protocol, STREAM);
    }
}

static void take(struct vp_pump *pump, struct vp_request *request)
{
    struct vp_vsock *vsock = pump->vsock;
    struct vp_counters *counters = &pump->counters;
    uint64_t readable = vp_chain(request)->readable_length;
    struct header header;
    memcpy(&header, request->batch->chains->headers + HEADER * (size_t)request->chain, HEADER);
    if (readable < HEADER) {
        counters->dropped_header++;
        return;
    }
    if (header.len > readable - HEADER) {
        counters->dropped_length++;
        return;
    }
    if (header.src_cid != vsock->cid || header.dst_cid != HOST_CID) {
        counters->dropped_cid++;
        return;
    }
    struct connection *connection = vp_connection_find(vsock, header.src_port, header.dst_port);
    if (connection != NULL && header.type == STREAM) {
        take_packet(pump, request, connection, &header);
    } else if (connection != NULL) {
        vp_connection_break(vsock, connection, &counters->reset_protocol, header.type);
    } else if (header.type == STREAM && header.op == REQUEST) {
        ask_python(pump, &header);
    } else if (header.op != RST) { /* which needs no answer */
        counters->dropped_unknown += header.op != SHUTDOWN; /* an end that crossed ours is none */
        vp_vsock_reset(vsock, header.src_port, header.dst_port, header.type);
    }
}

/* Bytes of packets that were popped and are not taken yet. */
static uint64_t bytes_at_hand(const struct vp_queue *queue)
{
    uint64_t bytes = 0;
    for (uint32_t i = queue->next; i < queue->current->chains->count; i++) {
        uint64_t readable = queue->current->chains->chains[i].readable_length;
        bytes += readable > HEADER ? readable - HEADER : 0;
    }
    return bytes;
}

/* Whether to tell of credit before more is taken, so that the guest sends meanwhile. One that has
 * filled its window sends nothing before all of it is taken: it is told once, of the whole. */
static int is_urgent(const struct vp_queue *queue)
{
    const struct vp_vsock *vsock = queue->pump->vsock;
    if (!vsock->hurry)
        return 0;
    uint64_t bytes = bytes_at_hand(queue);
    return bytes == 0 || bytes > vsock->rest;
}

/* Whether there is something for the guest, which has buffers for it as far as is known. */
static int is_owing(const struct vp_pump *pump)
{
    return pump->vsock->reset_count + pump->vsock->ready_count != 0 && !pump->queues[0].asleep;
}

/* Look for packets for a while before the guest is asked for kicks, where that paid the last time: it
 * may be about to send. Whether there is something else to do first. */
static int linger(struct vp_queue *queue)
{
    struct vp_pump *pump = queue->pump;
    if (pump->alone || queue->asleep || vp_at_hand(queue) || vp_available(queue))
        return 0;
    if (is_owing(pump))
        return 1;
    queue->idle = vp_now();
    if (pump->spin == 0)
        return 0;
    for (uint32_t i = 0; i < pump->queue_count; i++)
        vp_publish(&pump->queues[i]);
    do {
        for (int i = 0; i < 16; i++) {
            if (vp_available(queue))
                return 0;
            vp_pause();
        }
        if (vp_vsock_hear(pump, 0))
            return 1;
    } while (vp_now() - queue->idle < pump->spin && !vp_stopping(pump));
    return 0;
}

int vp_vsock_send(struct vp_queue *queue)
{
    struct vp_vsock *vsock = queue->pump->vsock;
    for (int i = 0; i < BUDGET; i++) {
        if (vsock->reset_count >= WAITING ||
            __atomic_load_n(&vsock->asked_count, __ATOMIC_ACQUIRE) == VP_ASKED)
            return 0;
        if (linger(queue))
            return 1;
        struct vp_request *request = vp_next_request(queue);
        if (request == NULL) /* what the guest is owed now is sent before the thread sleeps */
            return is_owing(queue->pump);
        take(queue->pump, request);
        vp_finish(request, 0);
        if (is_urgent(queue))
            return 1;
    }
    return 1;
}

/* --- to the guest --- */

/* Have buffers: at least one, and of those that are at hand as many as are filled at once. */
static int collect(struct vp_queue *queue)
{
    while (queue->collected_count < TOGETHER) {
        if (queue->collected_count != 0 && !vp_at_hand(queue))
            return 1;
        struct vp_request *request = vp_next_request(queue);
        if (request == NULL)
            return 0;
        if (vp_chain(request)->writable_length > HEADER) {
            queue->collected[queue->collected_count++] = request;
        } else {
            queue->pump->counters.short_buffers++;
            vp_finish(request, 0);
        }
    }
    return 1;
}

/* `count` buffers are used. */
static void use(struct vp_queue *queue, uint32_t count)
{
    queue->collected_count -= count;
    memmove(queue->collected, queue->collected + count,
            queue->collected_count * sizeof *queue->collected);
    if (queue->done_bytes >= MOST)
        vp_publish(queue);
}

static void write_header(struct vp_queue *queue, uint32_t buffer, const struct header *header)
{
    vp_fill(queue->collected[buffer], (const uint8_t *)header, HEADER);
    queue->collected[buffer]->cost = header->len;
    vp_done(queue->collected[buffer], HEADER + (uint64_t)header->len);
}

/* A packet of a connection into a buffer; its data are there already. */
static void write_packet(struct vp_queue *queue, uint32_t buffer, struct connection *connection,
                         uint16_t op, uint32_t length, uint32_t flags)
{
    struct header header = {
        HOST_CID, queue->pump->vsock->cid, connection->host_port, connection->guest_port,
        length, STREAM, op, flags, VP_CREDIT, connection->fwd_cnt,
    };
    connection->told = connection->fwd_cnt;
    connection->owed &= (uint8_t)~(1 << op);
    write_header(queue, buffer, &header);
}

static void write_control(struct vp_queue *queue, struct connection *connection, uint16_t op,
                          uint32_t flags)
{
    write_packet(queue, 0, connection, op, 0, flags);
    use(queue, 1);
}

static void write_reset(struct vp_queue *queue)
{
    struct vp_vsock *vsock = queue->pump->vsock;
    struct reset *reset = &vsock->resets[vsock->reset_first];
    struct header header = {HOST_CID, vsock->cid, reset->host_port, reset->guest_port,
                            0, reset->type, RST, 0, 0, 0};
    vsock->reset_first = (vsock->reset_first + 1) % RESETS;
    vsock->reset_count--;
    write_header(queue, 0, &header);
    use(queue, 1);
}

/* Bytes that the guest has room for; none where its counters make no sense. */
static uint32_t credit_of(const struct connection *connection)
{
    uint32_t in_flight = connection->tx_cnt - connection->peer_fwd_cnt;
    return connection->peer_buf_alloc > in_flight ? connection->peer_buf_alloc - in_flight : 0;
}

/* Receive into buffers, one packet each: how many bytes, 0 at the end, or -errno. */
static int64_t receive(struct vp_queue *queue, struct connection *connection, uint32_t limit)
{
    struct iovec pieces[IOV_MAX];
    uint64_t sizes[TOGETHER], all = 0;
    struct msghdr message = {.msg_iov = pieces};
    uint32_t count = 0;
    ssize_t got;
    for (; count < queue->collected_count && all < limit && message.msg_iovlen < IOV_MAX; count++) {
        uint64_t most = limit - all < MOST ? limit - all : MOST;
        message.msg_iovlen += (size_t)vp_pieces(
            queue->collected[count], 1, HEADER, most, pieces + message.msg_iovlen,
            IOV_MAX - (int)message.msg_iovlen, &sizes[count]);
        all += sizes[count];
    }
    do
        got = recvmsg(connection->fd, &message, MSG_DONTWAIT);
    while (got < 0 && errno == EINTR);
    if (got <= 0)
        return got < 0 ? -errno : 0;
    connection->tx_cnt += (uint32_t)got;
    queue->pump->counters.received_bytes += (uint64_t)got;
    uint64_t left = (uint64_t)got;
    for (count = 0; left != 0; count++) {
        uint64_t part = sizes[count] < left ? sizes[count] : left;
        write_packet(queue, count, connection, RW, (uint32_t)part, 0);
        left -= part;
    }
    use(queue, count);
    /* A stream that gave less than it might is empty; of more, and of its end, there is an event. */
    if ((uint64_t)got < all && !connection->last)
        connection->readable = 0;
    return got;
}

/* What `receive` would return; the guest has no room, but for the end there needs be none. */
static int64_t look(const struct connection *connection)
{
    uint8_t byte;
    ssize_t got = recv(connection->fd, &byte, 1, MSG_DONTWAIT | MSG_PEEK);
    return got < 0 ? -errno : got;
}

/* The host sends no more, or takes nothing either. */
static void end(struct vp_queue *queue, struct connection *connection)
{
    write_control(queue, connection, SHUTDOWN, connection->gone ? SHUTDOWN_BOTH : SHUTDOWN_SEND);
    connection->ended = 1;
    if (connection->gone) {
        connection->kept.length = 0;
        vp_connection_leave(queue->pump->vsock, connection);
    }
}

static void advance_data(struct vp_queue *queue, struct connection *connection)
{
    struct vp_pump *pump = queue->pump;
    if (connection->ended || connection->guest_shut & SHUTDOWN_RCV) {
        /* Nothing more goes to the guest, but the host may still go away altogether. */
        if (connection->gone)
            end(queue, connection);
        return;
    }
    if (!connection->readable)
        return;
    uint32_t credit = credit_of(connection);
    int64_t got = credit != 0 ? receive(queue, connection, credit) : look(connection);
    if (got == 0) {
        end(queue, connection);
    } else if (got == -EAGAIN) {
        connection->readable = 0;
    } else if (got < 0) {
        vp_connection_break(pump->vsock, connection, &pump->counters.reset_host, STREAM);
    } else if (credit != 0 && connection->readable) {
        vp_connection_enqueue(pump->vsock, connection); /* behind the others */
    } else if (credit == 0 && !connection->asked) {
        connection->asked = 1;
        write_control(queue, connection, CREDIT_REQUEST, 0);
    }
}

/* Send the next packets of a connection, if there are any. */
static void advance(struct vp_queue *queue, struct connection *connection)
{
    struct vp_vsock *vsock = queue->pump->vsock;
    int first = connection->owed & (1 << REQUEST | 1 << RESPONSE);
    if (connection->state != CALLING && connection->state != OPEN)
        return;
    int update = connection->owed & 1 << CREDIT_UPDATE || vp_connection_untold(connection);
    if (connection->state == CALLING && connection->gone) {
        vp_connection_break(vsock, connection, &queue->pump->counters.reset_host, STREAM);
    } else if (first) {
        write_control(queue, connection, first & 1 << REQUEST ? REQUEST : RESPONSE, 0);
        vp_connection_enqueue(vsock, connection);
    } else if (connection->state == OPEN && update) {
        write_control(queue, connection, CREDIT_UPDATE, 0);
        vp_connection_enqueue(vsock, connection);
    } else if (connection->state == OPEN) {
        advance_data(queue, connection);
    }
}

int vp_vsock_receive(struct vp_queue *queue)
{
    struct vp_pump *pump = queue->pump;
    struct vp_vsock *vsock = pump->vsock;
    const struct vp_queue *sender = &pump->queues[1];
    int more = 1;
    if (vsock->turns++ % SELDOM == 0) /* it may be too busy to sleep */
        vp_vsock_hear(pump, 0);
    vp_vsock_follow(pump); /* behind: what was heard is not told again */
    for (int i = 0; more && i < BUDGET; i++) {
        if (i != 0 && !sender->asleep && vp_available(sender)) /* it may be credit */
            break;
        more = !vp_stopping(pump) && vsock->reset_count + vsock->ready_count != 0 && collect(queue);
        if (more && vsock->reset_count != 0)
            write_reset(queue);
        else if (more)
            advance(queue, vp_connection_next(vsock));
    }
    if (vsock->hurry) /* the guest sends more while what it has sent is moved */
        vp_publish(queue);
    vsock->hurry = 0;
    return more;
}

int vp_vsock_open(struct vp_pump *pump)
{
    struct vp_queue *queues = pump->queues;
    queues[0].serve = vp_vsock_receive;
    queues[1].serve = vp_vsock_send;
    for (uint32_t i = 0; i < pump->queue_count; i++)
        if (vp_vsock_listen(pump, i) != 0)
            return -1;
    queues[0].collected = calloc(TOGETHER, sizeof *queues[0].collected);
    return queues[0].collected == NULL ? -1 : 0;
}
