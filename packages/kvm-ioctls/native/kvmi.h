/* The C part of kvm_ioctls: system calls without the GIL, and a kick that cannot get lost. */
#ifndef KVMI_H
#define KVMI_H

#include <stdint.h>

/* Results of kvmi_run that are no exit reason and no -errno. */
#define KVMI_KICKED (-4096)

typedef struct {
    uint64_t runs;
    uint64_t kicks;
    uint64_t signals;
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
uint32_t kvmi_coalesced_take(uint8_t *page, uint32_t page_size, uint8_t *out, uint32_t room);
uint32_t kvmi_dirty_take(uint8_t *pages, uint32_t entries, uint32_t *fetch, uint8_t *out,
                         uint32_t room);

#endif
