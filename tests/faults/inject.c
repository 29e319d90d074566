/* Faults at chosen calls to the file system, by LD_PRELOAD: cc -shared -fPIC -O1 inject.c -o inject.so -ldl

   FAULT_ROOT   the folder below which calls count
   FAULT_ON     the kinds that count, with commas between them: open (for writing), write, fsync, rename, symlink,
                link, unlink, mkdir, truncate; all without it
   FAULT_AT     the number of the call, from 1, at which FAULT_DO begins; 0: at none, which counts them
   FAULT_DO     kill (before the call), kill-after, torn (half of a write, then kill), short (half of a write),
                enospc, eio, erofs (until the end), clock (the wall clock jumps by FAULT_CLOCK seconds, at that call)
   FAULT_COUNT  for how many calls an error lasts: 1 without it, 0 until the end
   FAULT_LOG    a file that gets a line for each: number, kind, path, bytes of a write

   fault_plan() sets the same from within a process, such as a fork of one that was preloaded. What C's and C++'s own
   streams write, and what is written through mapped memory, goes past these functions. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { OPEN, WRITE, FSYNC, RENAME, SYMLINK, LINK, UNLINK, MKDIR, TRUNCATE, KINDS };
static const char *kind_names[KINDS] = {"open",   "write", "fsync", "rename",  "symlink",
                                        "link", "unlink", "mkdir", "truncate"};
enum { NOTHING, KILL, KILL_AFTER, TORN, SHORT, ENOSPC_, EIO_, EROFS_, CLOCK, DEEDS };
static const char *deed_names[DEEDS] = {"", "kill", "kill-after", "torn", "short", "enospc", "eio", "erofs", "clock"};

#define FDS 65536
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char root[PATH_MAX], *names[FDS]; /* names: of the open files below root */
static long at, lasts, events;
static unsigned on;
static int deed, log_fd = -1;
static double jump, jumped;

/* get_NAME() is the function that the next library has. */
#define REAL(result, name, ...)                                         \
    static result (*real_##name)(__VA_ARGS__);                          \
    static result (*get_##name(void))(__VA_ARGS__) {                    \
        if (!real_##name) *(void **)&real_##name = dlsym(RTLD_NEXT, #name); \
        return real_##name;                                             \
    }

REAL(int, openat, int, const char *, int, ...)
REAL(int, close, int)
REAL(ssize_t, write, int, const void *, size_t)
REAL(ssize_t, pwrite, int, const void *, size_t, off_t)
REAL(ssize_t, writev, int, const struct iovec *, int)
REAL(ssize_t, sendfile, int, int, off_t *, size_t)
REAL(ssize_t, copy_file_range, int, off_t *, int, off_t *, size_t, unsigned)
REAL(int, fsync, int)
REAL(int, fdatasync, int)
REAL(int, renameat2, int, const char *, int, const char *, unsigned)
REAL(int, symlinkat, const char *, int, const char *)
REAL(int, linkat, int, const char *, int, const char *, int)
REAL(int, unlinkat, int, const char *, int)
REAL(int, mkdirat, int, const char *, mode_t)
REAL(int, ftruncate, int, off_t)
REAL(int, truncate, const char *, off_t)
REAL(int, clock_gettime, clockid_t, struct timespec *)

void fault_plan(const char *below, long number, const char *kinds, const char *what, long count, double seconds,
                const char *log) {
    pthread_mutex_lock(&lock);
    if (log_fd >= 0) syscall(SYS_close, log_fd);
    log_fd = log && *log ? (int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666) : -1;
    if (!below || !realpath(below, root)) root[0] = 0;
    events = 0, jumped = 0;
    at = number, lasts = count, jump = seconds, deed = NOTHING, on = 0;
    for (int i = 1; i < DEEDS; i++)
        if (what && !strcmp(what, deed_names[i])) deed = i;
    for (int i = 0; i < KINDS; i++)
        if (!kinds || !*kinds || strstr(kinds, kind_names[i])) on |= 1u << i;
    pthread_mutex_unlock(&lock);
}

long fault_events(void) { return events; }

static long number_of(const char *name, long otherwise) {
    const char *text = getenv(name);
    return text ? atol(text) : otherwise;
}

__attribute__((constructor)) static void from_environment(void) {
    const char *seconds = getenv("FAULT_CLOCK");
    if (getenv("FAULT_ROOT"))
        fault_plan(getenv("FAULT_ROOT"), number_of("FAULT_AT", 0), getenv("FAULT_ON"), getenv("FAULT_DO"),
                   number_of("FAULT_COUNT", 1), seconds ? atof(seconds) : 0, getenv("FAULT_LOG"));
}

/* Whether a path is root or below it; its absolute form goes into `full`. */
static int below(int folder, const char *path, char *full) {
    char base[PATH_MAX];
    if (!root[0] || !path) return 0;
    if (path[0] == '/') {
        snprintf(full, PATH_MAX, "%s", path);
    } else {
        if (folder == AT_FDCWD) {
            if (!getcwd(base, sizeof base)) return 0;
        } else {
            char link[64];
            snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
            ssize_t length = readlink(link, base, sizeof base - 1);
            if (length < 0) return 0;
            base[length] = 0;
        }
        if (snprintf(full, PATH_MAX, "%s/%s", base, path) >= PATH_MAX) return 0;
    }
    size_t length = strlen(root);
    return !strncmp(full, root, length) && (!full[length] || full[length] == '/');
}

static const char *name_of(int fd) { return fd >= 0 && fd < FDS ? names[fd] : NULL; }

/* Counts a call. What is to happen to it; kills before it where that is asked. */
static int event(int kind, const char *path, long size) {
    int what = NOTHING, errors;
    pthread_mutex_lock(&lock);
    if (on & (1u << kind)) {
        events++;
        if (log_fd >= 0) {
            char line[3 * PATH_MAX + 100];
            int length = snprintf(line, sizeof line, "%ld %s %s %ld\n", events, kind_names[kind], path, size);
            syscall(SYS_write, log_fd, line, length);
        }
        errors = deed == ENOSPC_ || deed == EIO_ || deed == EROFS_ || deed == SHORT;
        if (at && events >= at && (events == at || (errors && (deed == EROFS_ || !lasts || events < at + lasts))))
            what = deed;
        if (what == CLOCK) jumped += jump;
    }
    pthread_mutex_unlock(&lock);
    if (what == KILL) kill(getpid(), SIGKILL);
    return what;
}

/* Whether a call fails; errno says how. A full disk lets names and bytes go. */
static int fails(int what, int kind) {
    if (what == ENOSPC_ && kind != UNLINK && kind != TRUNCATE) return errno = ENOSPC, 1;
    if (what == EIO_) return errno = EIO, 1;
    if (what == EROFS_ && kind != FSYNC) return errno = EROFS, 1;
    return 0;
}

static void after(int what) {
    if (what == KILL_AFTER || what == TORN) kill(getpid(), SIGKILL);
}

/* The rest of a function: counts the call, fails, or makes it. */
#define COUNTED(result, kind, path, size, call)    \
    int what = event(kind, path, size);            \
    if (fails(what, kind)) return -1;              \
    result done = call;                            \
    int error = errno;                             \
    after(what);                                   \
    errno = error;                                 \
    return done;

static int opened(int folder, const char *path, int flags, mode_t mode) {
    char full[PATH_MAX];
    int ours = below(folder, path, full), what = NOTHING;
    if (ours && (flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC))) {
        what = event(OPEN, full, 0);
        if (fails(what, OPEN)) return -1;
    }
    int fd = get_openat()(folder, path, flags, mode), error = errno;
    after(what);
    if (fd >= 0 && fd < FDS) {
        pthread_mutex_lock(&lock);
        free(names[fd]);
        names[fd] = ours ? strdup(full) : NULL;
        pthread_mutex_unlock(&lock);
    }
    errno = error;
    return fd;
}

#define MODE                                \
    mode_t mode = 0;                        \
    if (flags & (O_CREAT | __O_TMPFILE)) {  \
        va_list rest;                       \
        va_start(rest, flags);              \
        mode = va_arg(rest, int);           \
        va_end(rest);                       \
    }
int open(const char *path, int flags, ...) { MODE return opened(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE return opened(AT_FDCWD, path, flags, mode); }
int openat(int folder, const char *path, int flags, ...) { MODE return opened(folder, path, flags, mode); }
int openat64(int folder, const char *path, int flags, ...) { MODE return opened(folder, path, flags, mode); }
int __open_2(const char *path, int flags) { return opened(AT_FDCWD, path, flags, 0); }
int __open64_2(const char *path, int flags) { return opened(AT_FDCWD, path, flags, 0); }
int creat(const char *path, mode_t mode) { return opened(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }

int close(int fd) {
    if (name_of(fd)) {
        pthread_mutex_lock(&lock);
        free(names[fd]);
        names[fd] = NULL;
        pthread_mutex_unlock(&lock);
    }
    return get_close()(fd);
}

static size_t part(int what, size_t size) { return (what == SHORT || what == TORN) && size > 1 ? size / 2 : size; }

#define WRITES(size, unseen, call)                      \
    if (!name_of(fd)) return unseen;                    \
    size_t whole = size;                                \
    int what = event(WRITE, name_of(fd), (long)whole);  \
    if (fails(what, WRITE)) return -1;                  \
    size_t count = part(what, whole);                   \
    ssize_t done = call;                                \
    int error = errno;                                  \
    after(what);                                        \
    errno = error;                                      \
    return done;
ssize_t write(int fd, const void *data, size_t size) {
    WRITES(size, get_write()(fd, data, size), get_write()(fd, data, count))
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) {
    WRITES(size, get_pwrite()(fd, data, size, offset), get_pwrite()(fd, data, count, offset))
}
ssize_t pwrite64(int fd, const void *data, size_t size, off_t offset) { return pwrite(fd, data, size, offset); }
ssize_t writev(int fd, const struct iovec *parts, int number) { /* half of it: of its first part */
    WRITES(parts[0].iov_len, get_writev()(fd, parts, number),
           count < whole ? get_write()(fd, parts[0].iov_base, count) : get_writev()(fd, parts, number))
}
/* A copy asks for more than there is. */
static size_t rest_of(int from, size_t size) {
    struct stat file;
    return !fstat(from, &file) && S_ISREG(file.st_mode) && (size_t)file.st_size < size ? (size_t)file.st_size : size;
}
ssize_t sendfile(int fd, int from, off_t *offset, size_t size) {
    size = rest_of(from, size);
    WRITES(size, get_sendfile()(fd, from, offset, size), get_sendfile()(fd, from, offset, count))
}
ssize_t sendfile64(int fd, int from, off_t *offset, size_t size) { return sendfile(fd, from, offset, size); }
ssize_t copy_file_range(int from, off_t *start, int fd, off_t *offset, size_t size, unsigned flags) {
    size = rest_of(from, size);
    WRITES(size, get_copy_file_range()(from, start, fd, offset, size, flags),
           get_copy_file_range()(from, start, fd, offset, count, flags))
}

int fsync(int fd) {
    if (!name_of(fd)) return get_fsync()(fd);
    COUNTED(int, FSYNC, name_of(fd), 0, get_fsync()(fd))
}
int fdatasync(int fd) {
    if (!name_of(fd)) return get_fdatasync()(fd);
    COUNTED(int, FSYNC, name_of(fd), 0, get_fdatasync()(fd))
}
int ftruncate(int fd, off_t size) {
    if (!name_of(fd)) return get_ftruncate()(fd, size);
    COUNTED(int, TRUNCATE, name_of(fd), size, get_ftruncate()(fd, size))
}
int ftruncate64(int fd, off_t size) { return ftruncate(fd, size); }
int truncate(const char *path, off_t size) {
    char full[PATH_MAX];
    if (!below(AT_FDCWD, path, full)) return get_truncate()(path, size);
    COUNTED(int, TRUNCATE, full, size, get_truncate()(path, size))
}

int renameat2(int from, const char *old, int to, const char *new, unsigned flags) {
    char source[PATH_MAX], full[PATH_MAX];
    int ours = below(from, old, source);
    if (!below(to, new, full) && !ours) return get_renameat2()(from, old, to, new, flags);
    char both[3 * PATH_MAX + 8];
    snprintf(both, sizeof both, "%s -> %s", source, full);
    COUNTED(int, RENAME, both, 0, get_renameat2()(from, old, to, new, flags))
}
int rename(const char *old, const char *new) { return renameat2(AT_FDCWD, old, AT_FDCWD, new, 0); }
int renameat(int from, const char *old, int to, const char *new) { return renameat2(from, old, to, new, 0); }

int symlinkat(const char *target, int folder, const char *path) {
    char full[PATH_MAX];
    if (!below(folder, path, full)) return get_symlinkat()(target, folder, path);
    COUNTED(int, SYMLINK, full, 0, get_symlinkat()(target, folder, path))
}
int symlink(const char *target, const char *path) { return symlinkat(target, AT_FDCWD, path); }
int linkat(int from, const char *old, int to, const char *new, int flags) {
    char full[PATH_MAX];
    if (!below(to, new, full)) return get_linkat()(from, old, to, new, flags);
    COUNTED(int, LINK, full, 0, get_linkat()(from, old, to, new, flags))
}
int link(const char *old, const char *new) { return linkat(AT_FDCWD, old, AT_FDCWD, new, 0); }
int unlinkat(int folder, const char *path, int flags) {
    char full[PATH_MAX];
    if (!below(folder, path, full)) return get_unlinkat()(folder, path, flags);
    COUNTED(int, UNLINK, full, 0, get_unlinkat()(folder, path, flags))
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }
int mkdirat(int folder, const char *path, mode_t mode) {
    char full[PATH_MAX];
    if (!below(folder, path, full)) return get_mkdirat()(folder, path, mode);
    COUNTED(int, MKDIR, full, 0, get_mkdirat()(folder, path, mode))
}
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

int clock_gettime(clockid_t clock, struct timespec *now) {
    int status = get_clock_gettime()(clock, now);
    if (!status && jumped && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += (time_t)jumped;
    return status;
}
time_t time(time_t *result) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (result) *result = now.tv_sec;
    return now.tv_sec;
}
int gettimeofday(struct timeval *result, void *zone) {
    struct timespec now;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &now);
    result->tv_sec = now.tv_sec, result->tv_usec = now.tv_nsec / 1000;
    return 0;
}
