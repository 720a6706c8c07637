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
uint32_t vq_set_bits(uint32_t *word, uint32_t bits);
uint32_t vq_clear_bits(uint32_t *word, uint32_t bits);

struct vp_limiter {
    ...;
};

struct vp_counters {
    uint64_t kicks, notifications, notifications_suppressed, chains, publications, throttled;
    uint64_t reads, writes, flushes, discards, write_zeroes, get_ids, handed_over;
    uint64_t read_bytes, written_bytes;
    uint64_t refused_read_only, refused_range, refused_header, refused_segments;
    uint64_t refused_unsupported;
    uint64_t failed_reads, failed_writes, failed_flushes, failed_discards, failed_write_zeroes;
    uint64_t last_errno;
    uint64_t received_frames, received_bytes, sent_frames, sent_bytes;
    uint64_t dropped_no_header, dropped_header, dropped_offload, dropped_short, dropped_long;
    uint64_t dropped_no_room, dropped_link, dropped_filtered, dropped_away;
    uint64_t dropped_bytes;
    uint64_t dropped_length, dropped_cid, dropped_unknown, short_buffers;
    uint64_t refused_nobody, refused_full, refused_guest;
    uint64_t reset_credit, reset_host, reset_protocol;
};

struct vp_queue {
    struct vq_ring *ring;
    int interrupt;
    int faulted;
    ...;
};

struct vp_block {
    int fd;
    int is_device;
    uint32_t read_only;
    uint32_t may_flush, may_discard, may_write_zeroes;
    uint32_t writeback;
    uint64_t sectors;
    uint64_t max_data;
    uint32_t max_discard_sectors, max_discard_segments;
    uint32_t max_write_zeroes_sectors, max_write_zeroes_segments;
    uint8_t id[20];
};

struct vp_filter {
    uint32_t active;
    uint32_t modes;
    uint32_t unicast_count, multicast_count;
    uint8_t mac[6];
    uint8_t unicast[64][6], multicast[64][6];
    uint8_t vlans[512];
};

struct vp_net {
    uint32_t length;
    struct vp_limiter *limiters[2];
    uint8_t peer[128];
    uint32_t peer_length;
    ...;
};

struct vp_window {
    uint32_t length;
    ...;
};

struct vp_output {
    int fd;
    int lossy;
    uint64_t offset;
    struct vp_window window;
    ...;
};

struct vp_pump {
    int control;
    int attention;
    int running;
    int64_t thread_id;
    struct vp_queue queues[64];
    uint32_t *status;
    struct vp_limiter *limiter;
    struct vp_counters counters;
    struct vp_block block;
    struct vp_net net;
    struct vp_output output;
    ...;
};

struct vp_limiter *vp_limiter_new(void);
void vp_limiter_free(struct vp_limiter *limiter);
void vp_limiter_set(struct vp_limiter *limiter, int which, uint64_t size, uint64_t refill,
                    uint64_t burst, uint64_t now);
uint64_t vp_limiter_take(struct vp_limiter *limiter, uint64_t bytes, uint64_t now);
uint64_t vp_now(void);
void vp_wake(int fd);
struct vp_pump *vp_new(int uring, int *error);
void vp_free(struct vp_pump *pump);
int vp_start(struct vp_pump *pump);
void vp_stop(struct vp_pump *pump);
int vp_take(struct vp_pump *pump, uint32_t *queue, uint32_t *chain, struct vq_batch **batch);
void vp_answer(struct vp_pump *pump, uint32_t queue, uint32_t head, uint32_t length);
int vp_add_queue(struct vp_pump *pump, struct vq_ring *ring, int kick, int interrupt);
int vp_adopt(struct vp_pump *pump, uint32_t queue, uint32_t head, uint32_t readable,
             uint32_t writable, const uint64_t *elements);
struct vq_batch *vp_batch(struct vp_pump *pump, uint32_t queue, uint32_t number);
void vp_leave(struct vp_pump *pump);
int vp_net_open(struct vp_pump *pump, int fd, int link, uint64_t features);
void vp_net_set_filter(struct vp_pump *pump, const struct vp_filter *filter);
int vp_output_new(struct vp_pump *pump);
void vp_output_open(struct vp_pump *pump);
void vp_output_window(struct vp_pump *pump, uint8_t *bytes, uint32_t length, int read);
int vp_vsock_new(struct vp_pump *pump, uint64_t cid);
int vp_vsock_open(struct vp_pump *pump);
uint32_t vp_vsock_count(struct vp_pump *pump);
int vp_vsock_asked(struct vp_pump *pump, uint32_t *guest_port, uint32_t *host_port);
int vp_vsock_order(struct vp_pump *pump, uint32_t guest_port, uint32_t host_port, int fd, int calls,
                   const char *greeting, uint32_t length);
void vp_vsock_forget(struct vp_pump *pump);
