/* Atomic access to memory that a guest writes at the same time. */

#include "vm_memory.h"

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

/* Do something for each width. */
#define FOR_SIZE(what)                                                                         \
    switch (size) {                                                                            \
    case 1: what(uint8_t); break;                                                              \
    case 2: what(uint16_t); break;                                                             \
    case 4: what(uint32_t); break;                                                             \
    default: what(uint64_t); break;                                                            \
    }

/* The order must be a constant for the compiler. */
uint64_t vmm_load(uint64_t host, uint32_t size, int order)
{
    uint64_t result;
#define LOAD(type)                                                                             \
    result = order == RELAXED   ? __atomic_load_n((type *)host, __ATOMIC_RELAXED)              \
             : order == ACQUIRE ? __atomic_load_n((type *)host, __ATOMIC_ACQUIRE)              \
                                : __atomic_load_n((type *)host, __ATOMIC_SEQ_CST)
    FOR_SIZE(LOAD)
    return result;
}

void vmm_store(uint64_t host, uint32_t size, uint64_t value, int order)
{
#define STORE(type)                                                                            \
    if (order == RELAXED)                                                                      \
        __atomic_store_n((type *)host, (type)value, __ATOMIC_RELAXED);                         \
    else if (order == RELEASE)                                                                 \
        __atomic_store_n((type *)host, (type)value, __ATOMIC_RELEASE);                         \
    else                                                                                       \
        __atomic_store_n((type *)host, (type)value, __ATOMIC_SEQ_CST)
    FOR_SIZE(STORE)
}

#define UPDATE_IN(type, memory_order)                                                          \
    switch (operation) {                                                                       \
    case VMM_EXCHANGE:                                                                         \
        result = __atomic_exchange_n((type *)host, (type)value, memory_order);                 \
        break;                                                                                 \
    case VMM_ADD: result = __atomic_fetch_add((type *)host, (type)value, memory_order); break; \
    case VMM_OR: result = __atomic_fetch_or((type *)host, (type)value, memory_order); break;   \
    case VMM_AND: result = __atomic_fetch_and((type *)host, (type)value, memory_order); break; \
    default: result = __atomic_fetch_xor((type *)host, (type)value, memory_order); break;      \
    }

uint64_t vmm_update(uint64_t host, uint32_t size, int operation, uint64_t value, int order)
{
    uint64_t result;
#define UPDATE(type)                                                                           \
    switch (order) {                                                                           \
    case RELAXED: UPDATE_IN(type, __ATOMIC_RELAXED) break;                                     \
    case ACQUIRE: UPDATE_IN(type, __ATOMIC_ACQUIRE) break;                                     \
    case RELEASE: UPDATE_IN(type, __ATOMIC_RELEASE) break;                                     \
    case ACQ_REL: UPDATE_IN(type, __ATOMIC_ACQ_REL) break;                                     \
    default: UPDATE_IN(type, __ATOMIC_SEQ_CST) break;                                          \
    }
    FOR_SIZE(UPDATE)
    return result;
}

/* On failure *expected becomes what was found. A failure orders like a load of the same order. */
int vmm_compare_exchange(uint64_t host, uint32_t size, uint64_t *expected, uint64_t desired,
                         int order)
{
    int done;
#define EXCHANGE(type, success, failure)                                                       \
    done = __atomic_compare_exchange_n((type *)host, &found, (type)desired, 0, success, failure)
#define COMPARE(type)                                                                          \
    do {                                                                                       \
        type found = (type)*expected;                                                          \
        switch (order) {                                                                       \
        case RELAXED: EXCHANGE(type, __ATOMIC_RELAXED, __ATOMIC_RELAXED); break;               \
        case ACQUIRE: EXCHANGE(type, __ATOMIC_ACQUIRE, __ATOMIC_ACQUIRE); break;               \
        case RELEASE: EXCHANGE(type, __ATOMIC_RELEASE, __ATOMIC_RELAXED); break;               \
        case ACQ_REL: EXCHANGE(type, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE); break;               \
        default: EXCHANGE(type, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); break;                    \
        }                                                                                      \
        *expected = found;                                                                     \
    } while (0)
    FOR_SIZE(COMPARE)
    return done;
}
