/* The rings that the kernel shares with us: coalesced writes and dirty pages.
 *
 * The kernel is the other side of both, and in the dirty ring's case runs at the same time, so each
 * index and flag is loaded with acquire and stored with release. Entries are copied out before they
 * are given back. Indices come from the kernel and are still checked against the ring's size.
 */
#include "kvmi.h"

#include <string.h>

struct coalesced {
    uint64_t phys_addr;
    uint32_t len;
    uint32_t pio;
    uint8_t data[8];
};

struct coalesced_ring {
    uint32_t first;
    uint32_t last;
    struct coalesced entries[];
};

uint32_t kvmi_coalesced_take(uint8_t *page, uint32_t page_size, uint8_t *out, uint32_t room)
{
    struct coalesced_ring *ring = (struct coalesced_ring *)page;
    uint32_t size = (page_size - sizeof *ring) / sizeof ring->entries[0];
    uint32_t first = __atomic_load_n(&ring->first, __ATOMIC_ACQUIRE);
    uint32_t count = 0;

    if (first >= size)
        return 0;
    while (count < room && first != __atomic_load_n(&ring->last, __ATOMIC_ACQUIRE)) {
        memcpy(out + count * sizeof ring->entries[0], &ring->entries[first],
               sizeof ring->entries[0]);
        first = (first + 1) % size;
        __atomic_store_n(&ring->first, first, __ATOMIC_RELEASE);
        count++;
    }
    return count;
}

struct dirty {
    uint32_t flags; /* bit 0: dirty; bit 1: harvested, the kernel may reset it */
    uint32_t slot;
    uint64_t offset;
};

uint32_t kvmi_dirty_take(uint8_t *pages, uint32_t entries, uint32_t *fetch, uint8_t *out,
                         uint32_t room)
{
    struct dirty *ring = (struct dirty *)pages;
    uint32_t count = 0;

    while (count < room) {
        struct dirty *entry = &ring[*fetch & (entries - 1)];
        if ((__atomic_load_n(&entry->flags, __ATOMIC_ACQUIRE) & 3) != 1)
            break;
        memcpy(out + count * sizeof *entry, entry, sizeof *entry);
        __atomic_store_n(&entry->flags, 2, __ATOMIC_RELEASE);
        ++*fetch;
        count++;
    }
    return count;
}
