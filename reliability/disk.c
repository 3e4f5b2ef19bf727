/* Preloaded into a gateway: its store's disk is slow, or has become read-only, as the control file
   says at that moment. The file is three 32-bit numbers: milliseconds that each sync takes, those that
   each write takes, and the errno that writes and syncs fail with (0: none). */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

struct control { int32_t sync_ms, write_ms, fails_with; };

static struct control *control(void) {
    static struct control *found;
    if (!found) {
        const char *path = getenv("RELIABILITY_DISK_CONTROL");
        int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
        void *map = fd < 0 ? MAP_FAILED : mmap(0, sizeof(struct control), PROT_READ, MAP_SHARED, fd, 0);
        static struct control none;
        found = map == MAP_FAILED ? &none : map;
    }
    return found;
}

static int in_store(int fd) {
    char link[64], path[PATH_MAX];
    const char *store = getenv("RELIABILITY_DISK_STORE");
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    return store && size > 0 && (size_t)size >= strlen(store) && !memcmp(path, store, strlen(store));
}

/* 0, or -1 with errno set. */
static int suffer(int fd, int32_t ms) {
    struct control *now = control();
    if ((!ms && !now->fails_with) || !in_store(fd)) return 0;
    struct timespec pause = {ms / 1000, (ms % 1000) * 1000000L};
    if (ms) nanosleep(&pause, 0);
    if (now->fails_with) { errno = now->fails_with; return -1; }
    return 0;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

int fsync(int fd) { return suffer(fd, control()->sync_ms) ? -1 : REAL(fsync)(fd); }
int fdatasync(int fd) { return suffer(fd, control()->sync_ms) ? -1 : REAL(fdatasync)(fd); }
int ftruncate(int fd, off_t size) { return suffer(fd, 0) ? -1 : REAL(ftruncate)(fd, size); }
int ftruncate64(int fd, off64_t size) { return suffer(fd, 0) ? -1 : REAL(ftruncate64)(fd, size); }
ssize_t write(int fd, const void *data, size_t size) {
    return suffer(fd, control()->write_ms) ? -1 : REAL(write)(fd, data, size);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    return suffer(fd, control()->write_ms) ? -1 : REAL(pwrite)(fd, data, size, at);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    return suffer(fd, control()->write_ms) ? -1 : REAL(pwrite64)(fd, data, size, at);
}
