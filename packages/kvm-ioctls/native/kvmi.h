/* The C part of kvm_ioctls: system calls without the GIL, and a kick that cannot get lost. */
#ifndef KVMI_H
#define KVMI_H

#include <stdint.h>

/* Results of kvmi_run that are no exit reason and no -errno. */
#define KVMI_KICKED (-4096)
#define KVMI_POSTED (-4097)

#define KVMI_DECLARATIONS 64

/* In a vCPU's mapping, the page of coalesced writes: x86 has a page for port I/O before it. */
#ifdef __x86_64__
#define KVMI_COALESCED_PAGE 2
#else
#define KVMI_COALESCED_PAGE 1
#endif

typedef struct {
    uint32_t sequence; /* odd while the others change */
    uint32_t kind;     /* 0 nothing, 1 post writes, 2 answer reads, 3 ignore writes */
    uint32_t pio;
    uint32_t size; /* bytes of an access, or 0 for any */
    uint64_t first;
    uint64_t length;
    uint64_t value;
    uint64_t count;
} kvmi_declaration;

typedef struct {
    uint64_t address;
    uint64_t data;
    uint32_t size;
    uint32_t pio;
} kvmi_posted;

typedef struct kvmi_hot kvmi_hot;

typedef struct {
    uint64_t runs;
    uint64_t kicks;
    uint64_t signals;
    uint64_t served;
    kvmi_hot *hot;   /* declared exits, or null */
    uint32_t limit;  /* how many of them a run may serve before it returns */
    int held;        /* a result that waits until posted writes have been taken */
    int has_held;
    uint8_t *page;
    int fd;
    int kick_signal;
    int running; /* 1 from the moment a run owns this structure until it gives it back */
    int retired; /* 1 once the owner wants it closed: no run may begin */
    int tid;     /* thread inside KVM_RUN, or about to enter it; else 0 */
} kvmi_vcpu;

int kvmi_ioctl(int fd, unsigned long request, void *argument);
int kvmi_ioctl_value(int fd, unsigned long request, unsigned long value);
int kvmi_map(int fd, uint64_t offset, uint64_t size, uint8_t **address);
void kvmi_unmap(uint8_t *address, uint64_t size);
int kvmi_kick_signal(void);
void kvmi_vcpu_init(kvmi_vcpu *vcpu, int fd, uint8_t *page, int kick_signal);
int kvmi_run(kvmi_vcpu *vcpu);
int kvmi_kick(kvmi_vcpu *vcpu);
void kvmi_retire(kvmi_vcpu *vcpu);
int kvmi_serve_hot(kvmi_vcpu *vcpu, kvmi_hot *hot, uint32_t limit);
int kvmi_take_held(kvmi_vcpu *vcpu);
kvmi_hot *kvmi_hot_new(uint32_t room, int wake);
void kvmi_hot_free(kvmi_hot *hot);
void kvmi_hot_set(kvmi_hot *hot, uint32_t index, const kvmi_declaration *value);
uint64_t kvmi_hot_count(kvmi_hot *hot, uint32_t index);
uint64_t kvmi_hot_full(kvmi_hot *hot);
int kvmi_hot_waiting(kvmi_hot *hot);
uint32_t kvmi_hot_take(kvmi_hot *hot, kvmi_posted *out, uint32_t room);
int kvmi_hot_serve(kvmi_hot *hot, uint64_t address, uint32_t size, uint32_t pio, int is_write,
                   uint8_t *data);
uint32_t kvmi_coalesced_take(uint8_t *page, uint32_t page_size, uint8_t *out, uint32_t room);
uint32_t kvmi_dirty_take(uint8_t *pages, uint32_t entries, uint32_t *fetch, uint8_t *out,
                         uint32_t room);

#endif
