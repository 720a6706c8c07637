/* What Python sees of the extension. generate.py adds one integer constant for every ioctl. */

typedef struct {
    uint64_t runs;    /* KVM_RUN calls that entered the kernel */
    uint64_t kicks;   /* runs ended by a kick */
    uint64_t signals; /* signals sent by kick */
    uint64_t served;  /* declared exits served without returning */
    ...;
} kvmi_vcpu;

typedef struct kvmi_hot kvmi_hot;

typedef struct {
    uint32_t kind; /* 0 nothing, 1 post writes, 2 answer reads, 3 ignore writes */
    uint32_t pio, size;
    uint64_t first, length, value;
    ...;
} kvmi_declaration;

typedef struct {
    uint64_t address, data;
    uint32_t size, pio;
} kvmi_posted;

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

/* Declared exits: give them to a vCPU that does not run (else -EBUSY); null takes them away. */
int kvmi_serve_hot(kvmi_vcpu *vcpu, kvmi_hot *hot, uint32_t limit);
int kvmi_take_held(kvmi_vcpu *vcpu);
kvmi_hot *kvmi_hot_new(uint32_t room, int wake);
void kvmi_hot_free(kvmi_hot *hot);
void kvmi_hot_set(kvmi_hot *hot, uint32_t index, const kvmi_declaration *value);
uint64_t kvmi_hot_count(kvmi_hot *hot, uint32_t index);
uint64_t kvmi_hot_full(kvmi_hot *hot);
int kvmi_hot_waiting(kvmi_hot *hot);
uint32_t kvmi_hot_take(kvmi_hot *hot, kvmi_posted *out, uint32_t room);

/* Take up to `room` entries out of a ring, into `out`; the result is how many there were. */
uint32_t kvmi_coalesced_take(uint8_t *page, uint32_t page_size, uint8_t *out, uint32_t room);
uint32_t kvmi_dirty_take(uint8_t *pages, uint32_t entries, uint32_t *fetch, uint8_t *out,
                         uint32_t room);
