/* What Python sees of the extension. generate.py adds one integer constant for every ioctl. */

typedef struct {
    uint64_t runs;    /* KVM_RUN calls that entered the kernel */
    uint64_t kicks;   /* runs ended by a kick */
    uint64_t signals; /* signals sent by kick */
    ...;
} kvmi_vcpu;

/* ioctl with a structure, or with a plain value. Result of the system call, or -errno. */
int kvmi_ioctl(int fd, unsigned long request, void *argument);
int kvmi_ioctl_value(int fd, unsigned long request, unsigned long value);

/* Shared mapping of a descriptor; 0 or -errno. */
int kvmi_map(int fd, uint64_t offset, uint64_t size, uint8_t **address);
void kvmi_unmap(uint8_t *address, uint64_t size);

/* A real-time signal number with the no-op handler installed, or -errno. */
int kvmi_kick_signal(void);

void kvmi_vcpu_init(kvmi_vcpu *vcpu, int fd, uint8_t *page, int kick_signal);
int kvmi_run(kvmi_vcpu *vcpu);
int kvmi_kick(kvmi_vcpu *vcpu);
void kvmi_retire(kvmi_vcpu *vcpu);

/* Take up to `room` entries out of a ring, into `out`; the result is how many there were. */
uint32_t kvmi_coalesced_take(uint8_t *page, uint32_t page_size, uint8_t *out, uint32_t room);
uint32_t kvmi_dirty_take(uint8_t *pages, uint32_t entries, uint32_t *fetch, uint8_t *out,
                         uint32_t room);
