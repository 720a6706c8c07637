/* What Python sees of the C part. `vm_memory.h` declares the same for the compiler. */

/* mapping.c */
struct vmm_mapping {
    uint8_t *base;
    size_t length;
    int fd;
    ...;
};
struct vmm_mapping *vmm_mapping_new(size_t length, size_t alignment, size_t guard, int flags,
                                    int fd, int64_t offset, int *error);
struct vmm_mapping *vmm_mapping_adopt(uint64_t host, size_t length, uint64_t owner);
int vmm_mapping_overlay(struct vmm_mapping *mapping, size_t start, size_t length, int fd,
                        int64_t offset);
int vmm_mapping_exclude(struct vmm_mapping *mapping, int from_dumps, int from_forks);
size_t vmm_file_page_size(int fd);

/* faults.c */
int vmm_mapping_guard_faults(struct vmm_mapping *mapping, size_t page, int each);
int vmm_mapping_lost(struct vmm_mapping *mapping);
void vmm_mapping_lose(struct vmm_mapping *mapping);

/* policy.c */
int vmm_advise(uint64_t host, size_t length, int advice);
int vmm_populate(uint64_t host, size_t length, size_t page);
int vmm_lock(uint64_t host, size_t length, int on_fault);
int vmm_bind(uint64_t host, size_t length, int mode, uint64_t *mask, uint64_t bits);
int vmm_nodes(uint64_t host, size_t page, size_t count, int *nodes);

/* atomics.c */
void vmm_fence(int order);
uint64_t vmm_load(uint64_t host, uint32_t size, int order);
void vmm_store(uint64_t host, uint32_t size, uint64_t value, int order);
uint64_t vmm_update(uint64_t host, uint32_t size, int operation, uint64_t value, int order);
int vmm_compare_exchange(uint64_t host, uint32_t size, uint64_t *expected, uint64_t desired,
                         int order);

/* bitmap.c */
struct vmm_bitmap {
    uint64_t *words;
    uint64_t bits;
    uint64_t size;
    uint32_t page_shift;
    ...;
};
struct vmm_bitmap *vmm_bitmap_new(uint64_t size, uint32_t page_shift);
void vmm_bitmap_mark(struct vmm_bitmap *bitmap, uint64_t offset, uint64_t length);
void vmm_bitmap_clear(struct vmm_bitmap *bitmap, uint64_t offset, uint64_t length);
int vmm_bitmap_test(struct vmm_bitmap *bitmap, uint64_t offset);
uint64_t vmm_bitmap_count(struct vmm_bitmap *bitmap);
void vmm_bitmap_merge(struct vmm_bitmap *bitmap, uint64_t offset, const void *words,
                      uint64_t bits, uint32_t page_shift);
uint64_t vmm_bitmap_harvest(struct vmm_bitmap *bitmap, uint64_t first, uint64_t end, int take,
                            uint64_t *ranges, uint64_t capacity, uint64_t *next);
void vmm_bitmap_take(struct vmm_bitmap *bitmap, uint64_t first, uint64_t end, uint64_t *words);

/* table.c */
struct vmm_table_region {
    uint64_t guest_address;
    uint64_t size;
    uint8_t *host;
    struct vmm_bitmap *bitmap;
    struct vmm_mapping *mapping;
};
struct vmm_table {
    uint32_t version;
    uint32_t count;
    long references;
    void (*retain)(struct vmm_table *table);
    void (*release)(struct vmm_table *table);
    void (*mark)(struct vmm_bitmap *bitmap, uint64_t offset, uint64_t length);
    struct vmm_table_region regions[];
};
struct vmm_table *vmm_table_new(uint32_t count);
void vmm_table_set(struct vmm_table *table, uint32_t index, uint64_t guest_address, uint64_t size,
                   struct vmm_mapping *mapping, struct vmm_bitmap *bitmap);

/* transfer.c */
int64_t vmm_transfer(struct vmm_table *table, uint64_t address, uint64_t length, int fd,
                     int64_t offset, int out, int exact, int *error);

/* owner.c */
int vmm_own(uint64_t list, void *thing, int kind, size_t length);

/* userfault.c */
struct vmm_userfault_event {
    uint64_t host;
    uint64_t end;
    uint64_t flags;
    uint32_t kind;
    uint32_t thread;
};
int vmm_userfault_open(uint64_t features, int *error);
int vmm_userfault_register(int fd, uint64_t host, uint64_t length, uint64_t mode);
int vmm_userfault_unregister(int fd, uint64_t host, uint64_t length);
int vmm_userfault_protect(int fd, uint64_t host, uint64_t length, int on);
int vmm_userfault_wake(int fd, uint64_t host, uint64_t length);
int vmm_userfault_poison(int fd, uint64_t host, uint64_t length);
int64_t vmm_userfault_supply(int fd, uint64_t to, uint64_t from, uint64_t length, uint64_t mode,
                             int *error);
int vmm_userfault_read(int fd, struct vmm_userfault_event *events, int room, int *error);
struct vmm_filler_status {
    uint64_t faults;
    uint64_t filled;
    uint64_t pages;
    uint64_t error_offset;
    int error;
    int complete;
};
struct vmm_filler;
struct vmm_filler *vmm_filler_new(int uffd, int file, uint64_t page, size_t count,
                                  const uint64_t *ranges, int *error);
int vmm_filler_start(struct vmm_filler *filler, int background);
int vmm_filler_retry(struct vmm_filler *filler);
int vmm_filler_notify(struct vmm_filler *filler);
struct vmm_filler_status *vmm_filler_look(struct vmm_filler *filler);
void vmm_filler_free(struct vmm_filler *filler);

/* scan.c */
void vmm_fill(uint64_t host, int value, size_t length);
void vmm_copy(uint64_t target, uint64_t source, size_t length);
int64_t vmm_find(uint64_t host, size_t length, const void *needle, size_t needle_length);
size_t vmm_zero_run(uint64_t host, size_t length, size_t page, int *zero);
size_t vmm_equal_run(uint64_t one, uint64_t other, size_t length, size_t page, int *equal);
