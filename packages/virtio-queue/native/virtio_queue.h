/* The device's side of virtqueues (virtio 1.3, sections 2.7 and 2.8), for loops that are hot.
 *
 * What is checked, in which order, and what it is called is defined by the plain-Python model in
 * `virtio_queue.testing.model`; tests compare the two. No function here is thread-safe: the caller
 * holds one lock around a ring. Guest memory is read once per field, into locals. */
#ifndef VIRTIO_QUEUE_H
#define VIRTIO_QUEUE_H

#include <stddef.h>
#include <stdint.h>

#include "vmm_table.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__ || __SIZEOF_POINTER__ != 8
#error "virtio-queue supports 64-bit little-endian hosts"
#endif

/* Rules that a driver can break; `virtio_queue._rules` has the words. */
enum vq_rule {
    VQ_OK,
    VQ_AVAIL_IDX,        /* avail.idx went back or is too far ahead */
    VQ_IN_FLIGHT,        /* head or buffer ID is in flight */
    VQ_INDEX,            /* descriptor index outside the table */
    VQ_LOOP,             /* chain longer than its table */
    VQ_NOT_NEGOTIATED,   /* INDIRECT without its feature */
    VQ_INDIRECT_NEXT,    /* INDIRECT and NEXT together */
    VQ_TABLE_LENGTH,     /* indirect table length not a multiple of 16, or 0 */
    VQ_TABLE_LIMIT,      /* indirect table too long */
    VQ_TABLE_PLACE,      /* indirect table outside guest memory */
    VQ_TABLE_NEXT,       /* next outside the indirect table */
    VQ_TABLE_LOOP,       /* chain in an indirect table loops */
    VQ_NESTED,           /* INDIRECT inside an indirect table */
    VQ_ORDER,            /* readable after writable */
    VQ_TOTAL,            /* more than 2**32 bytes */
    VQ_WRAPS,            /* address + length passes 2**64 */
    VQ_PLACE,            /* buffer outside guest memory */
    VQ_LIST_LENGTH,      /* packed: list longer than the queue */
    VQ_LIST_PARTIAL,     /* packed: first descriptor available before the rest */
    VQ_RING_FULL,        /* packed: more descriptors in flight than places */
    VQ_FRAGMENTED,       /* more iovecs than a batch holds */
};

/* Faults of the caller. */
enum vq_usage {
    VQ_NOT_IN_FLIGHT = 100,
    VQ_LENGTH = 101,
};

struct vq_fault {
    int32_t rule;
    int64_t descriptor; /* -1: the ring itself */
    uint64_t value;
};

struct vq_iovec {
    uint64_t host; /* layout of struct iovec */
    uint64_t length;
};

struct vq_chain {
    uint32_t head;
    uint32_t slots;             /* ring descriptors it occupies */
    uint32_t first_segment;     /* index into `segments` */
    uint32_t readable_segments;
    uint32_t writable_segments;
    uint32_t first_iovec;       /* index into `iovecs` */
    uint32_t readable_iovecs;
    uint32_t writable_iovecs;
    uint64_t readable_length;   /* bytes */
    uint64_t writable_length;
};

/* Chains as flat arrays. `segments` holds pairs of guest address and length as the driver made
 * them; `iovecs` the same memory in this process, cut where regions end, without empty pieces. */
struct vq_batch {
    uint32_t chain_capacity;
    uint32_t segment_capacity;
    uint32_t iovec_capacity;    /* 0: iovecs are not wanted */
    uint32_t header_size;       /* bytes of each chain to copy; at most VQ_MAX_HEADER */
    uint32_t count;             /* chains filled */
    uint32_t segment_count;
    uint32_t iovec_count;
    uint32_t outstanding;       /* chains not yet used */
    struct vq_chain *chains;
    uint64_t *segments;
    struct vq_iovec *iovecs;
    uint32_t *used;             /* heads and lengths while the batch is completed */
    uint8_t *headers;           /* the first `header_size` readable bytes of each chain */
};

struct vq_area {
    uint64_t address;
    uint8_t *host; /* NULL: spans regions, each access is looked up */
    uint64_t offset; /* within the region, for dirty marks */
    struct vmm_bitmap *bitmap;
};

struct vq_flight {
    uint32_t slots;      /* 0: not in flight */
    uint32_t done;       /* completed, waits for its turn (IN_ORDER) */
    uint32_t length;     /* of that completion */
    uint32_t chain;      /* index in `batch` */
    uint64_t room;       /* device-writable bytes */
    uint64_t sequence;   /* in which order chains were taken */
    struct vq_batch *batch; /* NULL: taken one by one */
};

struct vq_ring {
    uint32_t size;
    uint32_t heads;      /* how many different heads there can be */
    int packed, event_idx, indirect, in_order;
    uint32_t next_avail; /* packed: bit 15 is the wrap counter */
    uint32_t next_used;
    uint64_t pending;    /* used since the last notification decision */
    uint64_t sequence;
    uint32_t in_flight;
    struct vq_area desc, driver, device;
    struct vmm_table *table;
    uint32_t recent;     /* region that the last lookup hit */
    int tracked;         /* some region has a bitmap of dirty pages */
    struct vq_fault fault;
    struct vq_flight *flights;
    uint32_t *order;     /* IN_ORDER: heads as taken, a ring of `size` */
    uint32_t order_first, order_count;
};

struct vq_ring *vq_new(uint32_t size, uint64_t desc, uint64_t driver, uint64_t device, int packed,
                       int event_idx, int indirect, int in_order);
void vq_free(struct vq_ring *ring);
/* Use another map from now on. 0, or 1 for an unknown layout, 2 when a ring is not all memory; the
 * former map stays in use then. */
int vq_bind(struct vq_ring *ring, uint64_t table);

struct vq_batch *vq_batch_new(uint32_t chains, uint32_t segments, uint32_t iovecs);
void vq_batch_free(struct vq_batch *batch);

/* Take up to `limit` chains into an empty batch. Returns their number; -1 with `fault` set when
 * the first one is malformed (a later one ends the batch and is met again by the next call). With
 * `track` the chains belong to the batch, else to the caller one by one. */
int64_t vq_pop(struct vq_ring *ring, struct vq_batch *batch, uint32_t limit, int track);
/* The same for a batch of the caller's: at most the queue's size for a negative limit, with a copy of
 * each chain's first `header` bytes. Also -2 when chains of the batch are not used yet, and -3 when
 * `header` is too much. */
int64_t vq_pop_batch(struct vq_ring *ring, struct vq_batch *batch, int64_t limit, uint32_t header);
/* Give back the chain that was taken last. 0, or -1 when it is not that one. */
int vq_undo(struct vq_ring *ring, uint32_t head);
/* Use `count` chains with one publication. Returns how many became visible; -1 with `fault` set to
 * an enum vq_usage and the index of the entry at fault, and nothing used. */
int64_t vq_complete(struct vq_ring *ring, uint32_t count, const uint32_t *heads,
                    const uint32_t *lengths);
/* Use all chains of a batch; `lengths` NULL: each was written in full. */
int64_t vq_complete_batch(struct vq_ring *ring, struct vq_batch *batch, const uint32_t *lengths);
int64_t vq_complete_one(struct vq_ring *ring, uint32_t head, uint32_t length);
int vq_needs_notification(struct vq_ring *ring);
/* 1 when buffers are available already, 0, or -1 with `fault` set. */
int vq_enable_notifications(struct vq_ring *ring);
void vq_disable_notifications(struct vq_ring *ring);
/* Take over a chain in flight of a restored queue; `done` < 0: not completed. */
int vq_adopt(struct vq_ring *ring, uint32_t head, uint32_t slots, uint64_t room, int64_t done);

/* Bits that threads share, such as an interrupt status; return what was there before. */
uint32_t vq_set_bits(uint32_t *word, uint32_t bits);
uint32_t vq_clear_bits(uint32_t *word, uint32_t bits);

/* --- internal: ring.c --- */
/* Mark the first `length` writable bytes of a batch's chain dirty. */
void vq_mark_written(struct vq_ring *ring, const struct vq_batch *batch,
                     const struct vq_chain *chain, uint64_t length);
/* Make a batch's chain, if it is in flight, one that was taken without a batch. */
void vq_detach(struct vq_ring *ring, struct vq_batch *batch, uint32_t index);

/* --- internal: memory.c --- */
struct vq_element {
    uint64_t address;
    uint32_t length;
    uint16_t a; /* split: flags, packed: id */
    uint16_t b; /* split: next, packed: flags */
};

struct vq_walk {
    struct vq_ring *ring;
    struct vq_batch *batch;
    struct vq_chain *chain;
    uint64_t total;
    int writes;
};

int vq_fail(struct vq_ring *ring, int rule, int64_t descriptor, uint64_t value);
const struct vmm_table_region *vq_search(struct vq_ring *ring, uint64_t address);
int vq_check_range(struct vq_ring *ring, uint64_t address, uint64_t length);
int vq_read_crossing(struct vq_ring *ring, uint64_t address, uint64_t words[2]);
uint8_t *vq_at_slow(struct vq_ring *ring, const struct vq_area *area, uint64_t offset);
void vq_mark_slow(struct vq_ring *ring, const struct vq_area *area, uint64_t offset,
                  uint64_t length);
int vq_bind_area(struct vq_ring *ring, struct vq_area *area, uint64_t length);

/* --- internal: chain.c --- */
int vq_add_element(struct vq_walk *walk, uint32_t index, uint64_t address, uint32_t length,
                   int writes);
void vq_copy_header(struct vq_ring *ring, struct vq_batch *batch, const struct vq_chain *chain);
int64_t vq_table_entries(struct vq_walk *walk, uint32_t index, uint64_t address, uint32_t length);

/* --- internal: split.c, packed.c. Pop: 1 taken, 0 none, -1 fault, -2 the batch is full. --- */
int vq_split_pop(struct vq_ring *ring, struct vq_walk *walk);
void vq_split_put(struct vq_ring *ring, uint32_t count, const uint32_t *heads,
                  const uint32_t *lengths);
int64_t vq_split_available(struct vq_ring *ring);
int vq_split_needs_notification(struct vq_ring *ring, uint64_t pending);
void vq_split_ask(struct vq_ring *ring, int wanted);
int vq_packed_pop(struct vq_ring *ring, struct vq_walk *walk);
void vq_packed_put(struct vq_ring *ring, uint32_t count, const uint32_t *heads,
                   const uint32_t *lengths);
int64_t vq_packed_available(struct vq_ring *ring);
int vq_packed_needs_notification(struct vq_ring *ring, uint64_t pending);
void vq_packed_ask(struct vq_ring *ring, int wanted);
uint32_t vq_packed_advance(const struct vq_ring *ring, uint32_t position, int64_t count);

#define VQ_NEXT 1
#define VQ_WRITE 2
#define VQ_INDIRECT 4
#define VQ_MAX_INDIRECT 1024
#define VQ_WRAP 0x8000u
#define VQ_MAX_HEADER 64

static inline uint16_t vq_load16(const uint8_t *at, int order)
{
    return __atomic_load_n((const uint16_t *)at, order);
}

static inline void vq_store16(uint8_t *at, uint16_t value, int order)
{
    __atomic_store_n((uint16_t *)at, value, order);
}

static inline uint32_t vq_load32(const uint8_t *at, int order)
{
    return __atomic_load_n((const uint32_t *)at, order);
}

static inline void vq_store32(uint8_t *at, uint32_t value, int order)
{
    __atomic_store_n((uint32_t *)at, value, order);
}

/* An aligned field of a ring. */
static inline uint8_t *vq_at(struct vq_ring *ring, const struct vq_area *area, uint64_t offset)
{
    return area->host != NULL ? area->host + offset : vq_at_slow(ring, area, offset);
}

static inline void vq_mark(struct vq_ring *ring, const struct vq_area *area, uint64_t offset,
                           uint64_t length)
{
    if (area->host == NULL || area->bitmap != NULL)
        vq_mark_slow(ring, area, offset, length);
}

static inline const struct vmm_table_region *vq_find(struct vq_ring *ring, uint64_t address)
{
    const struct vmm_table_region *region = &ring->table->regions[ring->recent];
    return address - region->guest_address < region->size ? region : vq_search(ring, address);
}

static inline void vq_split_words(const uint64_t words[2], struct vq_element *element)
{
    element->address = words[0];
    element->length = (uint32_t)words[1];
    element->a = (uint16_t)(words[1] >> 32);
    element->b = (uint16_t)(words[1] >> 48);
}

/* Read 16 bytes at any alignment, each once; 0 when they are not all memory. */
static inline int vq_read_descriptor(struct vq_ring *ring, uint64_t address,
                                     struct vq_element *element)
{
    typedef uint64_t __attribute__((aligned(1), may_alias)) any64;
    const struct vmm_table_region *region = vq_find(ring, address);
    uint64_t words[2];
    if (region == NULL)
        return 0;
    uint64_t offset = address - region->guest_address;
    if (region->size - offset >= 16) {
        const volatile any64 *at = (const volatile any64 *)(region->host + offset);
        words[0] = at[0];
        words[1] = at[1];
    } else if (!vq_read_crossing(ring, address, words)) {
        return 0;
    }
    vq_split_words(words, element);
    return 1;
}

/* Read a descriptor of the ring's own table; `index` is below the queue size. */
static inline int vq_read_own(struct vq_ring *ring, uint32_t index, struct vq_element *element)
{
    const volatile uint64_t *at;
    uint64_t words[2];
    if (ring->desc.host == NULL)
        return vq_read_descriptor(ring, ring->desc.address + 16 * (uint64_t)index, element);
    at = (const volatile uint64_t *)(ring->desc.host + 16 * (uint64_t)index);
    words[0] = at[0];
    words[1] = at[1];
    vq_split_words(words, element);
    return 1;
}

#endif
