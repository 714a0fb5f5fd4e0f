/* Preloaded into a process: logs its operations on the files under SHIM_DIRECTORY and its output on stdout,
 * in order.
 *
 * Log record: op (1 byte), length of path (u16), offset (u64), length of data (u32), path, data.
 *   C path                 created
 *   W path offset data     written
 *   T path offset          cut to `offset` bytes
 *   S path                 fsync (of a file or a directory)
 *   U path                 unlinked
 *   A data                 written to stdout
 *
 * An operation and its record share one lock, so the log has the order in which the operations happened.
 * Memory maps are not seen: SQLite maps only its -shm file, which it rebuilds after a crash.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int log_file = -1;
static const char *directory;

__attribute__((constructor)) static void begin(void) {
    directory = getenv("SHIM_DIRECTORY");
    log_file = syscall(SYS_openat, AT_FDCWD, getenv("SHIM_LOG"), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (!directory || log_file < 0) abort();
}

static int is_ours(const char *path) { return path && !strncmp(path, directory, strlen(directory)); }

static int path_of(int file, char *path) {
    char link[64] = "/proc/self/fd/";
    char digits[16];
    int num_digits = 0, rest = file;
    do digits[num_digits++] = '0' + rest % 10; while (rest /= 10);
    char *end = link + strlen(link);
    while (num_digits) *end++ = digits[--num_digits];
    *end = 0;
    ssize_t length = readlink(link, path, 4095);
    path[length < 0 ? 0 : length] = 0;
    return length >= 0 && is_ours(path);
}

static void put(char op, const char *path, uint64_t offset, const void *data, uint32_t num_bytes) {
    uint16_t path_bytes = strlen(path);
    char head[15];
    head[0] = op;
    memcpy(head + 1, &path_bytes, 2);
    memcpy(head + 3, &offset, 8);
    memcpy(head + 11, &num_bytes, 4);
    struct iovec parts[] = {{head, 15}, {(void *)path, path_bytes}, {(void *)data, num_bytes}};
    if (syscall(SYS_writev, log_file, parts, 3) != 15 + path_bytes + (ssize_t)num_bytes) abort();
}

static off_t place_of(int file) {
    struct stat facts;
    if ((fcntl(file, F_GETFL) & O_APPEND) && !fstat(file, &facts)) return facts.st_size;
    return lseek(file, 0, SEEK_CUR);
}

static ssize_t put_written(int file, const void *data, size_t num_bytes, off_t offset, int is_placed) {
    char path[4096];
    int is_file = path_of(file, path);
    pthread_mutex_lock(&lock);
    if (is_file && !is_placed) offset = place_of(file);
    ssize_t done = is_placed ? syscall(SYS_pwrite64, file, data, num_bytes, offset) : syscall(SYS_write, file, data, num_bytes);
    int error = errno;
    if (done > 0 && is_file) put('W', path, offset, data, done);
    if (done > 0 && file == 1) put('A', "", 0, data, done);
    pthread_mutex_unlock(&lock);
    errno = error;
    return done;
}

ssize_t write(int file, const void *data, size_t num_bytes) { return put_written(file, data, num_bytes, 0, 0); }
ssize_t pwrite(int file, const void *data, size_t num_bytes, off_t offset) { return put_written(file, data, num_bytes, offset, 1); }
ssize_t pwrite64(int file, const void *data, size_t num_bytes, off_t offset) { return put_written(file, data, num_bytes, offset, 1); }

ssize_t writev(int file, const struct iovec *parts, int num_parts) {
    size_t num_bytes = 0;
    for (int i = 0; i < num_parts; i++) num_bytes += parts[i].iov_len;
    char *whole = malloc(num_bytes ? num_bytes : 1), *end = whole;
    for (int i = 0; i < num_parts; i++) end = mempcpy(end, parts[i].iov_base, parts[i].iov_len);
    ssize_t done = put_written(file, whole, num_bytes, 0, 0);
    free(whole);
    return done;
}

static int put_synced(int file, long number) {
    char path[4096];
    int is_file = path_of(file, path);
    pthread_mutex_lock(&lock);
    int result = syscall(number, file), error = errno;
    if (!result && is_file) put('S', path, 0, "", 0);
    pthread_mutex_unlock(&lock);
    errno = error;
    return result;
}

int fsync(int file) { return put_synced(file, SYS_fsync); }
int fdatasync(int file) { return put_synced(file, SYS_fdatasync); }

static int put_cut(int file, off_t num_bytes) {
    char path[4096];
    int is_file = path_of(file, path);
    pthread_mutex_lock(&lock);
    int result = syscall(SYS_ftruncate, file, num_bytes), error = errno;
    if (!result && is_file) put('T', path, num_bytes, "", 0);
    pthread_mutex_unlock(&lock);
    errno = error;
    return result;
}

int ftruncate(int file, off_t num_bytes) { return put_cut(file, num_bytes); }
int ftruncate64(int file, off_t num_bytes) { return put_cut(file, num_bytes); }

int unlink(const char *path) {
    pthread_mutex_lock(&lock);
    int result = syscall(SYS_unlink, path), error = errno;
    if (!result && is_ours(path)) put('U', path, 0, "", 0);
    pthread_mutex_unlock(&lock);
    errno = error;
    return result;
}

static int put_opened(const char *path, int flags, mode_t mode) {
    struct stat facts;
    pthread_mutex_lock(&lock);
    int is_new = (flags & O_CREAT) && is_ours(path) && stat(path, &facts);
    int file = syscall(SYS_openat, AT_FDCWD, path, flags, mode), error = errno;
    if (file >= 0 && is_new) put('C', path, 0, "", 0);
    if (file >= 0 && !is_new && (flags & O_TRUNC) && is_ours(path)) put('T', path, 0, "", 0);
    pthread_mutex_unlock(&lock);
    errno = error;
    return file;
}

#define OPEN(name)                                  \
    int name(const char *path, int flags, ...) {    \
        va_list rest;                               \
        va_start(rest, flags);                      \
        mode_t mode = va_arg(rest, mode_t);         \
        va_end(rest);                               \
        return put_opened(path, flags, mode);       \
    }
OPEN(open)
OPEN(open64)
