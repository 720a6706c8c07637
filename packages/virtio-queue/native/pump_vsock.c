/* Packets of stream sockets to the guest, section 5.10.6; pump_vsock_send.c has those from it.
 *
 * Only the thread touches connections. What is owed to the guest is a bit of its connection, not a
 * list, so that nothing grows however slowly it takes its packets; behind resets of what was no
 * connection, and behind questions to Python, its own packets wait. Counters wrap at 32 bits
 * (5.10.6.3). */

#include "pump_vsock.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

/* How many turns the queues have before events have theirs, where none sleeps. */
enum { SELDOM = 8 };
/* Packets of so many bytes, and as many as one call receives. */
enum { MOST = VP_PACKET, TOGETHER = 16 };

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
        vp_about_to_write(vp_writable(queue->collected[count])); /* the header */
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
    if (++vsock->turns == SELDOM) /* it may be too busy to sleep */
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
