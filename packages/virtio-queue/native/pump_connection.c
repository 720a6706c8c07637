/* Connections of a socket device: their table, the hosts' ends of them, what Python wants of them. */

#include "pump_vsock.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

/* Numbers of what is listened to, behind those of connections. */
enum { EVENTS = 64, CONTROL = VP_CONNECTIONS, KICKS };

/* --- the table --- */

static uint16_t *bucket_of(struct vp_vsock *vsock, uint32_t guest_port, uint32_t host_port)
{
    uint32_t hash = guest_port * 0x9E3779B1u ^ host_port * 0x85EBCA77u;
    return &vsock->buckets[hash >> 22];
}

struct connection *vp_connection_find(struct vp_vsock *vsock, uint32_t guest_port,
                                      uint32_t host_port)
{
    uint16_t at = *bucket_of(vsock, guest_port, host_port);
    for (; at != NONE; at = vsock->connections[at].next) {
        struct connection *each = &vsock->connections[at];
        if (each->guest_port == guest_port && each->host_port == host_port)
            return each;
    }
    return NULL;
}

struct connection *vp_connection_add(struct vp_vsock *vsock, uint32_t guest_port,
                                     uint32_t host_port)
{
    uint16_t at = vsock->free, *bucket = bucket_of(vsock, guest_port, host_port);
    if (at == NONE)
        return NULL;
    struct connection *new = &vsock->connections[at];
    vsock->free = new->next;
    *new = (struct connection){.guest_port = guest_port, .host_port = host_port, .next = *bucket,
                               .queued = new->queued, .fd = -1};
    *bucket = at;
    __atomic_store_n(&vsock->count, vsock->count + 1, __ATOMIC_RELAXED);
    return new;
}

static void release(struct vp_vsock *vsock, struct connection *connection)
{
    if (connection->fd >= 0) {
        /* A child of the host's may have it open still. */
        epoll_ctl(vsock->epoll, EPOLL_CTL_DEL, connection->fd, NULL);
        close(connection->fd);
    }
    free(connection->kept.bytes);
    connection->kept = (struct vp_window){0};
    connection->state = FREE;
    connection->fd = -1;
    connection->next = vsock->free;
    vsock->free = (uint16_t)(connection - vsock->connections);
    __atomic_store_n(&vsock->count, vsock->count - 1, __ATOMIC_RELAXED);
}

void vp_connection_leave(struct vp_vsock *vsock, struct connection *connection)
{
    uint16_t *at = bucket_of(vsock, connection->guest_port, connection->host_port);
    while (&vsock->connections[*at] != connection)
        at = &vsock->connections[*at].next;
    *at = connection->next;
    connection->state = LEAVING;
    if (connection->kept.length == 0)
        release(vsock, connection);
}

void vp_connection_enqueue(struct vp_vsock *vsock, struct connection *connection)
{
    if (connection->queued)
        return;
    connection->queued = 1;
    uint32_t last = (vsock->ready_first + vsock->ready_count++) % VP_CONNECTIONS;
    vsock->ready[last] = (uint16_t)(connection - vsock->connections);
}

struct connection *vp_connection_next(struct vp_vsock *vsock)
{
    struct connection *connection = &vsock->connections[vsock->ready[vsock->ready_first]];
    vsock->ready_first = (vsock->ready_first + 1) % VP_CONNECTIONS;
    vsock->ready_count--;
    connection->queued = 0;
    return connection;
}

void vp_connection_owe(struct vp_vsock *vsock, struct connection *connection, int op)
{
    connection->owed |= (uint8_t)(1 << op);
    vp_connection_enqueue(vsock, connection);
}

void vp_vsock_reset(struct vp_vsock *vsock, uint32_t guest_port, uint32_t host_port, uint16_t type)
{
    if (vsock->reset_count < RESETS)
        vsock->resets[(vsock->reset_first + vsock->reset_count++) % RESETS] =
            (struct reset){guest_port, host_port, type};
}

void vp_connection_break(struct vp_vsock *vsock, struct connection *connection, uint64_t *counter,
                         uint16_t type)
{
    ++*counter;
    if (!(connection->owed & 1 << REQUEST)) /* else the guest has never heard of it */
        vp_vsock_reset(vsock, connection->guest_port, connection->host_port, type);
    connection->kept.length = 0;
    vp_connection_leave(vsock, connection);
}

/* --- the host's end --- */

static int watch(struct vp_vsock *vsock, struct connection *connection, int change, int output)
{
    struct epoll_event event = {
        .events = EPOLLIN | EPOLLRDHUP | EPOLLET | (output ? EPOLLOUT : 0u),
        .data.u32 = (uint32_t)(connection - vsock->connections),
    };
    return epoll_ctl(vsock->epoll, change, connection->fd, &event);
}

int64_t vp_connection_put(int fd, struct iovec *pieces, int count)
{
    struct msghdr message = {.msg_iov = pieces, .msg_iovlen = (size_t)count};
    for (;;) {
        ssize_t sent = sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent >= 0)
            return sent;
        if (errno != EINTR)
            return errno == EAGAIN ? 0 : -errno;
    }
}

int vp_connection_keep(struct vp_vsock *vsock, struct connection *connection,
                       const struct iovec *pieces, int count)
{
    if (connection->kept.bytes == NULL) {
        connection->kept.size = VP_CREDIT;
        connection->kept.bytes = malloc(VP_CREDIT);
        if (connection->kept.bytes == NULL || watch(vsock, connection, EPOLL_CTL_MOD, 1) != 0)
            return -ENOMEM;
    }
    for (int i = 0; i < count; i++)
        vp_window_keep(&connection->kept, pieces[i].iov_base, pieces[i].iov_len);
    return 0;
}

void vp_connection_close_halves(struct connection *connection)
{
    if (connection->guest_shut & SHUTDOWN_SEND && connection->kept.length == 0)
        shutdown(connection->fd, SHUT_WR);
    if (connection->guest_shut & SHUTDOWN_RCV)
        shutdown(connection->fd, SHUT_RD);
}

/* The host has room again for what was kept. */
static void flush(struct vp_pump *pump, struct connection *connection)
{
    struct vp_vsock *vsock = pump->vsock;
    struct iovec pieces[2];
    while (connection->kept.length != 0) {
        vp_window_pieces(&connection->kept, pieces);
        int64_t done = vp_connection_put(connection->fd, pieces, 2);
        if (done < 0 && connection->state == LEAVING) {
            release(vsock, connection);
            return;
        }
        if (done < 0) {
            vp_connection_break(vsock, connection, &pump->counters.reset_host, STREAM);
            return;
        }
        if (done == 0)
            return;
        vp_window_drop(&connection->kept, (uint64_t)done);
        connection->fwd_cnt += (uint32_t)done;
    }
    if (connection->state == LEAVING) {
        release(vsock, connection);
        return;
    }
    free(connection->kept.bytes);
    connection->kept.bytes = NULL;
    watch(vsock, connection, EPOLL_CTL_MOD, 0);
    vp_connection_close_halves(connection);
    vp_connection_enqueue(vsock, connection);
}

static void hear_connection(struct vp_pump *pump, struct connection *connection, uint32_t what)
{
    if (what & ~(uint32_t)EPOLLOUT)
        connection->readable = 1;
    if (what & (EPOLLRDHUP | EPOLLHUP | EPOLLERR))
        connection->last = 1;
    if (what & (EPOLLHUP | EPOLLERR))
        connection->gone = 1;
    if (what & ~(uint32_t)EPOLLIN && connection->kept.length != 0)
        flush(pump, connection);
    if (connection->state != FREE && connection->state != LEAVING)
        vp_connection_enqueue(pump->vsock, connection);
}

int vp_vsock_hear(struct vp_pump *pump, int timeout)
{
    struct vp_vsock *vsock = pump->vsock;
    struct epoll_event events[EVENTS];
    int count = epoll_wait(vsock->epoll, events, EVENTS, timeout);
    vsock->turns = 0;
    for (int i = 0; i < count; i++) {
        uint32_t number = events[i].data.u32;
        if (number < VP_CONNECTIONS) {
            hear_connection(pump, &vsock->connections[number], events[i].events);
        } else if (number >= KICKS && number - KICKS < pump->queue_count) {
            struct vp_queue *queue = &pump->queues[number - KICKS];
            pump->counters.kicks += queue->asleep && !queue->faulted;
            queue->asleep &= queue->faulted;
        }
    }
    return count > 0;
}

/* An eventfd that is never read tells of each write all the same. */
static int listen_to(struct vp_vsock *vsock, int fd, uint32_t number)
{
    struct epoll_event event = {.events = EPOLLIN | EPOLLET, .data.u32 = number};
    return epoll_ctl(vsock->epoll, EPOLL_CTL_ADD, fd, &event);
}

int vp_vsock_listen(struct vp_pump *pump, uint32_t queue)
{
    return listen_to(pump->vsock, pump->queues[queue].kick, KICKS + queue);
}

void vp_vsock_leave(struct vp_pump *pump)
{
    for (uint32_t i = 0; i < pump->queue_count; i++)
        epoll_ctl(pump->vsock->epoll, EPOLL_CTL_DEL, pump->queues[i].kick, NULL);
}

/* --- what Python wants --- */

static void follow(struct vp_pump *pump, const struct order *order)
{
    struct vp_vsock *vsock = pump->vsock;
    struct connection *connection =
        vp_connection_find(vsock, order->guest_port, order->host_port);
    if (order->calls) {
        /* Hosts' ports are given out once round; one that is taken still is another's. */
        connection = connection == NULL
                         ? vp_connection_add(vsock, order->guest_port, order->host_port) : NULL;
        pump->counters.refused_full += connection == NULL;
    } else if (connection != NULL && connection->state != ASKED) {
        connection = NULL; /* the guest has an answer already */
    }
    if (connection == NULL) {
        if (order->fd >= 0)
            close(order->fd);
        return;
    }
    if (order->fd < 0) {
        vp_connection_break(vsock, connection, &pump->counters.refused_nobody, STREAM);
        return;
    }
    connection->fd = order->fd;
    connection->state = order->calls ? CALLING : OPEN;
    connection->greeting_length = (uint8_t)order->length;
    memcpy(connection->greeting, order->greeting, order->length);
    vp_connection_owe(vsock, connection, order->calls ? REQUEST : RESPONSE);
    if (watch(vsock, connection, EPOLL_CTL_ADD, 0) != 0)
        vp_connection_break(vsock, connection, &pump->counters.reset_host, STREAM);
}

void vp_vsock_follow(struct vp_pump *pump)
{
    struct vp_vsock *vsock = pump->vsock;
    if (__atomic_load_n(&vsock->order_count, __ATOMIC_ACQUIRE) == 0)
        return;
    pthread_mutex_lock(&pump->lock);
    for (uint32_t i = 0; i < vsock->order_count; i++)
        follow(pump, &vsock->orders[i]);
    __atomic_store_n(&vsock->order_count, 0, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&pump->lock);
}

int vp_vsock_order(struct vp_pump *pump, uint32_t guest_port, uint32_t host_port, int fd, int calls,
                   const char *greeting, uint32_t length)
{
    struct vp_vsock *vsock = pump->vsock;
    pthread_mutex_lock(&pump->lock);
    /* Answers to what the guest asks always find room. */
    int room = vsock->order_count < (calls ? VP_ORDERS / 2 : VP_ORDERS);
    if (room) {
        struct order *order = &vsock->orders[vsock->order_count];
        __atomic_store_n(&vsock->order_count, vsock->order_count + 1, __ATOMIC_RELEASE);
        *order = (struct order){guest_port, host_port, fd, calls, length, {0}};
        memcpy(order->greeting, greeting, length);
    }
    pthread_mutex_unlock(&pump->lock);
    vp_wake(pump->control);
    return room ? 0 : -1;
}

int vp_vsock_asked(struct vp_pump *pump, uint32_t *guest_port, uint32_t *host_port)
{
    struct vp_vsock *vsock = pump->vsock;
    pthread_mutex_lock(&pump->lock);
    int found = vsock->asked_count != 0, was_full = vsock->asked_count == VP_ASKED;
    if (found) {
        *guest_port = vsock->asked[vsock->asked_first][0];
        *host_port = vsock->asked[vsock->asked_first][1];
        vsock->asked_first = (vsock->asked_first + 1) % VP_ASKED;
        __atomic_store_n(&vsock->asked_count, vsock->asked_count - 1, __ATOMIC_RELEASE);
    }
    pthread_mutex_unlock(&pump->lock);
    if (was_full)
        vp_wake(pump->control);
    return found;
}

uint32_t vp_vsock_count(struct vp_pump *pump)
{
    return __atomic_load_n(&pump->vsock->count, __ATOMIC_RELAXED);
}

/* --- set-up --- */

void vp_vsock_forget(struct vp_pump *pump)
{
    struct vp_vsock *vsock = pump->vsock;
    for (uint32_t i = 0; i < VP_CONNECTIONS; i++)
        if (vsock->connections[i].state != FREE)
            release(vsock, &vsock->connections[i]);
    memset(vsock->buckets, 0xFF, sizeof vsock->buckets);
    while (vsock->ready_count != 0)
        vp_connection_next(vsock);
    vsock->reset_count = 0;
    pthread_mutex_lock(&pump->lock);
    for (uint32_t i = 0; i < vsock->order_count; i++)
        if (vsock->orders[i].fd >= 0)
            close(vsock->orders[i].fd);
    vsock->order_count = vsock->asked_count = 0;
    pthread_mutex_unlock(&pump->lock);
}

int vp_vsock_new(struct vp_pump *pump, uint64_t cid)
{
    struct vp_vsock *vsock = pump->vsock = calloc(1, sizeof *vsock);
    if (vsock == NULL)
        return ENOMEM;
    pump->header_size = VP_VSOCK_HEADER;
    vsock->cid = cid;
    vsock->free = NONE;
    memset(vsock->buckets, 0xFF, sizeof vsock->buckets);
    for (uint16_t i = VP_CONNECTIONS; i-- > 0;) {
        vsock->connections[i].fd = -1;
        vsock->connections[i].next = vsock->free;
        vsock->free = i;
    }
    vsock->epoll = epoll_create1(EPOLL_CLOEXEC);
    return vsock->epoll < 0 || listen_to(vsock, pump->control, CONTROL) != 0 ? errno : 0;
}

void vp_vsock_free(struct vp_pump *pump)
{
    if (pump->vsock == NULL)
        return;
    vp_vsock_forget(pump);
    if (pump->vsock->epoll >= 0)
        close(pump->vsock->epoll);
    free(pump->vsock);
}
