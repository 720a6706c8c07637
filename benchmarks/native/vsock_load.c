/* A guest's end of `benchmarks/vsock.py`: `vsock_load send|receive PORT BYTES` moves so many bytes over
 * one stream to the host, which answers with one byte behind the last, or from it. Linked statically:
 * the guest has no libraries. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <linux/vm_sockets.h>
#include <unistd.h>

static char data[1 << 16];

static void die(const char *what)
{
    perror(what);
    exit(1);
}

int main(int argc, char **argv)
{
    if (argc != 4)
        return 2;
    struct sockaddr_vm host = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST,
                               .svm_port = (unsigned)atoi(argv[2])};
    uint64_t left = strtoull(argv[3], NULL, 10);
    int stream = socket(AF_VSOCK, SOCK_STREAM, 0);
    if (stream < 0 || connect(stream, (struct sockaddr *)&host, sizeof host) < 0)
        die("connect");
    if (strcmp(argv[1], "send") == 0) {
        while (left != 0) {
            ssize_t sent = write(stream, data, left < sizeof data ? left : sizeof data);
            if (sent < 0)
                die("write");
            left -= (uint64_t)sent;
        }
        if (shutdown(stream, SHUT_WR) < 0 || read(stream, data, 1) != 1)
            die("the answer");
        return 0;
    }
    if (write(stream, &left, sizeof left) != sizeof left)
        die("the wish");
    while (left != 0) {
        ssize_t got = read(stream, data, sizeof data);
        if (got <= 0)
            die("read");
        left -= (uint64_t)got;
    }
    return 0;
}
