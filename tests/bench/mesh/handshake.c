/*
 * What a captured connection costs its two ends: connect(), accept(), and asking for the original destination. One process
 * is both, so that only one thing happens at a time: a listener of the proxy in one network namespace, clients in another.
 *
 * handshake LISTENER-NETNS LISTENER-PORT CLIENT-NETNS ADDRESS PORT CLIENT-ID COUNT
 *
 * Connects to ADDRESS:PORT as user and group CLIENT-ID. Prints the port SO_ORIGINAL_DST has told (0: none), the medians of
 * connect(), accept() and getsockopt() in nanoseconds, and the processor's cycles of a whole connection at both ends,
 * from socket() to close(), with what the kernel does for it meanwhile: null if this machine's processor counts none.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <fcntl.h>
#include <linux/perf_event.h>
#include <netinet/in.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define PROXY 1337
#define ORIGINAL_DST 80 /* uapi/linux/netfilter_ipv4.h */
#define MOST 100000

static double spent[3][MOST];

static double now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1e9 + time.tv_nsec;
}

static void enter(const char *netns)
{
    int fd = open(netns, O_RDONLY | O_CLOEXEC);

    if (fd < 0 || setns(fd, CLONE_NEWNET))
        err(1, "%s", netns);
    close(fd);
}

/* Real ids too: they are what sidestep goes by, and filesystem ids, which follow the effective ones, what iptables does */
static void become(int id)
{
    if (setresuid(0, 0, 0) || setresgid(id, id, 0) || setresuid(id, id, 0))
        err(1, "user %d", id);
}

/* A counter of this process's cycles, in the kernel too; -1 if there is none, as on most virtual machines. */
static int open_cycles(void)
{
    struct perf_event_attr what = {
        .type = PERF_TYPE_HARDWARE, .size = sizeof(what), .config = PERF_COUNT_HW_CPU_CYCLES, .disabled = 1};

    return syscall(SYS_perf_event_open, &what, 0, -1, -1, PERF_FLAG_FD_CLOEXEC);
}

static int ascending(const void *left, const void *right)
{
    double difference = *(const double *)left - *(const double *)right;

    return (difference > 0) - (difference < 0);
}

static double median(double *values, int count)
{
    qsort(values, count, sizeof(*values), ascending);
    return values[count / 2];
}

static int once(int listener, const struct sockaddr_in *to, int number)
{
    struct linger reset = {1, 0};
    struct sockaddr_in original = {0};
    socklen_t length = sizeof(original);
    int client = socket(AF_INET, SOCK_STREAM, 0), accepted;
    double times[4];

    setsockopt(client, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
    times[0] = now();
    if (connect(client, (const struct sockaddr *)to, sizeof(*to)))
        err(1, "connect");
    times[1] = now();
    accepted = accept4(listener, 0, 0, SOCK_CLOEXEC);
    times[2] = now();
    if (getsockopt(accepted, SOL_IP, ORIGINAL_DST, &original, &length))
        original.sin_port = 0;
    times[3] = now();
    if (accepted < 0)
        err(1, "accept");
    for (int each = 0; each < 3; each++)
        spent[each][number] = times[each + 1] - times[each];
    close(client);
    close(accepted);
    return ntohs(original.sin_port);
}

int main(int argc, char **argv)
{
    struct sockaddr_in to = {.sin_family = AF_INET}, here = {.sin_family = AF_INET};
    int listener, told = 0, count, cycles = open_cycles(); /* while it is root */
    unsigned long long counted = 0;

    if (argc != 8 || (count = atoi(argv[7])) < 1 || count > MOST)
        errx(2, "handshake LISTENER-NETNS LISTENER-PORT CLIENT-NETNS ADDRESS PORT CLIENT-ID COUNT");
    here.sin_port = htons(atoi(argv[2]));
    to.sin_port = htons(atoi(argv[5]));
    inet_pton(AF_INET, argv[4], &to.sin_addr);
    enter(argv[1]);
    become(PROXY);
    listener = socket(AF_INET, SOCK_STREAM, 0);
    if (bind(listener, (struct sockaddr *)&here, sizeof(here)) || listen(listener, 64))
        err(1, "listen");
    become(0);
    enter(argv[3]);
    become(atoi(argv[6]));
    if (cycles >= 0)
        ioctl(cycles, PERF_EVENT_IOC_ENABLE, 0);
    for (int number = 0; number < count; number++)
        told = once(listener, &to, number);
    if (cycles >= 0 && read(cycles, &counted, sizeof(counted)) != sizeof(counted))
        err(1, "cycles");
    printf("{\"original\": %d, \"connect\": %.0f, \"accept\": %.0f, \"getsockopt\": %.0f, \"cycles\": ", told,
           median(spent[0], count), median(spent[1], count), median(spent[2], count));
    printf(cycles >= 0 ? "%llu}\n" : "null}\n", counted / count);
    return 0;
}
