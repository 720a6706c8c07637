/* Queues of a pump: chains into batches and back, publication and notification. */

#include "pump.h"

#include <stdlib.h>
#include <string.h>

/* So much is worth a publication of its own: the driver goes on while the rest is done. */
enum { PUBLISH_CHAINS = 8, PUBLISH_BYTES = 64 << 10 };

int vp_add_queue(struct vp_pump *pump, struct vq_ring *ring, int kick, int interrupt)
{
    struct vp_queue *queue = &pump->queues[pump->queue_count];
    if (pump->queue_count == VP_QUEUES)
        return -1;
    size_t room = VP_BATCHES + (size_t)ring->in_flight;
    memset(queue, 0, sizeof *queue);
    queue->batches = calloc(2 * room, sizeof *queue->batches);
    if (queue->batches == NULL)
        return -2;
    queue->free = queue->batches + room;
    size_t most = (size_t)ring->size + VP_CHAINS;
    queue->heads = calloc(2 * most, sizeof *queue->heads);
    if (queue->heads == NULL) {
        free(queue->batches);
        return -2;
    }
    queue->lengths = queue->heads + most;
    queue->serve = vp_block_serve;
    queue->pump = pump;
    queue->ring = ring;
    queue->kick = kick;
    queue->interrupt = interrupt;
    queue->asked = 1;
    pump->queue_count++;
    return 0;
}

/* --- batches --- */

/* A batch without chains; NULL without memory of the host's. */
static struct vp_batch *get_batch(struct vp_queue *queue)
{
    uint32_t size = queue->ring->size;
    uint32_t segments = size + (size > VQ_MAX_INDIRECT ? size : VQ_MAX_INDIRECT) + 4 * VP_CHAINS;
    if (queue->free_count != 0) {
        queue->free[--queue->free_count]->busy = 1;
        return queue->free[queue->free_count];
    }
    struct vp_batch *batch = calloc(1, sizeof *batch);
    if (batch == NULL)
        return NULL;
    batch->chains = vq_batch_new(VP_CHAINS, segments, 2 * segments);
    if (batch->chains == NULL) {
        free(batch);
        return NULL;
    }
    batch->chains->header_size = queue->pump->header_size;
    batch->busy = 1;
    queue->batches[queue->batch_count++] = batch;
    return batch;
}

static void set_request(struct vp_queue *queue, struct vp_batch *batch, uint32_t chain)
{
    struct vp_request *request = &batch->requests[chain];
    free(request->segments);
    memset(request, 0, sizeof *request);
    request->queue = queue;
    request->batch = batch;
    request->chain = chain;
}

int vp_adopt(struct vp_pump *pump, uint32_t number, uint32_t head, uint32_t readable,
             uint32_t writable, const uint64_t *elements)
{
    struct vp_queue *queue = &pump->queues[number];
    struct vq_flight *flight = &queue->ring->flights[head];
    struct vp_batch *batch = queue->adopted ? queue->batches[queue->adopted - 1] : NULL;
    uint32_t count = readable + writable;
    if (batch == NULL || batch->chains->count == VP_CHAINS ||
        batch->chains->segment_count + count > batch->chains->segment_capacity) {
        batch = get_batch(queue);
        if (batch == NULL)
            return -2;
        queue->adopted++;
    }
    struct vq_batch *chains = batch->chains;
    struct vq_chain *chain = &chains->chains[chains->count];
    struct vq_walk walk = {.ring = queue->ring, .batch = chains, .chain = chain};
    memset(chain, 0, sizeof *chain);
    chain->head = head;
    chain->slots = flight->slots;
    chain->first_segment = chains->segment_count;
    chain->first_iovec = chains->iovec_count;
    for (uint32_t i = 0; i < count; i++)
        if (vq_add_element(&walk, i, elements[2 * i], (uint32_t)elements[2 * i + 1], i >= readable))
            return -1;
    vq_copy_header(queue->ring, chains, chain);
    if (flight->batch != NULL)
        flight->batch->outstanding--;
    flight->batch = chains;
    flight->chain = chains->count;
    set_request(queue, batch, chains->count);
    chains->count++;
    chains->outstanding++;
    return 0;
}

/* Batches whose chains have all been used are free again. */
static void reclaim(struct vp_queue *queue)
{
    for (uint32_t i = 0; i < queue->batch_count; i++) {
        struct vp_batch *batch = queue->batches[i];
        if (batch->busy && batch->chains->outstanding == 0 && i >= queue->adopted) {
            batch->busy = 0;
            queue->free[queue->free_count++] = batch;
        }
    }
}

int vp_available(const struct vp_queue *queue)
{
    struct vq_ring *ring = queue->ring;
    return (ring->packed ? vq_packed_available(ring) : vq_split_available(ring)) > 0;
}

/* Look for chains for a while, where that paid the last time. */
static int appear(struct vp_queue *queue)
{
    struct vp_pump *pump = queue->pump;
    if (pump->vsock != NULL) /* which looks for more than chains */
        return 0;
    queue->idle = vp_now();
    if (pump->spin == 0 || pump->uring.in_kernel != 0)
        return 0;
    do {
        for (int i = 0; i < 16; i++) {
            if (vp_available(queue))
                return 1;
            vp_pause();
        }
    } while (vp_now() - queue->idle < pump->spin && !vp_stopping(pump));
    return 0;
}

int vp_get_chains(struct vp_queue *queue)
{
    struct vp_pump *pump = queue->pump;
    queue->next = 0;
    if (queue->adopted_next < queue->adopted) {
        queue->current = queue->batches[queue->adopted_next++];
        return 1;
    }
    queue->current = NULL;
    vp_publish(queue);
    if (queue->free_count == 0)
        reclaim(queue);
    if (queue->free_count == 0 && queue->batch_count - queue->adopted == VP_BATCHES)
        return -1; /* until requests complete */
    struct vp_batch *batch = get_batch(queue);
    if (batch == NULL)
        return -1;
    int64_t count = vq_pop(queue->ring, batch->chains, VP_CHAINS, 1);
    if (count > 0) {
        if (queue->asked)
            vq_disable_notifications(queue->ring);
        queue->asked = 0;
        for (uint32_t i = 0; i < count; i++)
            set_request(queue, batch, i);
        queue->current = batch;
        pump->counters.chains += (uint64_t)count;
        return 1;
    }
    batch->busy = 0;
    queue->free[queue->free_count++] = batch;
    if (count == 0 && appear(queue))
        return 0;
    if (count == 0) {
        queue->asked = 1;
        count = vq_enable_notifications(queue->ring);
    }
    if (count > 0)
        return 0;
    queue->asleep = 1;
    if (count < 0) {
        __atomic_store_n(&queue->faulted, 1, __ATOMIC_RELEASE);
        vp_wake(pump->attention);
    }
    return -1;
}

struct vp_request *vp_next_request(struct vp_queue *queue)
{
    while (!vp_at_hand(queue))
        if (queue->asleep || vp_stopping(queue->pump) || vp_get_chains(queue) < 0)
            return NULL;
    return &queue->current->requests[queue->next++];
}

int vp_admit(struct vp_pump *pump, struct vp_limiter **where, uint64_t bytes)
{
    struct vp_limiter *limiter = __atomic_load_n(where, __ATOMIC_ACQUIRE);
    if (limiter == NULL)
        return 1;
    uint64_t now = vp_now(), wait = vp_limiter_take(limiter, bytes, now);
    if (wait != 0 && (pump->wake == 0 || now + wait < pump->wake))
        pump->wake = now + wait;
    return wait == 0;
}

/* Chains that were taken last and not started are available again. */
void vp_give_back(struct vp_queue *queue)
{
    const struct vq_batch *chains = queue->current != NULL ? queue->current->chains : NULL;
    if (chains == NULL || queue->adopted_next < queue->adopted)
        return;
    for (uint32_t i = chains->count; i-- > queue->next;)
        if (vq_undo(queue->ring, chains->chains[i].head))
            break;
}

void vp_done(struct vp_request *request, uint64_t length)
{
    struct vp_queue *queue = request->queue;
    queue->heads[queue->done] = request->batch->chains->chains[request->chain].head;
    queue->lengths[queue->done++] = length > UINT32_MAX ? UINT32_MAX : (uint32_t)length;
    queue->done_bytes += request->cost;
}

void vp_publish_much(struct vp_queue *queue)
{
    if (queue->done >= PUBLISH_CHAINS || queue->done_bytes >= PUBLISH_BYTES)
        vp_publish(queue);
}

void vp_finish(struct vp_request *request, uint64_t length)
{
    vp_done(request, length);
    vp_publish_much(request->queue);
}

void vp_publish(struct vp_queue *queue)
{
    struct vp_pump *pump = queue->pump;
    if (queue->done == 0)
        return;
    int64_t count = vq_complete(queue->ring, queue->done, queue->heads, queue->lengths);
    queue->done = 0;
    queue->done_bytes = 0;
    if (count <= 0)
        return; /* in order: not their turn yet */
    pump->counters.publications++;
    if (!vq_needs_notification(queue->ring)) {
        pump->counters.notifications_suppressed++;
        return;
    }
    pump->counters.notifications++;
    if (pump->status != NULL)
        __atomic_fetch_or(pump->status, 1, __ATOMIC_SEQ_CST);
    int fd = __atomic_load_n(&queue->interrupt, __ATOMIC_RELAXED);
    if (fd >= 0)
        vp_wake(fd);
}

/* --- what is in a chain --- */

uint64_t vp_fill(struct vp_request *request, const uint8_t *from, uint64_t length)
{
    const struct vq_chain *chain = vp_chain(request);
    const struct vq_iovec *iovec =
        request->batch->chains->iovecs + chain->first_iovec + chain->readable_iovecs;
    uint64_t done = 0;
    for (uint32_t i = 0; i < chain->writable_iovecs && done < length; i++, iovec++) {
        uint64_t part = iovec->length < length - done ? iovec->length : length - done;
        memcpy((void *)(uintptr_t)iovec->host, from + done, part);
        done += part;
    }
    return done;
}

int vp_pieces(const struct vp_request *request, int writable, uint64_t offset, uint64_t most,
              struct iovec *pieces, int room, uint64_t *length)
{
    const struct vq_chain *chain = vp_chain(request);
    const struct vq_iovec *iovec = request->batch->chains->iovecs + chain->first_iovec;
    uint32_t left = writable ? chain->writable_iovecs : chain->readable_iovecs;
    int count = 0;
    if (writable)
        iovec += chain->readable_iovecs;
    *length = 0;
    for (; left != 0 && count < room && *length < most; left--, iovec++) {
        uint64_t cut = iovec->length < offset ? iovec->length : offset;
        uint64_t part = iovec->length - cut;
        offset -= cut;
        if (part == 0)
            continue;
        if (part > most - *length)
            part = most - *length;
        pieces[count++] = (struct iovec){(uint8_t *)(uintptr_t)iovec->host + cut, part};
        *length += part;
    }
    return count;
}

void vp_give_back_collected(struct vp_queue *queue)
{
    while (queue->collected_count != 0)
        if (vq_undo(queue->ring, vp_chain(queue->collected[--queue->collected_count])->head))
            break;
}

/* --- after the stop --- */

struct vq_batch *vp_batch(struct vp_pump *pump, uint32_t number, uint32_t index)
{
    struct vp_queue *queue = &pump->queues[number];
    return index < queue->batch_count ? queue->batches[index]->chains : NULL;
}

static void free_batch(struct vp_queue *queue, struct vp_batch *batch)
{
    struct vq_batch *chains = batch->chains;
    for (uint32_t i = 0; i < VP_CHAINS; i++)
        free(batch->requests[i].segments);
    if (chains->outstanding != 0)
        for (uint32_t i = 0; i < chains->count; i++)
            vq_detach(queue->ring, chains, i);
    vq_batch_free(chains);
    free(batch);
}

void vp_leave(struct vp_pump *pump)
{
    for (uint32_t i = 0; i < pump->queue_count; i++) {
        struct vp_queue *queue = &pump->queues[i];
        for (uint32_t j = 0; j < queue->batch_count; j++)
            free_batch(queue, queue->batches[j]);
        free(queue->batches);
        free(queue->heads);
        free(queue->collected);
    }
    if (pump->vsock != NULL)
        vp_vsock_leave(pump);
    pump->queue_count = 0;
}
