/* What rings of both formats share: chains in flight, batches, order, notifications. */

#include "virtio_queue.h"

#include <stdlib.h>
#include <string.h>

struct vq_ring *vq_new(uint32_t size, uint64_t desc, uint64_t driver, uint64_t device, int packed,
                       int event_idx, int indirect, int in_order)
{
    struct vq_ring *ring = calloc(1, sizeof *ring);
    if (ring == NULL)
        return NULL;
    ring->size = size;
    /* A packed buffer ID is any 16-bit number; pages of heads that are never used cost nothing. */
    ring->heads = packed ? 1u << 16 : size;
    ring->packed = packed;
    ring->event_idx = event_idx;
    ring->indirect = indirect;
    ring->in_order = in_order;
    ring->next_avail = ring->next_used = packed ? VQ_WRAP : 0;
    ring->desc.address = desc;
    ring->driver.address = driver;
    ring->device.address = device;
    ring->flights = calloc(ring->heads, sizeof *ring->flights);
    ring->order = calloc(size, sizeof *ring->order);
    if (ring->flights == NULL || ring->order == NULL) {
        vq_free(ring);
        return NULL;
    }
    return ring;
}

void vq_free(struct vq_ring *ring)
{
    if (ring->table != NULL)
        ring->table->release(ring->table);
    free(ring->flights);
    free(ring->order);
    free(ring);
}

int vq_bind(struct vq_ring *ring, uint64_t table)
{
    struct vmm_table *map = (struct vmm_table *)(uintptr_t)table;
    struct vq_ring former = *ring;
    uint64_t event = ring->event_idx ? 2 : 0, size = ring->size;
    if (map->version != VMM_TABLE_VERSION || map->count == 0)
        return 1;
    ring->table = map;
    ring->recent = 0;
    if (!vq_bind_area(ring, &ring->desc, 16 * size) ||
        !vq_bind_area(ring, &ring->driver, ring->packed ? 4 : 4 + 2 * size + event) ||
        !vq_bind_area(ring, &ring->device, ring->packed ? 4 : 4 + 8 * size + event)) {
        *ring = former;
        return 2;
    }
    ring->tracked = 0;
    for (uint32_t i = 0; i < map->count; i++)
        ring->tracked |= map->regions[i].bitmap != NULL;
    map->retain(map);
    if (former.table != NULL)
        former.table->release(former.table);
    return 0;
}

struct vq_batch *vq_batch_new(uint32_t chains, uint32_t segments, uint32_t iovecs)
{
    struct vq_batch *batch = calloc(1, sizeof *batch);
    if (batch == NULL)
        return NULL;
    batch->chain_capacity = chains;
    batch->segment_capacity = segments;
    batch->iovec_capacity = iovecs;
    batch->chains = calloc(chains, sizeof *batch->chains);
    batch->segments = calloc(2 * (size_t)segments, sizeof *batch->segments);
    batch->iovecs = iovecs != 0 ? calloc(iovecs, sizeof *batch->iovecs) : NULL;
    batch->used = calloc(2 * (size_t)chains, sizeof *batch->used);
    batch->headers = malloc((size_t)chains * VQ_MAX_HEADER);
    if (batch->chains == NULL || batch->segments == NULL || batch->headers == NULL ||
        batch->used == NULL || (iovecs != 0 && batch->iovecs == NULL)) {
        vq_batch_free(batch);
        return NULL;
    }
    return batch;
}

void vq_batch_free(struct vq_batch *batch)
{
    free(batch->chains);
    free(batch->segments);
    free(batch->iovecs);
    free(batch->headers);
    free(batch->used);
    free(batch);
}

static void take(struct vq_ring *ring, const struct vq_chain *chain, struct vq_batch *batch)
{
    struct vq_flight *flight = &ring->flights[chain->head];
    flight->slots = chain->slots;
    flight->done = 0;
    flight->room = chain->writable_length;
    flight->sequence = ring->sequence++;
    flight->batch = batch;
    flight->chain = (uint32_t)(chain - (batch != NULL ? batch->chains : chain));
    ring->in_flight++;
    if (ring->in_order)
        ring->order[(ring->order_first + ring->order_count++) % ring->size] = chain->head;
}

int64_t vq_pop(struct vq_ring *ring, struct vq_batch *batch, uint32_t limit, int track)
{
    int64_t available = limit;
    batch->count = batch->segment_count = batch->iovec_count = 0;
    if (limit > batch->chain_capacity)
        limit = batch->chain_capacity;
    if (!ring->packed) {
        available = vq_split_available(ring);
        if (available < 0)
            return -1;
    }
    if (available > limit)
        available = limit;
    while (batch->count < available) {
        struct vq_chain *chain = &batch->chains[batch->count];
        struct vq_walk walk = {.ring = ring, .batch = batch, .chain = chain};
        uint32_t segments = batch->segment_count, iovecs = batch->iovec_count;
        memset(chain, 0, sizeof *chain);
        chain->first_segment = segments;
        chain->first_iovec = iovecs;
        int rc = ring->packed ? vq_packed_pop(ring, &walk) : vq_split_pop(ring, &walk);
        if (rc != 1) {
            batch->segment_count = segments;
            batch->iovec_count = iovecs;
            if (rc == -1 && batch->count == 0)
                return -1;
            break;
        }
        if (batch->header_size != 0)
            vq_copy_header(ring, batch, chain);
        take(ring, chain, track ? batch : NULL);
        batch->count++;
    }
    batch->outstanding = track ? batch->count : 0;
    return batch->count;
}

int64_t vq_pop_batch(struct vq_ring *ring, struct vq_batch *batch, int64_t limit, uint32_t header)
{
    if (batch->outstanding != 0)
        return -2;
    if (header > VQ_MAX_HEADER)
        return -3;
    batch->header_size = header;
    return vq_pop(ring, batch, limit < 0 || limit > ring->size ? ring->size : (uint32_t)limit, 1);
}

int vq_undo(struct vq_ring *ring, uint32_t head)
{
    struct vq_flight *flight;
    if (head >= ring->heads)
        return -1;
    flight = &ring->flights[head];
    if (flight->slots == 0 || flight->done || flight->sequence + 1 != ring->sequence)
        return -1;
    ring->next_avail = ring->packed
                           ? vq_packed_advance(ring, ring->next_avail, -(int64_t)flight->slots)
                           : (ring->next_avail - 1) & 0xFFFF;
    if (flight->batch != NULL)
        flight->batch->outstanding--;
    if (ring->in_order)
        ring->order_count--;
    flight->slots = 0;
    ring->sequence--;
    ring->in_flight--;
    return 0;
}

/* A batch's chains are written by whoever holds its iovecs: the dirty bits are set here. */
void vq_mark_written(struct vq_ring *ring, const struct vq_batch *batch,
                     const struct vq_chain *chain, uint64_t length)
{
    const uint64_t *segment =
        batch->segments + 2 * (size_t)(chain->first_segment + chain->readable_segments);
    for (; length != 0; segment += 2) {
        uint64_t at = segment[0], left = segment[1] < length ? segment[1] : length;
        length -= left;
        while (left != 0) {
            const struct vmm_table_region *region = vq_find(ring, at);
            if (region == NULL)
                return; /* another map is bound by now, without this memory */
            uint64_t offset = at - region->guest_address;
            uint64_t piece = region->size - offset < left ? region->size - offset : left;
            if (region->bitmap != NULL)
                ring->table->mark(region->bitmap, offset, piece);
            at += piece;
            left -= piece;
        }
    }
}

static void mark_batch(struct vq_ring *ring, const struct vq_flight *flight, uint64_t length)
{
    vq_mark_written(ring, flight->batch, &flight->batch->chains[flight->chain], length);
}

void vq_detach(struct vq_ring *ring, struct vq_batch *batch, uint32_t index)
{
    struct vq_flight *flight = &ring->flights[batch->chains[index].head];
    if (flight->slots == 0 || flight->batch != batch || flight->chain != index)
        return;
    if (flight->done)
        mark_batch(ring, flight, flight->length);
    flight->batch = NULL;
    batch->outstanding--;
}

static void publish(struct vq_ring *ring, uint32_t count, const uint32_t *heads,
                    const uint32_t *lengths)
{
    for (uint32_t i = 0; ring->tracked && i < count; i++)
        if (ring->flights[heads[i]].batch != NULL)
            mark_batch(ring, &ring->flights[heads[i]], lengths[i]);
    if (ring->packed)
        vq_packed_put(ring, count, heads, lengths);
    else
        vq_split_put(ring, count, heads, lengths);
    for (uint32_t i = 0; i < count; i++) {
        struct vq_flight *flight = &ring->flights[heads[i]];
        if (flight->batch != NULL)
            flight->batch->outstanding--;
        flight->slots = 0;
        flight->done = 0;
    }
    ring->in_flight -= count;
}

/* What of the completed chains has its turn (2.7.9), published one after the other. */
static int64_t publish_in_order(struct vq_ring *ring)
{
    uint32_t heads[64], lengths[64], count = 0;
    int64_t total = 0;
    while (ring->order_count != 0) {
        uint32_t head = ring->order[ring->order_first];
        if (!ring->flights[head].done)
            break;
        heads[count] = head;
        lengths[count++] = ring->flights[head].length;
        ring->order_first = (ring->order_first + 1) % ring->size;
        ring->order_count--;
        total++;
        if (count == 64) {
            publish(ring, count, heads, lengths);
            count = 0;
        }
    }
    if (count != 0)
        publish(ring, count, heads, lengths);
    return total;
}

int64_t vq_complete(struct vq_ring *ring, uint32_t count, const uint32_t *heads,
                    const uint32_t *lengths)
{
    int rule = 0;
    uint32_t i;
    for (i = 0; i < count; i++) {
        struct vq_flight *flight = heads[i] < ring->heads ? &ring->flights[heads[i]] : NULL;
        if (flight == NULL || flight->slots == 0 || flight->done)
            rule = VQ_NOT_IN_FLIGHT;
        else if (lengths[i] > flight->room)
            rule = VQ_LENGTH;
        if (rule != 0)
            break;
        /* Marked, so that the same head twice in one batch is found. */
        flight->done = 1;
        flight->length = lengths[i];
    }
    if (rule != 0) {
        uint32_t bad = i;
        while (i-- > 0)
            ring->flights[heads[i]].done = 0;
        return vq_fail(ring, rule, -1, bad);
    }
    if (ring->in_order)
        return publish_in_order(ring);
    if (count != 0)
        publish(ring, count, heads, lengths);
    return count;
}

int64_t vq_complete_batch(struct vq_ring *ring, struct vq_batch *batch, const uint32_t *lengths)
{
    uint32_t *heads = batch->used, *written = batch->used + batch->count;
    for (uint32_t i = 0; i < batch->count; i++) {
        uint64_t room = batch->chains[i].writable_length;
        heads[i] = batch->chains[i].head;
        written[i] = room > UINT32_MAX ? UINT32_MAX : (uint32_t)room;
    }
    return vq_complete(ring, batch->count, heads, lengths != NULL ? lengths : written);
}

int64_t vq_complete_one(struct vq_ring *ring, uint32_t head, uint32_t length)
{
    return vq_complete(ring, 1, &head, &length);
}

int vq_needs_notification(struct vq_ring *ring)
{
    uint64_t pending = ring->pending;
    if (pending == 0)
        return 0;
    ring->pending = 0;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    return ring->packed ? vq_packed_needs_notification(ring, pending)
                        : vq_split_needs_notification(ring, pending);
}

int vq_enable_notifications(struct vq_ring *ring)
{
    int64_t available;
    if (ring->packed)
        vq_packed_ask(ring, 1);
    else
        vq_split_ask(ring, 1);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    available = ring->packed ? vq_packed_available(ring) : vq_split_available(ring);
    return available < 0 ? -1 : available > 0;
}

void vq_disable_notifications(struct vq_ring *ring)
{
    if (ring->packed)
        vq_packed_ask(ring, 0);
    else
        vq_split_ask(ring, 0);
}

int vq_adopt(struct vq_ring *ring, uint32_t head, uint32_t slots, uint64_t room, int64_t done)
{
    struct vq_chain chain = {.head = head, .slots = slots, .writable_length = room};
    if (head >= ring->heads || ring->flights[head].slots != 0 || ring->in_flight == ring->size)
        return -1;
    take(ring, &chain, NULL);
    if (done >= 0) {
        ring->flights[head].done = 1;
        ring->flights[head].length = (uint32_t)done;
    }
    return 0;
}

uint32_t vq_set_bits(uint32_t *word, uint32_t bits)
{
    return __atomic_fetch_or(word, bits, __ATOMIC_SEQ_CST);
}

uint32_t vq_clear_bits(uint32_t *word, uint32_t bits)
{
    return __atomic_fetch_and(word, ~bits, __ATOMIC_SEQ_CST);
}
