/* What Python sees of the C part. `vm_memory.h` declares the same for the compiler. */

struct vmm_mapping {
    uint8_t *base;
    size_t length;
    int fd;
    ...;
};

struct vmm_mapping *vmm_mapping_new(size_t length, size_t alignment, size_t guard, int flags,
                                    int fd, int64_t offset, int *error);
void vmm_mapping_release(struct vmm_mapping *mapping);
int vmm_mapping_overlay(struct vmm_mapping *mapping, size_t start, size_t length, int fd,
                        int64_t offset);

void vmm_fence(int order);
uint64_t vmm_load(uint64_t host, uint32_t size, int order);
void vmm_store(uint64_t host, uint32_t size, uint64_t value, int order);
void vmm_fill(uint64_t host, int value, size_t length);
