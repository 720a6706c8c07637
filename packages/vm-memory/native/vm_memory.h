/* The C part of vm-memory: what Python cannot do, and the loops that a benchmark shows hot.
 *
 * Host addresses cross the border from Python as integers; Python holds a reference to the mapping
 * behind each for as long as the call lasts. */
#ifndef VM_MEMORY_H
#define VM_MEMORY_H

#include <stddef.h>
#include <stdint.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__ || __SIZEOF_POINTER__ != 8
#error "vm-memory supports 64-bit little-endian hosts"
#endif

/* --- mapping.c ---
 * One mapping of host memory. It is unmapped, and its file closed, with the last reference. */
struct vmm_mapping {
    uint8_t *base;       /* first byte of the memory itself */
    size_t length;       /* whole pages */
    int fd;              /* owned; -1 for anonymous memory */
    uint8_t *outer;      /* base less the guard in front */
    size_t outer_length; /* both guards included; 0 for what is somebody else's to unmap */
    long references;
    void *owner;         /* a Python object that keeps somebody else's memory, or NULL */
    int watch;           /* head of its chain of watched ranges; -1 for none */
    int lost;            /* pages are gone that no signal told of */
    int no_dump, no_fork;
};

/* On failure NULL, with the errno of the failing call in *error. Takes over `fd` on success only. */
struct vmm_mapping *vmm_mapping_new(size_t length, size_t alignment, size_t guard, int flags,
                                    int fd, int64_t offset, int *error);
/* Use memory that somebody else mapped, whole pages; it is never unmapped here. `owner`: the id() of
 * an object that is kept for as long as the mapping lives. NULL when there is no memory. */
struct vmm_mapping *vmm_mapping_adopt(uint64_t host, size_t length, uint64_t owner);
void vmm_mapping_retain(struct vmm_mapping *mapping);
void vmm_mapping_release(struct vmm_mapping *mapping);

/* These return 0 or an errno. */
int vmm_mapping_overlay(struct vmm_mapping *mapping, size_t start, size_t length, int fd,
                        int64_t offset);
int vmm_mapping_exclude(struct vmm_mapping *mapping, int from_dumps, int from_forks);

/* The page size of the file system that a file lies on if that is hugetlbfs, else 0. */
size_t vmm_file_page_size(int fd);

/* --- faults.c ---
 * Ranges that something outside this process can take away: files that are truncated (SIGBUS), and
 * memory that a forked child does not inherit. */
enum vmm_watch {
    VMM_WATCH_FILE = 1,   /* what lies behind a lost page is lost with it */
    VMM_WATCH_PAGES = 2,  /* pages are lost one by one */
    VMM_WATCH_NO_FORK = 3 /* a child of fork has none of it */
};

int vmm_watch(struct vmm_mapping *mapping, uint8_t *base, size_t length, size_t page,
              enum vmm_watch kind);
void vmm_unwatch(struct vmm_mapping *mapping);
int vmm_mapping_guard_faults(struct vmm_mapping *mapping, size_t page, int each);
/* Whether pages were lost since the mapping was made. They read as zeros. */
int vmm_mapping_lost(struct vmm_mapping *mapping);
/* Say that pages of a mapping are lost, for another reason than a signal told. */
void vmm_mapping_lose(struct vmm_mapping *mapping);

/* --- policy.c: each returns 0 or an errno --- */
int vmm_advise(uint64_t host, size_t length, int advice);
int vmm_populate(uint64_t host, size_t length, size_t page);
int vmm_lock(uint64_t host, size_t length, int on_fault);
int vmm_bind(uint64_t host, size_t length, int mode, uint64_t *mask, uint64_t bits);
int vmm_nodes(uint64_t host, size_t page, size_t count, int *nodes);

/* --- atomics.c ---
 * Orders are numbered as in vm_memory.Order. Addresses are aligned to `size`. */
enum vmm_operation { VMM_EXCHANGE, VMM_ADD, VMM_OR, VMM_AND, VMM_XOR };

void vmm_fence(int order);
uint64_t vmm_load(uint64_t host, uint32_t size, int order);
void vmm_store(uint64_t host, uint32_t size, uint64_t value, int order);
uint64_t vmm_update(uint64_t host, uint32_t size, int operation, uint64_t value, int order);
int vmm_compare_exchange(uint64_t host, uint32_t size, uint64_t *expected, uint64_t desired,
                         int order);

/* --- bitmap.c ---
 * One bit a page, set by any thread at any time. Offsets and lengths are bytes; what lies past the
 * end is ignored. */
struct vmm_bitmap {
    uint64_t *words;
    uint64_t bits;
    uint64_t size; /* bytes of memory it tells of */
    uint32_t page_shift;
    long references;
};

struct vmm_bitmap *vmm_bitmap_new(uint64_t size, uint32_t page_shift);
void vmm_bitmap_retain(struct vmm_bitmap *bitmap);
void vmm_bitmap_release(struct vmm_bitmap *bitmap);
void vmm_bitmap_mark(struct vmm_bitmap *bitmap, uint64_t offset, uint64_t length);
void vmm_bitmap_clear(struct vmm_bitmap *bitmap, uint64_t offset, uint64_t length);
int vmm_bitmap_test(struct vmm_bitmap *bitmap, uint64_t offset);
uint64_t vmm_bitmap_count(struct vmm_bitmap *bitmap);
/* Mark what another bitmap, of another page size perhaps, says: its first bit is at `offset`. */
void vmm_bitmap_merge(struct vmm_bitmap *bitmap, uint64_t offset, const void *words,
                      uint64_t bits, uint32_t page_shift);
/* Write the runs of set bits within words `first` to `end` as pairs of offset and length in bytes;
 * with `take` clear them, each word in one step. Returns the number of pairs; *next is the word to
 * go on with. Stops early when the pairs of one more word might not fit: give room for 34. */
uint64_t vmm_bitmap_harvest(struct vmm_bitmap *bitmap, uint64_t first, uint64_t end, int take,
                            uint64_t *ranges, uint64_t capacity, uint64_t *next);
/* Copy words `first` to `end` and clear them, each in one step. */
void vmm_bitmap_take(struct vmm_bitmap *bitmap, uint64_t first, uint64_t end, uint64_t *words);

/* --- table.c ---
 * A map of guest memory as other C code sees it. Its layout is an interface: extensions that are
 * compiled elsewhere repeat these declarations and check `version`. A table never changes; who
 * keeps one calls `retain`, and `release` when done, from any thread. Regions are sorted. */
#define VMM_TABLE_VERSION 1

struct vmm_table_region {
    uint64_t guest_address;
    uint64_t size;
    uint8_t *host;
    struct vmm_bitmap *bitmap; /* NULL when dirty pages are not tracked */
    struct vmm_mapping *mapping;
};

struct vmm_table {
    uint32_t version;
    uint32_t count;
    long references;
    void (*retain)(struct vmm_table *table);
    void (*release)(struct vmm_table *table);
    /* Marks bytes of a region dirty; `offset` counts from the region's start. */
    void (*mark)(struct vmm_bitmap *bitmap, uint64_t offset, uint64_t length);
    struct vmm_table_region regions[];
};

struct vmm_table *vmm_table_new(uint32_t count);
void vmm_table_set(struct vmm_table *table, uint32_t index, uint64_t guest_address, uint64_t size,
                   struct vmm_mapping *mapping, struct vmm_bitmap *bitmap);
void vmm_table_retain(struct vmm_table *table);
void vmm_table_release(struct vmm_table *table);
/* The index of the region that contains an address, or -1. */
int64_t vmm_table_find(const struct vmm_table *table, uint64_t address);

/* --- transfer.c ---
 * Move bytes between guest memory and a file: one readv or writev, with `exact` one after the other
 * until `length` is done, the file ends, or a call fails. Marks what was read into memory. Returns the bytes
 * done; *error is 0 or the errno of the call that stopped it. `offset` < 0: the file's position. */
int64_t vmm_transfer(struct vmm_table *table, uint64_t address, uint64_t length, int fd,
                     int64_t offset, int out, int exact, int *error);

/* --- owner.c ---
 * Append a Python object that owns one reference to the list with this id(). 0, or -1 when Python
 * is out of memory. `length`: how much of a mapping its buffer shows. */
enum vmm_own { VMM_OWN_MAPPING, VMM_OWN_BITMAP, VMM_OWN_TABLE };

int vmm_own(uint64_t list, void *thing, int kind, size_t length);
/* Hold a reference to the Python object with this id(), and give one back; from any thread. */
void vmm_keep(uint64_t object);
void vmm_let_go(void *object);

/* --- userfault.c --- */
struct vmm_userfault_event {
    uint64_t host; /* the page that is missing or protected, or where a removal starts */
    uint64_t end;  /* of a removal */
    uint64_t flags;
    uint32_t kind;
    uint32_t thread; /* that waits, as gettid(2) has it */
};

/* A descriptor, or -1 with the errno. */
int vmm_userfault_open(uint64_t features, int *error);
/* These return 0 or an errno. */
int vmm_userfault_register(int fd, uint64_t host, uint64_t length, uint64_t mode);
int vmm_userfault_unregister(int fd, uint64_t host, uint64_t length);
int vmm_userfault_protect(int fd, uint64_t host, uint64_t length, int on);
int vmm_userfault_wake(int fd, uint64_t host, uint64_t length);
/* Whoever touches missing pages, or waits for them, gets SIGBUS from now on. */
int vmm_userfault_poison(int fd, uint64_t host, uint64_t length);
/* Put bytes, or zeros when `from` is 0, where pages are missing; returns how many it did. */
int64_t vmm_userfault_supply(int fd, uint64_t to, uint64_t from, uint64_t length, uint64_t mode,
                             int *error);
/* Read up to 16 events without waiting; returns how many. */
int vmm_userfault_read(int fd, struct vmm_userfault_event *events, int room, int *error);

struct vmm_filler_status {
    uint64_t faults; /* that were served */
    uint64_t filled; /* pages supplied */
    uint64_t pages;  /* of all ranges */
    uint64_t error_offset;
    int error; /* errno that keeps pages missing: reading the file at error_offset failed */
    int complete;
};
struct vmm_filler;

/* Supplies missing pages of registered ranges from a file. `ranges`: host address, length and
 * offset in the file of each, whole pages. Both descriptors stay the caller's. */
struct vmm_filler *vmm_filler_new(int uffd, int file, uint64_t page, size_t count,
                                  const uint64_t *ranges, int *error);
/* Start serving; with `background` also fill all there is, and unregister when that is done. */
int vmm_filler_start(struct vmm_filler *filler, int background);
/* After a failure: forget it, and let everybody who waits ask again. */
int vmm_filler_retry(struct vmm_filler *filler);
/* An eventfd that becomes readable when the filler is complete or has failed. */
int vmm_filler_notify(struct vmm_filler *filler);
struct vmm_filler_status *vmm_filler_look(struct vmm_filler *filler);
/* Stop and free; pages not supplied yet stay missing. */
void vmm_filler_free(struct vmm_filler *filler);

/* --- scan.c --- */
void vmm_fill(uint64_t host, int value, size_t length);
void vmm_copy(uint64_t target, uint64_t source, size_t length);
/* The offset of the first occurrence, or -1. */
int64_t vmm_find(uint64_t host, size_t length, const void *needle, size_t needle_length);
/* How many bytes from the start are alike page by page: all zero, or none all zero. */
size_t vmm_zero_run(uint64_t host, size_t length, size_t page, int *zero);
/* Likewise for pages that are equal in two places, or differ. */
size_t vmm_equal_run(uint64_t one, uint64_t other, size_t length, size_t page, int *equal);

#endif
