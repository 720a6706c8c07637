/* What Python sees of the C part; `virtio_queue.h` declares the same for the compiler. */

struct vq_fault {
    int32_t rule;
    int64_t descriptor;
    uint64_t value;
};

struct vq_chain {
    uint32_t head;
    uint32_t slots;
    uint32_t first_segment;
    uint32_t readable_segments;
    uint32_t writable_segments;
    uint32_t first_iovec;
    uint32_t readable_iovecs;
    uint32_t writable_iovecs;
    uint64_t readable_length;
    uint64_t writable_length;
};

struct vq_iovec {
    uint64_t host;
    uint64_t length;
};

struct vq_batch {
    uint32_t chain_capacity;
    uint32_t segment_capacity;
    uint32_t iovec_capacity;
    uint32_t header_size;
    uint32_t count;
    uint32_t segment_count;
    uint32_t iovec_count;
    uint32_t outstanding;
    struct vq_chain *chains;
    uint64_t *segments;
    struct vq_iovec *iovecs;
    uint8_t *headers;
    ...;
};

struct vq_flight {
    uint32_t slots;
    uint32_t done;
    uint32_t length;
    uint32_t chain;
    uint64_t room;
    uint64_t sequence;
    struct vq_batch *batch;
};

struct vq_ring {
    uint32_t next_avail;
    uint32_t next_used;
    uint64_t pending;
    uint64_t sequence;
    uint32_t in_flight;
    struct vq_fault fault;
    struct vq_flight *flights;
    ...;
};

struct vq_ring *vq_new(uint32_t size, uint64_t desc, uint64_t driver, uint64_t device, int packed,
                       int event_idx, int indirect, int in_order);
void vq_free(struct vq_ring *ring);
int vq_bind(struct vq_ring *ring, uint64_t table);
struct vq_batch *vq_batch_new(uint32_t chains, uint32_t segments, uint32_t iovecs);
void vq_batch_free(struct vq_batch *batch);
int64_t vq_pop(struct vq_ring *ring, struct vq_batch *batch, uint32_t limit, int track);
int64_t vq_pop_batch(struct vq_ring *ring, struct vq_batch *batch, int64_t limit, uint32_t header);
int vq_undo(struct vq_ring *ring, uint32_t head);
int64_t vq_complete(struct vq_ring *ring, uint32_t count, const uint32_t *heads,
                    const uint32_t *lengths);
int64_t vq_complete_batch(struct vq_ring *ring, struct vq_batch *batch, const uint32_t *lengths);
int64_t vq_complete_one(struct vq_ring *ring, uint32_t head, uint32_t length);
int vq_needs_notification(struct vq_ring *ring);
int vq_enable_notifications(struct vq_ring *ring);
void vq_disable_notifications(struct vq_ring *ring);
int vq_adopt(struct vq_ring *ring, uint32_t head, uint32_t slots, uint64_t room, int64_t done);
