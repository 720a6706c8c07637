/* Dirty pages, one bit each, set and harvested by several threads at once.
 *
 * A mark is always a store, released after the write that it tells of, so whoever takes the mark
 * sees the write. To skip it where the bit is seen set already would lose writes: the bit may be
 * taken, and the page read, between the look and the write's arrival in memory. */

#include "vm_memory.h"

#include <stdlib.h>
#include <string.h>

struct vmm_bitmap *vmm_bitmap_new(uint64_t size, uint32_t page_shift)
{
    uint64_t bits = size == 0 ? 0 : ((size - 1) >> page_shift) + 1;
    struct vmm_bitmap *bitmap = calloc(1, sizeof *bitmap);
    if (bitmap == NULL)
        return NULL;
    bitmap->words = calloc(bits / 64 + 1, sizeof(uint64_t));
    if (bitmap->words == NULL) {
        free(bitmap);
        return NULL;
    }
    bitmap->bits = bits;
    bitmap->size = size;
    bitmap->page_shift = page_shift;
    bitmap->references = 1;
    return bitmap;
}

void vmm_bitmap_retain(struct vmm_bitmap *bitmap)
{
    __atomic_fetch_add(&bitmap->references, 1, __ATOMIC_RELAXED);
}

void vmm_bitmap_release(struct vmm_bitmap *bitmap)
{
    if (__atomic_sub_fetch(&bitmap->references, 1, __ATOMIC_ACQ_REL) != 0)
        return;
    free(bitmap->words);
    free(bitmap);
}

/* The first bit of a byte range and the one behind its last; 0 when nothing of it is inside. */
static int span(const struct vmm_bitmap *bitmap, uint64_t offset, uint64_t length, uint64_t *first,
                uint64_t *end)
{
    uint64_t last;
    if (length == 0 || offset >= bitmap->size)
        return 0;
    if (__builtin_add_overflow(offset, length - 1, &last) || last >= bitmap->size)
        last = bitmap->size - 1;
    *first = offset >> bitmap->page_shift;
    *end = (last >> bitmap->page_shift) + 1;
    return 1;
}

static void set(uint64_t *words, uint64_t first, uint64_t end)
{
    uint64_t word = first / 64, last = (end - 1) / 64;
    uint64_t head = ~0ULL << (first % 64), tail = ~0ULL >> (63 - (end - 1) % 64);
    if (word == last) {
        __atomic_fetch_or(&words[word], head & tail, __ATOMIC_SEQ_CST);
        return;
    }
    __atomic_fetch_or(&words[word], head, __ATOMIC_SEQ_CST);
    while (++word < last)
        __atomic_store_n(&words[word], ~0ULL, __ATOMIC_RELEASE);
    __atomic_fetch_or(&words[last], tail, __ATOMIC_SEQ_CST);
}

void vmm_bitmap_mark(struct vmm_bitmap *bitmap, uint64_t offset, uint64_t length)
{
    uint64_t first, end;
    if (span(bitmap, offset, length, &first, &end))
        set(bitmap->words, first, end);
}

void vmm_bitmap_clear(struct vmm_bitmap *bitmap, uint64_t offset, uint64_t length)
{
    uint64_t first, end;
    if (!span(bitmap, offset, length, &first, &end))
        return;
    for (uint64_t word = first / 64; word <= (end - 1) / 64; word++) {
        uint64_t mask = ~0ULL;
        if (word == first / 64)
            mask &= ~0ULL << (first % 64);
        if (word == (end - 1) / 64)
            mask &= ~0ULL >> (63 - (end - 1) % 64);
        __atomic_fetch_and(&bitmap->words[word], ~mask, __ATOMIC_SEQ_CST);
    }
}

int vmm_bitmap_test(struct vmm_bitmap *bitmap, uint64_t offset)
{
    uint64_t bit = offset >> bitmap->page_shift;
    if (bit >= bitmap->bits)
        return 0;
    return (int)(__atomic_load_n(&bitmap->words[bit / 64], __ATOMIC_ACQUIRE) >> (bit % 64) & 1);
}

uint64_t vmm_bitmap_count(struct vmm_bitmap *bitmap)
{
    uint64_t total = 0;
    for (uint64_t word = 0; word < (bitmap->bits + 63) / 64; word++)
        total += (uint64_t)__builtin_popcountll(
            __atomic_load_n(&bitmap->words[word], __ATOMIC_RELAXED));
    return total;
}

void vmm_bitmap_merge(struct vmm_bitmap *bitmap, uint64_t offset, const void *source,
                      uint64_t bits, uint32_t page_shift)
{
    uint64_t start = offset >> bitmap->page_shift;
    /* Words that lie alike are merged as words; the last one may reach past either end. */
    int alike = page_shift == bitmap->page_shift && start % 64 == 0 &&
                offset == start << bitmap->page_shift;
    for (uint64_t i = 0; i < (bits + 63) / 64; i++) {
        uint64_t word;
        memcpy(&word, (const uint8_t *)source + 8 * i, 8);
        if (i == bits / 64)
            word &= ~(~0ULL << (bits % 64));
        if (word == 0)
            continue;
        if (alike && start + 64 * (i + 1) <= bitmap->bits) {
            __atomic_fetch_or(&bitmap->words[start / 64 + i], word, __ATOMIC_SEQ_CST);
            continue;
        }
        while (word != 0) {
            unsigned first = (unsigned)__builtin_ctzll(word);
            uint64_t rest = ~(word >> first);
            unsigned count = rest ? (unsigned)__builtin_ctzll(rest) : 64;
            if (count > 64 - first)
                count = 64 - first;
            uint64_t at;
            if (!__builtin_add_overflow(offset, (64 * i + first) << page_shift, &at))
                vmm_bitmap_mark(bitmap, at, (uint64_t)count << page_shift);
            word = first + count < 64 ? word & (~0ULL << (first + count)) : 0;
        }
    }
}

/* The first word from `word` on that is not 0, or `end`. Most of a bitmap is 0, so this runs at
 * the speed of memory: four vectors at a time. A bit set meanwhile is found now or next time. */
static uint64_t skip(const uint64_t *words, uint64_t word, uint64_t end)
{
    typedef uint64_t pair __attribute__((vector_size(16), aligned(8), may_alias));
    while (word + 8 <= end) {
        const pair *v = (const pair *)&words[word];
        pair sum = (v[0] | v[1]) | (v[2] | v[3]);
        if (sum[0] | sum[1])
            break;
        word += 8;
    }
    while (word < end && __atomic_load_n(&words[word], __ATOMIC_RELAXED) == 0)
        word++;
    return word;
}

/* Words harvested at once. */
#define BLOCK 512

/* The run of set bits that begins with the lowest one: where it ends. */
static inline unsigned run_end(uint64_t bits, uint64_t *rest)
{
    uint64_t carried = bits + (bits & -bits);
    *rest = bits & carried;
    return carried ? (unsigned)__builtin_ctzll(carried) : 64;
}

/* A place to write ranges at, and where the last one ended, for what adjoins it. */
struct ranges {
    uint64_t *to;
    uint64_t behind;
    uint32_t shift;
};

/* The runs of a word, whatever they are. */
static void put_runs(struct ranges *ranges, uint64_t position, uint64_t bits)
{
    while (bits != 0) {
        uint64_t rest, start = position + (unsigned)__builtin_ctzll(bits);
        uint64_t stop = position + run_end(bits, &rest);
        if (start == ranges->behind) {
            ranges->to[-1] += (stop - start) << ranges->shift;
        } else {
            *ranges->to++ = start << ranges->shift;
            *ranges->to++ = (stop - start) << ranges->shift;
        }
        ranges->behind = stop;
        bits = rest;
    }
}

#define LOWEST 1ULL
#define HIGHEST (1ULL << 63)

/* Take the words of a block that are not 0, and turn them into ranges.
 *
 * Where dirty pages lie at random, single bits as a rule, what costs is the exchange of each word
 * and branches that nobody can predict. So single bits have a way of their own, which writes two
 * ranges whatever there is and then counts those that are: a word of one bit and one of two take the
 * same way. It is short enough to run while the processor does the next exchange. */
static void put_words(struct ranges *ranges, uint64_t *words, uint64_t word, const uint16_t *which,
                      unsigned found, int take)
{
    uint64_t *to = ranges->to, page = 1ULL << ranges->shift;
    uint32_t shift = ranges->shift;
    for (unsigned i = 0; i < found; i++) {
        uint64_t *from = &words[word + which[i]], position = 64 * (word + which[i]);
        __builtin_prefetch(from + BLOCK, 1); /* it may lie past the end: that is no access */
        uint64_t bits = take ? __atomic_exchange_n(from, 0, __ATOMIC_SEQ_CST)
                             : __atomic_load_n(from, __ATOMIC_ACQUIRE);
        /* Runs, what may adjoin another word's, and what somebody else took meanwhile. */
        if (bits == 0 || (bits & (bits >> 1 | HIGHEST | LOWEST)) != 0) {
            ranges->to = to;
            put_runs(ranges, position, bits);
            to = ranges->to;
            continue;
        }
        uint64_t rest = bits & (bits - 1), more = rest != 0;
        __asm__("" : "+r"(more)); /* a number to add, which compilers would make a branch again */
        to[0] = (position + (unsigned)__builtin_ctzll(bits)) << shift;
        to[1] = page;
        to[2] = (position + (unsigned)__builtin_ctzll(rest | HIGHEST)) << shift;
        to[3] = page;
        to += 2 + 2 * more;
        for (rest &= rest - 1; rest != 0; rest &= rest - 1) {
            *to++ = (position + (unsigned)__builtin_ctzll(rest)) << shift;
            *to++ = page;
        }
    }
    ranges->to = to;
}

uint64_t vmm_bitmap_harvest(struct vmm_bitmap *bitmap, uint64_t first, uint64_t end, int take,
                            uint64_t *pairs, uint64_t capacity, uint64_t *next)
{
    uint64_t total = (bitmap->bits + 63) / 64, word = first;
    uint64_t *words = bitmap->words;
    struct ranges ranges = {pairs, UINT64_MAX, bitmap->page_shift};
    if (end > total)
        end = total;
    while ((word = skip(words, word, end)) < end) {
        /* A word has 32 runs at most. */
        uint64_t room = (capacity - (uint64_t)(ranges.to - pairs) / 2) / 32;
        uint64_t block = end - word < BLOCK ? end - word : BLOCK;
        if (room < block)
            block = room;
        if (block == 0)
            break;
        uint16_t which[BLOCK];
        unsigned found = 0;
        for (unsigned i = 0; i < block; i++) { /* without a branch */
            which[found] = (uint16_t)i;
            found += __atomic_load_n(&words[word + i], __ATOMIC_RELAXED) != 0;
        }
        put_words(&ranges, words, word, which, found, take);
        word += block;
    }
    uint64_t count = (uint64_t)(ranges.to - pairs) / 2;
    /* The last page may be a part of one. */
    if (count != 0 && bitmap->size - pairs[2 * count - 2] < pairs[2 * count - 1])
        pairs[2 * count - 1] = bitmap->size - pairs[2 * count - 2];
    *next = word;
    return count;
}

void vmm_bitmap_take(struct vmm_bitmap *bitmap, uint64_t first, uint64_t end, uint64_t *words)
{
    uint64_t total = (bitmap->bits + 63) / 64;
    for (uint64_t word = first; word < end && word < total; word++)
        words[word - first] =
            __atomic_load_n(&bitmap->words[word], __ATOMIC_RELAXED)
                ? __atomic_exchange_n(&bitmap->words[word], 0, __ATOMIC_SEQ_CST)
                : 0;
}
