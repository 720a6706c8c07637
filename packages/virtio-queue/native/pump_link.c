/* Frames over the kinds of links: a tap, datagrams, a stream; and which of them a driver wants. */

#include "pump.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { HEADER = 12, ETHERNET_HEADER = 14, MOST = VP_FRAME - HEADER, LENGTH = 4 };

/* --- to the guest --- */

/* The next frame in what was received of a stream: its length, 0 when it is not whole, or -errno. */
static int64_t cut(struct vp_net *net)
{
    const uint8_t *at = net->received + net->start;
    uint32_t have = net->end - net->start;
    if (have < LENGTH)
        return 0;
    uint32_t length = (uint32_t)at[0] << 24 | (uint32_t)at[1] << 16 | (uint32_t)at[2] << 8 | at[3];
    if (length > MOST)
        return -EPROTO;
    if (have - LENGTH < length)
        return 0;
    memcpy(net->frame + HEADER, at + LENGTH, length);
    net->start += LENGTH + length;
    return HEADER + (int64_t)length;
}

/* Bytes into what was received: how many, or -errno. */
static int64_t fetch(struct vp_net *net)
{
    memmove(net->received, net->received + net->start, net->end - net->start);
    net->end -= net->start;
    net->start = 0;
    ssize_t got = recv(net->fd, net->received + net->end, VP_RECEIVED - net->end, MSG_DONTWAIT);
    if (got <= 0)
        return got < 0 ? -errno : -ECONNRESET;
    net->end += (uint32_t)got;
    return got;
}

static int64_t receive_once(struct vp_net *net)
{
    ssize_t got;
    int64_t length;
    switch (net->link) {
    case VP_TAP:
        got = read(net->fd, net->frame, VP_FRAME);
        return got < 0 ? -errno : got == 0 ? -ENODEV : got;
    case VP_DATAGRAMS:
        got = recv(net->fd, net->frame + HEADER, MOST, MSG_DONTWAIT | MSG_TRUNC);
        return got < 0 ? -errno : HEADER + got;
    default: /* VP_STREAM */
        length = cut(net);
        if (length != 0)
            return length;
        length = fetch(net);
        return length < 0 ? length : -EINTR;
    }
}

int64_t vp_link_receive(struct vp_net *net, struct vp_counters *counters)
{
    for (;;) {
        int64_t length = receive_once(net);
        if (length == -EINTR)
            continue;
        if (length == -EAGAIN)
            return 0;
        /* The other end of datagrams went; it may come again. */
        if (net->link == VP_DATAGRAMS && (length == -ECONNRESET || length == -ECONNREFUSED))
            continue;
        if (length < 0)
            return length;
        if (net->link != VP_TAP)
            memset(net->frame, 0, HEADER);
        if (length < HEADER + ETHERNET_HEADER)
            counters->dropped_short++;
        else if (length > HEADER + MOST)
            counters->dropped_long++;
        else
            return length;
    }
}

/* --- from the guest --- */

static int send_datagram(const struct vp_net *net, const struct iovec *pieces, int count)
{
    struct msghdr message = {.msg_iov = (struct iovec *)pieces, .msg_iovlen = (size_t)count};
    return sendmsg(net->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL) < 0 ? -errno : 0;
}

static int is_away(int error)
{
    return error == -ENOENT || error == -ECONNREFUSED || error == -ENOTCONN ||
           error == -ECONNRESET || error == -EDESTADDRREQ;
}

/* Keep what the stream did not take of a frame. */
static void keep(struct vp_net *net, const struct iovec *pieces, int count, uint64_t sent)
{
    net->unsent_start = net->unsent_end = 0;
    for (int i = 0; i < count; i++) {
        uint64_t length = pieces[i].iov_len, cut = length < sent ? length : sent;
        memcpy(net->unsent + net->unsent_end, (uint8_t *)pieces[i].iov_base + cut, length - cut);
        net->unsent_end += (uint32_t)(length - cut);
        sent -= cut;
    }
}

int vp_link_flush(struct vp_net *net)
{
    while (net->unsent_start != net->unsent_end) {
        ssize_t sent = send(net->fd, net->unsent + net->unsent_start,
                            net->unsent_end - net->unsent_start, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent < 0 && errno == EAGAIN)
            return -EAGAIN;
        if (sent < 0 && errno != EINTR)
            sent = net->unsent_end - net->unsent_start; /* nobody will read it; the next one says so */
        if (sent > 0)
            net->unsent_start += (uint32_t)sent;
    }
    return 0;
}

static int send_once(struct vp_net *net, struct iovec *pieces, int count, uint64_t size,
                     struct vp_counters *counters)
{
    int error;
    ssize_t sent;
    uint8_t length[LENGTH] = {(uint8_t)(size >> 24), (uint8_t)(size >> 16), (uint8_t)(size >> 8),
                              (uint8_t)size};
    switch (net->link) {
    case VP_TAP:
        return writev(net->fd, pieces, count) < 0 ? -errno : 0;
    case VP_DATAGRAMS:
        error = send_datagram(net, pieces + 1, count - 1);
        /* Connected, so that the kernel says when the other end has room. */
        if (is_away(error) &&
            connect(net->fd, (const struct sockaddr *)net->peer, net->peer_length) == 0)
            error = send_datagram(net, pieces + 1, count - 1);
        if (!is_away(error))
            return error;
        counters->dropped_away++;
        return 0;
    default: /* VP_STREAM */
        pieces[0] = (struct iovec){length, LENGTH};
        struct msghdr message = {.msg_iov = pieces, .msg_iovlen = (size_t)count};
        sent = sendmsg(net->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent < 0)
            return -errno;
        keep(net, pieces, count, (uint64_t)sent);
        return 0;
    }
}

int vp_link_send(struct vp_net *net, struct iovec *pieces, int count, uint64_t size,
                 struct vp_counters *counters)
{
    int error = vp_link_flush(net);
    if (error != 0)
        return error;
    do {
        error = send_once(net, pieces, count, size, counters);
    } while (error == -EINTR);
    return error;
}

/* --- the filter --- */

/* Bits of the modes, and the tag of a VLAN. */
enum { PROMISC = 1, ALLMULTI = 2, ALLUNI = 4, NOMULTI = 8, NOUNI = 16, NOBCAST = 32 };
enum { TYPE = 12, TAG = 14, TAGGED = 16 };

static int is_among(const uint8_t (*table)[6], uint32_t count, const uint8_t *address)
{
    for (uint32_t i = 0; i < count; i++)
        if (memcmp(table[i], address, 6) == 0)
            return 1;
    return 0;
}

int vp_link_wants(const struct vp_filter *filter, const uint8_t *frame, uint64_t size)
{
    static const uint8_t broadcast[6] = {0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF};
    uint32_t modes = filter->modes;
    if (!filter->active || modes & PROMISC)
        return 1;
    if (size >= TAGGED && frame[TYPE] == 0x81 && frame[TYPE + 1] == 0) {
        unsigned vlan = (frame[TAG] & 0xFu) << 8 | frame[TAG + 1];
        if (!(filter->vlans[vlan / 8] >> vlan % 8 & 1))
            return 0;
    }
    if (memcmp(frame, broadcast, 6) == 0)
        return !(modes & NOBCAST);
    if (frame[0] & 1)
        return !(modes & NOMULTI) &&
               (modes & ALLMULTI || is_among(filter->multicast, filter->multicast_count, frame));
    return !(modes & NOUNI) &&
           (modes & ALLUNI || memcmp(filter->mac, frame, 6) == 0 ||
            is_among(filter->unicast, filter->unicast_count, frame));
}
