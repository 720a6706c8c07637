/* Packets of stream sockets from the guest, section 5.10.6.
 *
 * A header is copied, checked, and only the copy is used. Python looks for the host's end of
 * connections that the guest asks for. */

#include "pump_vsock.h"

#include <limits.h>
#include <string.h>

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

/* The copy that was made when its chain was popped: it stays what it is. */
static void copy_header(const struct vp_request *request, struct header *header)
{
    const struct vq_batch *chains = request->batch->chains;
    memcpy(header, chains->headers + HEADER * (size_t)request->chain, HEADER);
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

/* How many bytes of what is at hand are taken, behind some of a packet, before the guest is told of
 * credit. One that has filled its window sends nothing before all of it is taken: it is told once, of
 * the whole. Others are told in time to send meanwhile. */
static uint64_t before_telling(const struct vp_queue *queue, const struct connection *connection,
                               uint64_t some)
{
    uint64_t untold = connection->fwd_cnt - connection->told + some, bytes = bytes_at_hand(queue);
    uint32_t window = vp_connection_window(connection), most = vp_connection_most(connection);
    if (untold + bytes <= window)
        return bytes;
    return most > untold ? most - untold : 0;
}

/* Add pieces of the packets behind one, as far as they are data of the same stream: how many pieces
 * there are then. */
static int gather(const struct vp_request *request, uint64_t room, struct iovec *pieces, int count)
{
    const struct vp_queue *queue = request->queue;
    struct header first, header;
    copy_header(request, &first);
    for (uint32_t i = queue->next; i < queue->current->chains->count && count < IOV_MAX; i++) {
        const struct vp_request *next = &queue->current->requests[i];
        uint64_t readable = vp_chain(next)->readable_length, size;
        copy_header(next, &header);
        if (readable < HEADER || header.len > readable - HEADER || header.len > room ||
            memcmp(&header, &first, offsetof(struct header, len)) != 0 ||
            header.type != STREAM || header.op != RW)
            break;
        count += vp_pieces(next, 0, HEADER, header.len, pieces + count, IOV_MAX - count, &size);
        room -= size;
    }
    return count;
}

/* Give the host pieces, of `size` bytes, which are the last of a packet, or not: how many of them it has
 * taken, or -errno. With the last go packets behind it. */
static int64_t put(const struct vp_request *request, struct connection *connection,
                   struct iovec *pieces, int count, uint64_t size, int last)
{
    if (last)
        count = gather(request, before_telling(request->queue, connection, size), pieces, count);
    int64_t done = vp_connection_put(connection->fd, pieces, count);
    if (done <= (int64_t)size)
        return done;
    connection->ahead = (uint32_t)((uint64_t)done - size);
    return (int64_t)size;
}

static void take_data(struct vp_pump *pump, struct vp_request *request,
                      struct connection *connection, uint32_t length)
{
    struct vp_vsock *vsock = pump->vsock;
    struct iovec pieces[IOV_MAX];
    if (connection->guest_shut & SHUTDOWN_SEND) {
        vp_connection_break(vsock, connection, &pump->counters.reset_protocol, STREAM);
        return;
    }
    if (length > VP_CREDIT - connection->kept.length) {
        vp_connection_break(vsock, connection, &pump->counters.reset_credit, STREAM);
        return;
    }
    pump->counters.sent_bytes += length;
    uint32_t sent = connection->ahead < length ? connection->ahead : length;
    uint64_t offset = HEADER + sent, left = length - sent;
    connection->ahead -= sent;
    connection->fwd_cnt += sent;
    while (left != 0) {
        uint64_t size;
        int count = vp_pieces(request, 0, offset, left, pieces, IOV_MAX, &size);
        int64_t done = 0;
        if (connection->kept.length == 0)
            done = put(request, connection, pieces, count, size, size == left);
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
        vsock->hurry = before_telling(request->queue, connection, 0) == 0 ? NOW : SOON;
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
    copy_header(request, &header);
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
        if (vsock->hurry == NOW || (vsock->hurry == SOON && !vp_at_hand(queue)))
            return 1;
    }
    return 1;
}
