/* Rate limits: token buckets that threads share and Python changes while they run. */

#include "pump.h"

#include <stdlib.h>

struct vp_limiter *vp_limiter_new(void)
{
    struct vp_limiter *limiter = calloc(1, sizeof *limiter);
    if (limiter != NULL)
        pthread_mutex_init(&limiter->lock, NULL);
    return limiter;
}

void vp_limiter_free(struct vp_limiter *limiter)
{
    pthread_mutex_destroy(&limiter->lock);
    free(limiter);
}

void vp_limiter_set(struct vp_limiter *limiter, int which, uint64_t size, uint64_t refill,
                    uint64_t burst, uint64_t now)
{
    struct vp_bucket bucket = {size, refill, burst, (int64_t)size, now};
    pthread_mutex_lock(&limiter->lock);
    *(which ? &limiter->operations : &limiter->bytes) = bucket;
    pthread_mutex_unlock(&limiter->lock);
}

/* Put in what has come back; returns the nanoseconds until there is a token. */
static uint64_t refill(struct vp_bucket *bucket, uint64_t now)
{
    if (bucket->size == 0 || bucket->burst != 0)
        return 0;
    unsigned __int128 elapsed = now > bucket->last ? now - bucket->last : 0;
    uint64_t missing = (uint64_t)((int64_t)bucket->size - bucket->budget);
    unsigned __int128 tokens = elapsed * bucket->size / bucket->refill;
    if (tokens >= missing) {
        bucket->budget = (int64_t)bucket->size;
        bucket->last = now;
    } else {
        /* Only whole tokens are taken out of the time, so that nothing is lost to rounding. */
        bucket->budget += (int64_t)tokens;
        bucket->last += (uint64_t)((tokens * bucket->refill + bucket->size - 1) / bucket->size);
    }
    if (bucket->budget > 0)
        return 0;
    unsigned __int128 needed = (unsigned __int128)(1 - bucket->budget) * bucket->refill;
    uint64_t wait = (uint64_t)((needed + bucket->size - 1) / bucket->size);
    uint64_t passed = now > bucket->last ? now - bucket->last : 0; /* another thread's is later */
    return wait > passed ? wait - passed : 1;
}

static void spend(struct vp_bucket *bucket, uint64_t tokens)
{
    uint64_t burst = tokens < bucket->burst ? tokens : bucket->burst;
    bucket->burst -= burst;
    if (bucket->size != 0)
        bucket->budget -= (int64_t)(tokens - burst);
}

uint64_t vp_limiter_take(struct vp_limiter *limiter, uint64_t bytes, uint64_t now)
{
    pthread_mutex_lock(&limiter->lock);
    uint64_t wait = bytes != 0 ? refill(&limiter->bytes, now) : 0;
    uint64_t other = refill(&limiter->operations, now);
    if (other > wait)
        wait = other;
    if (wait == 0) {
        spend(&limiter->bytes, bytes);
        spend(&limiter->operations, 1);
    }
    pthread_mutex_unlock(&limiter->lock);
    return wait;
}
