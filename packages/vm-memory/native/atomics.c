/* Atomic access to memory that a guest writes at the same time. */

#include "vm_memory.h"

#include <string.h>

enum { RELAXED, ACQUIRE, RELEASE, ACQ_REL, SEQ_CST };

void vmm_fence(int order)
{
    switch (order) {
    case RELAXED: break;
    case ACQUIRE: __atomic_thread_fence(__ATOMIC_ACQUIRE); break;
    case RELEASE: __atomic_thread_fence(__ATOMIC_RELEASE); break;
    case ACQ_REL: __atomic_thread_fence(__ATOMIC_ACQ_REL); break;
    default: __atomic_thread_fence(__ATOMIC_SEQ_CST); break;
    }
}

/* The order must be a constant for the compiler: anything but relaxed and acquire is the strongest. */
#define LOAD(type)                                                                             \
    (order == RELAXED   ? __atomic_load_n((type *)host, __ATOMIC_RELAXED)                      \
     : order == ACQUIRE ? __atomic_load_n((type *)host, __ATOMIC_ACQUIRE)                      \
                        : __atomic_load_n((type *)host, __ATOMIC_SEQ_CST))

uint64_t vmm_load(uint64_t host, uint32_t size, int order)
{
    switch (size) {
    case 1: return LOAD(uint8_t);
    case 2: return LOAD(uint16_t);
    case 4: return LOAD(uint32_t);
    default: return LOAD(uint64_t);
    }
}

#define STORE(type)                                                                            \
    do {                                                                                       \
        if (order == RELAXED)                                                                  \
            __atomic_store_n((type *)host, (type)value, __ATOMIC_RELAXED);                     \
        else if (order == RELEASE)                                                             \
            __atomic_store_n((type *)host, (type)value, __ATOMIC_RELEASE);                     \
        else                                                                                   \
            __atomic_store_n((type *)host, (type)value, __ATOMIC_SEQ_CST);                     \
    } while (0)

void vmm_store(uint64_t host, uint32_t size, uint64_t value, int order)
{
    switch (size) {
    case 1: STORE(uint8_t); break;
    case 2: STORE(uint16_t); break;
    case 4: STORE(uint32_t); break;
    default: STORE(uint64_t); break;
    }
}

void vmm_fill(uint64_t host, int value, size_t length)
{
    memset((void *)host, value, length);
}
