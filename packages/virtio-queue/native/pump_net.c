/* Frames between two queues and a link, section 5.1.6: the first queue receives, the second sends.
 *
 * A frame's header is copied, checked against what was negotiated, and only the copy is used. */

#include "pump.h"

#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>

enum { HEADER = 12, ETHERNET_HEADER = 14, MOST = VP_FRAME - HEADER };
enum { NEEDS_CSUM = 1, GSO_TCPV4 = 1, GSO_UDP = 3, GSO_TCPV6 = 4, GSO_ECN = 0x80 };
enum { F_CSUM = 0, F_HOST_TSO4 = 11, F_HOST_TSO6, F_HOST_ECN, F_HOST_UFO, F_MRG_RXBUF };
/* How many frames are moved before the other queue has its turn. */
enum { BUDGET = 64 };

static int has(const struct vp_queue *queue, int feature)
{
    return queue->pump->net.features >> feature & 1;
}

/* The descriptor is broken; its queue rests until the next start. */
static void give_up(struct vp_queue *queue, int error)
{
    queue->pump->counters.dropped_link++;
    queue->pump->counters.last_errno = (uint64_t)error;
}

/* --- to the guest --- */

/* Buffers for so many bytes: 1; 0 when there are too few as yet; -1 when there never will be. Those
 * that were taken stay taken, so that the driver's next one notifies. */
static int collect(struct vp_queue *queue, uint64_t size)
{
    while (queue->room < size) {
        struct vp_request *request = vp_next_request(queue);
        if (request == NULL)
            return queue->held < queue->ring->size && (queue->asleep || vp_stopping(queue->pump))
                       ? 0 : -1;
        const struct vq_chain *chain = vp_chain(request);
        queue->collected[queue->collected_count++] = request;
        queue->held += chain->slots;
        queue->room += chain->writable_length;
        if (vp_chain(queue->collected[0])->writable_length < HEADER || chain->writable_length == 0 ||
            (queue->room < size && !has(queue, F_MRG_RXBUF)))
            return -1;
    }
    return 1;
}

/* Use what was collected, all of it at once (5.1.6.4.1), with `size` bytes of the frame in it. */
static void deliver(struct vp_queue *queue, uint64_t size)
{
    struct vp_net *net = &queue->pump->net;
    uint16_t count = (uint16_t)queue->collected_count;
    memcpy(net->frame + HEADER - sizeof count, &count, sizeof count);
    uint64_t at = 0;
    for (uint32_t i = 0; i < queue->collected_count; i++) {
        uint64_t part = vp_fill(queue->collected[i], net->frame + at, size - at);
        vp_done(queue->collected[i], part);
        at += part;
    }
    queue->collected_count = queue->held = 0;
    queue->room = 0;
    net->length = 0;
    vp_publish_much(queue);
}

/* Have a frame that the driver wants: 1; 0 when there is none. */
static int get_frame(struct vp_queue *queue)
{
    struct vp_pump *pump = queue->pump;
    struct vp_net *net = &pump->net;
    int64_t length = vp_link_receive(net, &pump->counters);
    if (length == 0) {
        queue->fd_events = POLLIN;
        return 0;
    }
    if (length < 0) {
        queue->broken = 1;
        give_up(queue, (int)-length);
        return 0;
    }
    pthread_mutex_lock(&pump->lock);
    int wanted = vp_link_wants(&net->filter, net->frame + HEADER, (uint64_t)length - HEADER);
    pthread_mutex_unlock(&pump->lock);
    if (wanted)
        net->length = (uint32_t)length;
    else
        pump->counters.dropped_filtered++;
    net->admitted = 0;
    return 1;
}

int vp_net_receive(struct vp_queue *queue)
{
    struct vp_pump *pump = queue->pump;
    struct vp_net *net = &pump->net;
    if (queue->asleep || queue->fd_events || queue->broken)
        return 0;
    for (int i = 0; i < BUDGET && !vp_stopping(pump); i++) {
        if (net->length == 0 && !get_frame(queue))
            return 0;
        uint64_t size = net->length;
        if (size == 0)
            continue; /* it was not wanted */
        int enough = collect(queue, size);
        if (enough == 0)
            return 0;
        if (enough > 0 && !vp_admit(pump, &net->limiters[0], size - HEADER)) {
            pump->counters.throttled += !net->admitted;
            net->admitted = 1;
            return 0;
        }
        deliver(queue, enough > 0 ? size : 0);
        if (enough > 0) {
            pump->counters.received_frames++;
            pump->counters.received_bytes += size - HEADER;
        } else {
            pump->counters.dropped_no_room++;
        }
    }
    return 1;
}

/* --- from the guest --- */

/* What a frame is counted by that can't be sent, or NULL. */
static uint64_t *fault_of(struct vp_queue *queue, const uint8_t *header, uint64_t readable)
{
    struct vp_counters *counters = &queue->pump->counters;
    struct { uint8_t flags, gso; uint16_t length, gso_size, csum_start, csum_offset; } wish;
    if (readable < HEADER)
        return &counters->dropped_no_header;
    uint64_t size = readable - HEADER;
    memcpy(&wish, header, sizeof wish);
    if (size < ETHERNET_HEADER)
        return &counters->dropped_short;
    if (size > MOST)
        return &counters->dropped_long;
    if (wish.flags & NEEDS_CSUM) {
        if (!has(queue, F_CSUM))
            return &counters->dropped_offload;
        if ((uint64_t)wish.csum_start + wish.csum_offset + 2 > size)
            return &counters->dropped_header;
    }
    int kind = wish.gso & ~GSO_ECN;
    if (kind != 0) {
        int feature = kind == GSO_TCPV4 ? F_HOST_TSO4 : kind == GSO_TCPV6 ? F_HOST_TSO6
                      : kind == GSO_UDP ? F_HOST_UFO : -1;
        if (feature < 0 || wish.gso_size == 0 || !(wish.flags & NEEDS_CSUM))
            return &counters->dropped_header;
        if (!has(queue, feature))
            return &counters->dropped_offload;
    }
    if (wish.gso & GSO_ECN && (kind == 0 || !has(queue, F_HOST_ECN)))
        return &counters->dropped_offload;
    return NULL;
}

/* The copied header, then the guest's bytes behind its own; returns the number of pieces. */
static int gather(struct vp_request *request, uint8_t *header, struct iovec *pieces)
{
    struct vp_net *net = &request->queue->pump->net;
    const struct vq_chain *chain = vp_chain(request);
    const struct vq_iovec *iovec = request->batch->chains->iovecs + chain->first_iovec;
    uint64_t skip = HEADER;
    uint8_t *bounce = net->bounce;
    int count = 1, few = chain->readable_iovecs < IOV_MAX;
    pieces[0] = (struct iovec){header, HEADER};
    for (uint32_t i = 0; i < chain->readable_iovecs; i++, iovec++) {
        uint64_t cut = iovec->length < skip ? iovec->length : skip;
        uint8_t *at = (uint8_t *)(uintptr_t)iovec->host + cut;
        skip -= cut;
        if (iovec->length == cut)
            continue;
        if (few) {
            pieces[count++] = (struct iovec){at, iovec->length - cut};
        } else {
            memcpy(bounce, at, iovec->length - cut);
            bounce += iovec->length - cut;
        }
    }
    if (!few)
        pieces[count++] = (struct iovec){net->bounce, (size_t)(bounce - net->bounce)};
    return count;
}

int vp_net_send(struct vp_queue *queue)
{
    struct vp_pump *pump = queue->pump;
    struct vp_net *net = &pump->net;
    struct vp_request *request;
    struct iovec pieces[IOV_MAX];
    if (queue->fd_events)
        return 0;
    if (vp_link_flush(net) != 0) {
        queue->fd_events = POLLOUT;
        return 0;
    }
    for (int i = 0; i < BUDGET; i++) {
        request = vp_next_request(queue);
        if (request == NULL)
            break;
        uint64_t readable = vp_chain(request)->readable_length;
        uint8_t *header = request->batch->chains->headers + VP_HEADER * (size_t)request->chain;
        uint64_t *fault = fault_of(queue, header, readable);
        if (fault == NULL) {
            uint64_t size = readable - HEADER;
            if (request->prepared != 2 && !vp_admit(pump, &net->limiters[1], size)) {
                pump->counters.throttled += request->prepared == 0;
                request->prepared = 1;
                queue->next--;
                break;
            }
            request->prepared = 2; /* its tokens are taken */
            int sent = vp_link_send(net, pieces, gather(request, header, pieces), size,
                                    &pump->counters);
            if (sent == -EAGAIN) {
                queue->fd_events = POLLOUT;
                queue->next--;
                return 0;
            }
            if (sent < 0) {
                give_up(queue, -sent);
            } else {
                pump->counters.sent_frames++;
                pump->counters.sent_bytes += request->cost = size;
            }
        } else {
            ++*fault;
        }
        vp_finish(request, 0);
    }
    if (net->unsent_start != net->unsent_end)
        queue->fd_events = POLLOUT;
    return request != NULL && request->prepared != 1;
}

/* --- set-up --- */

int vp_net_open(struct vp_pump *pump, int fd, int link, uint64_t features)
{
    struct vp_net *net = &pump->net;
    net->fd = fd;
    net->link = link;
    net->features = features;
    if (net->frame == NULL)
        net->frame = malloc(2 * VP_FRAME);
    if (net->frame == NULL)
        return -1;
    net->bounce = net->frame + VP_FRAME;
    if (link == VP_STREAM && net->received == NULL) {
        net->received = malloc(VP_RECEIVED + VP_FRAME);
        if (net->received == NULL)
            return -1;
        net->unsent = net->received + VP_RECEIVED;
    }
    for (uint32_t i = 0; i < pump->queue_count; i++) {
        struct vp_queue *queue = &pump->queues[i];
        queue->serve = i == 0 ? vp_net_receive : vp_net_send;
        queue->fd = fd;
        queue->collected = calloc(queue->ring->size, sizeof *queue->collected);
        if (queue->collected == NULL)
            return -1;
    }
    return 0;
}

void vp_net_set_filter(struct vp_pump *pump, const struct vp_filter *filter)
{
    pthread_mutex_lock(&pump->lock);
    pump->net.filter = *filter;
    pthread_mutex_unlock(&pump->lock);
}
