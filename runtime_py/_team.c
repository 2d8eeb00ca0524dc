/* Threads that look one request up together: each copies the ids of a piece while it checks them, calls FBGEMM's operator, and
 * writes what it gives into the result. `team.py` is the only caller; it says what each address stands for and that it is there.
 *
 * None of it needs Python or its lock. A helper that has ended a job looks out for the next one for a while before it sleeps,
 * as the threads of OpenMP do: to wake a core takes as long as looking up some thousand ids.
 *
 * F features, B bags a feature, N ids, D the dimension of a feature's table. Bags have numbers in the order of their ids, from 0
 * to F * B: a piece is a range of them, so that it has as few features as possible. The operator takes some time for each.
 */

#define _GNU_SOURCE
#include "_jagged.h"
#include "_operator.h"

#include <fenv.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static const double ROUND = 0.85; /* of what is left goes out in one round of pieces */
static const double NEAR = 0.05; /* of a piece, which ends between two features where they are that near */
static const size_t KEPT_BYTES = 2 << 20; /* of a helper's memory, between two jobs */

enum { LINE = 64 }; /* bytes of a cache, which copied vectors should not straddle */
enum { LARGEST = 8 }; /* times the least work is what a piece may have */
enum { MOST_HELPERS = 1023, WRONG = -1, OVERLAP = -2 }; /* what `run` returns, as team.py names it */

typedef struct {
  void *memory;
  size_t size;
} Room;

/* What a helper is doing is one word: a job's address (to be begun), the same with RUNNING, or one of these. */
enum { ASLEEP = 0, RUNNING = 1, READY = 2, STOP = 4 };

typedef struct {
  _Alignas(64) atomic_uintptr_t word;
  pthread_mutex_t mutex; /* for sleeping only */
  pthread_cond_t news;
  pthread_t thread;
  Room room;
  struct Team *team;
} Helper;

typedef struct Team {
  pid_t process;
  int64_t helpers, spin_ns;
  Helper *helper;
  Rows rows;
  pthread_mutex_t mutex; /* for callers that wait for helpers */
  pthread_cond_t ended;
  atomic_int waiting;
} Team;

typedef enum { FINE, OUTSIDE, NO_MEMORY, FAILED } Verdict; /* outside: an id, or what the lengths add up to */

typedef struct {
  _Alignas(64) Team *team;
  const int64_t *values, *offsets, *ends; /* ids, where bags begin, and the first bag behind each piece */
  const float *weights;
  float *pooled;
  int64_t bags, pieces;
  int checks; /* ids */
  fenv_t arithmetic; /* of the caller: whether subnormal numbers are zero */
  atomic_int_fast64_t next, helped;
  atomic_int verdict, helping;
  char problem[512]; /* what the operator said */
} Job;

/* --- Pieces -------------------------------------------------------------------------------------------------------- */

#if defined(__x86_64__)
typedef float Floats __attribute__((vector_size(32), aligned(1), may_alias));

__attribute__((target("avx2"))) static void copy_vectors(const float *from, float *to, size_t count) {
  for (; count >= 16; from += 16, to += 16, count -= 16) {
    const Floats first = *(const Floats *)from, second = *(const Floats *)(from + 8);
    *(Floats *)to = first;
    *(Floats *)(to + 8) = second;
  }
  memcpy(to, from, count * sizeof *to);
}
#endif

/* From 2 KiB on glibc's memcpy is `rep movsb` where a processor calls that fast, and AMD's Zen 3 and 4 do, on which it is slow
 * unless both ends are equally aligned. */
static void copy_floats(const float *from, float *to, size_t count) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) {
    copy_vectors(from, to, count);
    return;
  }
#endif
  memcpy(to, from, count * sizeof *to);
}

/* Writes a block's rows to where they belong. Mean pooling as the graph does it: the sum times the float32 reciprocal. */
static void write_rows(const Job *job, const Block *block, const float *rows) {
  const Team *const team = job->team;
  const int64_t first = block->feature, start = team->rows.columns[first];
  const size_t width = (size_t)(team->rows.columns[first + block->features] - start);
  float *const to = job->pooled + block->bag * team->rows.width + start;
  if ((int64_t)width == team->rows.width) copy_floats(rows, to, (size_t)block->bags * width);
  else {
    for (int64_t bag = 0; bag < block->bags; ++bag) copy_floats(rows + (size_t)bag * width, to + bag * team->rows.width, width);
  }
  for (int64_t i = 0; i < block->features; ++i) {
    if (!team->rows.is_mean[first + i]) continue;
    const int64_t *const offsets = block->offsets + i * block->bags;
    const int64_t column = team->rows.columns[first + i] - start, end = team->rows.columns[first + i + 1] - start;
    for (int64_t bag = 0; bag < block->bags; ++bag) {
      const int64_t length = offsets[bag + 1] - offsets[bag];
      if (!length) continue;
      const float scale = 1.0f / (float)length;
      float *const row = to + bag * team->rows.width;
      for (int64_t i = column; i < end; ++i) row[i] *= scale;
    }
  }
}

static void *reserve(Room *room, size_t size) {
  if (room->size < size) {
    free(room->memory);
    room->memory = NULL; /* a fork may come in between */
    room->memory = aligned_alloc(LINE, (size + LINE - 1) / LINE * LINE);
    room->size = room->memory ? size : 0;
  }
  return room->memory;
}

static Verdict run_block(const Job *job, const Block *block, const int64_t *ids, int64_t count, const float *weights, int32_t *columns) {
  const Tensor pooled = look_up(&job->team->rows, block, ids, count, weights, columns);
  if (!pooled) return FAILED;
  void *rows = NULL;
  int64_t written = 0;
  const int complete = !torch.find_data(pooled, &rows) && !torch.count(pooled, &written) && rows &&
                       written == block->bags * columns[block->features];
  if (complete) write_rows(job, block, rows);
  torch.drop(pooled);
  return complete ? FINE : FAILED;
}

/* The bags from `first` to before `end`. */
static Verdict run_piece(const Job *job, int64_t first, int64_t end, Room *room) {
  const Team *const team = job->team;
  const int64_t bags = job->bags, start = job->offsets[first], count = job->offsets[end] - start;
  const size_t weights_size = job->weights ? (size_t)count * sizeof(float) : 0, columns_size = (size_t)(team->rows.features + 1) * sizeof(int32_t);
  int64_t *const ids = reserve(room, (size_t)(count + end - first + 1) * sizeof *ids + columns_size + weights_size);
  if (!ids) return NO_MEMORY;
  int64_t *const offsets = ids + count;
  int32_t *const columns = (int32_t *)(offsets + (end - first + 1));
  float *const weights = job->weights ? (float *)(columns + team->rows.features + 1) : NULL;
  for (int64_t bag = first; bag <= end; ++bag) offsets[bag - first] = job->offsets[bag] - start;
  int inside = 1;
  for (int64_t bag = first; bag < end;) {
    const int64_t feature = bag / bags, next = (feature + 1) * bags < end ? (feature + 1) * bags : end;
    const int64_t from = offsets[bag - first], taken = offsets[next - first] - from;
    inside &= copy_inside(job->values + start + from, ids + from, taken, team->rows.last[feature]);
    if (weights && team->rows.is_weighted[feature]) copy_floats(job->weights + start + from, weights + from, (size_t)taken);
    if (weights && !team->rows.is_weighted[feature]) {
      for (int64_t id = from; id < from + taken; ++id) weights[id] = 1.0f;
    }
    bag = next;
  }
  if (job->checks && !inside) return OUTSIDE;
  for (int64_t bag = first; bag < end;) { /* the rest of a feature, or whole ones, or the beginning of one */
    const int64_t feature = bag / bags, whole = bag % bags ? 0 : (end - bag) / bags;
    const int64_t rest = (feature + 1) * bags < end ? (feature + 1) * bags - bag : end - bag;
    const Block block = {feature, whole ? whole : 1, bag % bags, whole ? bags : rest, offsets + (bag - first)};
    const Verdict verdict = run_block(job, &block, ids, count, weights, columns);
    if (verdict != FINE) return verdict;
    bag += block.features * block.bags;
  }
  return FINE;
}

/* Does pieces until none is waiting, and returns how many. */
static int64_t work(Job *job, Room *room) {
  for (int64_t done = 0;; ++done) {
    if (atomic_load(&job->verdict) != FINE) return done;
    const int64_t piece = atomic_fetch_add(&job->next, 1);
    if (piece >= job->pieces) return done;
    const int64_t first = piece ? job->ends[piece - 1] : 0;
    const Verdict verdict = run_piece(job, first, job->ends[piece], room);
    int none = FINE;
    if (verdict == FINE || !atomic_compare_exchange_strong(&job->verdict, &none, (int)verdict)) continue;
    if (verdict == FAILED && torch.tell_problem) snprintf(job->problem, sizeof job->problem, ": %s", torch.tell_problem());
  }
}

/* The ids before a bag, and one more for each bag, whose result is written, too. */
static int64_t work_before(const Job *job, int64_t bag) { return job->offsets[bag] + bag; }

/* The first bag, from `first` on, that has so much work before it. */
static int64_t find_bag(const Job *job, int64_t first, int64_t target) {
  int64_t end = first, high = job->team->rows.features * job->bags;
  while (end < high) {
    const int64_t middle = end + (high - end) / 2;
    if (work_before(job, middle) < target) end = middle + 1;
    else high = middle;
  }
  return end;
}

/* Cuts a job into pieces for some threads, round by round: each gets most of its share of what is left in one piece, as every
 * piece costs some time, and the rest in smaller ones, for whoever is there first ("factoring": Hummel, Schonberg and Flynn,
 * 1992). Only those of the last round have less work than `least`. The first piece has `ahead` more. */
static void plan(Job *job, int64_t *ends, int64_t threads, int64_t least, int64_t ahead) {
  const int64_t bags = job->team->rows.features * job->bags, total = work_before(job, bags);
  double planned = (double)(ahead < total ? ahead : total), size = 0;
  int is_last = 0;
  for (int64_t turn = 0, first = 0; first < bags; ++turn) {
    if (turn % threads == 0) {
      const double share = ((double)total - planned) / (double)threads, large = ROUND * share;
      is_last = share <= (double)(2 * least);
      size = is_last ? share : large < (double)(LARGEST * least) ? large : (double)(LARGEST * least);
    }
    planned += size;
    const int64_t target = (int64_t)planned;
    int64_t end = is_last && (turn + 1) % threads == 0 ? bags : find_bag(job, first, target);
    const int64_t whole = (end + job->bags / 2) / job->bags * job->bags; /* a feature cut in two is looked up twice */
    if (whole > first && llabs(work_before(job, whole) - target) < (int64_t)(size * NEAR)) end = whole;
    if (end == first) continue;
    ends[job->pieces++] = first = end;
  }
  job->ends = ends;
}

/* --- Helpers ------------------------------------------------------------------------------------------------------- */

static int64_t now_ns(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* Spends a moment, some 20 ns, and at times gives the core to whoever else has work for it. */
static void pass_time(int64_t turn) {
  if (turn % 1024 == 1023) sched_yield();
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

/* Waits for a word that is neither READY nor ASLEEP: first awake, then asleep. */
static uintptr_t await_word(Helper *helper) {
  for (;;) {
    const int64_t deadline = now_ns() + helper->team->spin_ns;
    for (int64_t turn = 0; turn % 64 || now_ns() < deadline; ++turn) {
      const uintptr_t word = atomic_load_explicit(&helper->word, memory_order_acquire);
      if (word != READY) return word;
      pass_time(turn);
    }
    uintptr_t word = READY;
    if (!atomic_compare_exchange_strong(&helper->word, &word, ASLEEP)) return word;
    pthread_mutex_lock(&helper->mutex);
    while ((word = atomic_load(&helper->word)) == ASLEEP) pthread_cond_wait(&helper->news, &helper->mutex);
    pthread_mutex_unlock(&helper->mutex);
    if (word != READY) return word; /* else its caller has taken the job back */
  }
}

static void rouse(Helper *helper) {
  pthread_mutex_lock(&helper->mutex);
  pthread_cond_signal(&helper->news);
  pthread_mutex_unlock(&helper->mutex);
}

static void *serve(void *argument) {
  Helper *const helper = argument;
  Team *const team = helper->team;
  for (;;) {
    uintptr_t word = await_word(helper);
    if (word == STOP) return NULL;
    if (!atomic_compare_exchange_strong(&helper->word, &word, word | RUNNING)) continue;
    Job *const job = (Job *)word;
    fesetenv(&job->arithmetic);
    atomic_fetch_add(&job->helped, work(job, &helper->room));
    if (helper->room.size > KEPT_BYTES) {
      free(helper->room.memory);
      helper->room = (Room){0};
    }
    atomic_store(&helper->word, READY);
    if (atomic_fetch_sub(&job->helping, 1) == 1 && atomic_load(&team->waiting)) { /* the job may be gone from here on */
      pthread_mutex_lock(&team->mutex);
      pthread_cond_broadcast(&team->ended);
      pthread_mutex_unlock(&team->mutex);
    }
  }
}

/* Hands a job to a helper in the state `from`; says whether that was so. */
static int offer(Helper *helper, uintptr_t from, Job *job) {
  atomic_fetch_add(&job->helping, 1);
  if (!atomic_compare_exchange_strong(&helper->word, &from, (uintptr_t)job)) {
    atomic_fetch_sub(&job->helping, 1);
    return 0;
  }
  if (from == ASLEEP) rouse(helper);
  return 1;
}

/* Takes the job back from helpers that have not begun, and waits for the others. */
static void finish(Team *team, Job *job) {
  for (int64_t i = 0; i < team->helpers; ++i) {
    uintptr_t word = (uintptr_t)job;
    if (atomic_compare_exchange_strong(&team->helper[i].word, &word, READY)) atomic_fetch_sub(&job->helping, 1);
  }
  const int64_t deadline = now_ns() + team->spin_ns;
  for (int64_t turn = 0; turn % 64 || now_ns() < deadline; ++turn) {
    if (!atomic_load(&job->helping)) return;
    pass_time(turn);
  }
  atomic_fetch_add(&team->waiting, 1);
  pthread_mutex_lock(&team->mutex);
  while (atomic_load(&job->helping)) pthread_cond_wait(&team->ended, &team->mutex);
  pthread_mutex_unlock(&team->mutex);
  atomic_fetch_sub(&team->waiting, 1);
}

/* Returns the verdict on a request. */
static Verdict share_out(Team *team, Job *job, int64_t least, int64_t ahead) {
  int64_t ready = 0, asleep = 0;
  for (int64_t i = 0; i < team->helpers; ++i) {
    const uintptr_t word = atomic_load(&team->helper[i].word);
    ready += word == READY;
    asleep += word == ASLEEP;
  }
  const int64_t threads = 1 + ready + asleep, bags = team->rows.features * job->bags;
  const int64_t most = work_before(job, bags) / least + 2 * threads;
  int64_t *const ends = malloc((size_t)most * sizeof *ends);
  if (!ends) return NO_MEMORY;
  plan(job, ends, threads, least, ready || !asleep ? 0 : ahead);
  int64_t wanted = job->pieces - 1;
  for (int64_t i = 0; i < team->helpers && wanted > 0; ++i) wanted -= offer(&team->helper[i], READY, job);
  for (int64_t i = 0; i < team->helpers && wanted > 0; ++i) wanted -= offer(&team->helper[i], ASLEEP, job);
  Room room = {0};
  work(job, &room);
  finish(team, job);
  free(room.memory);
  free(ends);
  return (Verdict)atomic_load(&job->verdict);
}

/* --- What Python calls --------------------------------------------------------------------------------------------- */

static const char NAME[] = "runtime_py._team";

/* Ends the threads, where they are of this process, and frees what they have. */
static void end(Team *team, int64_t started) {
  for (int64_t i = 0; i < started; ++i) {
    Helper *const helper = &team->helper[i];
    if (team->process == getpid()) {
      atomic_store(&helper->word, STOP);
      rouse(helper);
      pthread_join(helper->thread, NULL);
    }
    free(helper->room.memory);
  }
  free(team->helper);
  free(team);
}

static void end_capsule(PyObject *capsule) {
  Team *const team = PyCapsule_GetPointer(capsule, NAME);
  end(team, team->helpers);
}

static int start_thread(Helper *helper) {
  sigset_t all, before; /* signals are for the process's other threads, but for what a thread does itself */
  sigfillset(&all);
  const int own[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT, SIGSYS};
  for (size_t i = 0; i < sizeof own / sizeof *own; ++i) sigdelset(&all, own[i]);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  const int refused = pthread_create(&helper->thread, NULL, serve, helper);
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  if (!refused) pthread_setname_np(helper->thread, "lookup helper");
  return !refused;
}

static PyObject *start(PyObject *module, PyObject *const *given, Py_ssize_t count) {
  (void)module;
  int64_t a[17];
  if (!read_arguments(given, count, 17, a) || !find_torch()) return NULL;
  if (a[0] < 0 || a[0] > MOST_HELPERS) return PyErr_Format(PyExc_ValueError, "expected 0 to %d helpers", MOST_HELPERS);
  Team *const team = calloc(1, sizeof *team);
  if (!team) return PyErr_NoMemory();
  team->process = getpid();
  team->helpers = a[0];
  team->spin_ns = a[1];
  team->rows.features = a[2];
  team->rows.last = (const int64_t *)a[3];
  team->rows.is_mean = (const uint8_t *)a[4];
  team->rows.is_weighted = (const uint8_t *)a[5];
  team->rows.weights = (const uint8_t *)a[6];
  team->rows.weights_bytes = a[7];
  team->rows.placements = (const int32_t *)a[8];
  team->rows.starts = (const int64_t *)a[9];
  team->rows.types = (const uint8_t *)a[10];
  team->rows.columns = (const int32_t *)a[11];
  team->rows.width = team->rows.columns[team->rows.features];
  for (int i = 0; i < PRECISIONS; ++i) team->rows.most_dims[i] = a[12 + i];
  pthread_mutex_init(&team->mutex, NULL);
  pthread_cond_init(&team->ended, NULL);
  team->helper = aligned_alloc(_Alignof(Helper), (size_t)(team->helpers + 1) * sizeof(Helper));
  if (!team->helper) {
    end(team, 0);
    return PyErr_NoMemory();
  }
  memset(team->helper, 0, (size_t)(team->helpers + 1) * sizeof(Helper));
  for (int64_t i = 0; i < team->helpers; ++i) {
    Helper *const helper = &team->helper[i];
    helper->team = team;
    atomic_init(&helper->word, READY);
    pthread_mutex_init(&helper->mutex, NULL);
    pthread_cond_init(&helper->news, NULL);
    if (!start_thread(helper)) {
      end(team, i);
      return PyErr_Format(PyExc_RuntimeError, "can't start %lld threads beside the caller's", (long long)a[0]);
    }
  }
  PyObject *const capsule = PyCapsule_New(team, NAME, end_capsule);
  if (!capsule) end(team, team->helpers);
  return capsule;
}

static int overlap(const void *one, int64_t size, const void *other, int64_t other_size) {
  const uintptr_t start = (uintptr_t)one, other_start = (uintptr_t)other;
  return start < other_start + (uintptr_t)other_size && other_start < start + (uintptr_t)size;
}

static PyObject *run(PyObject *module, PyObject *const *given, Py_ssize_t count) {
  (void)module;
  int64_t a[10];
  if (count < 1) return PyErr_Format(PyExc_TypeError, "expected a team");
  Team *const team = PyCapsule_GetPointer(given[0], NAME);
  if (!team || !read_arguments(given + 1, count - 1, 10, a)) return NULL;
  const int64_t ids = a[1], bags = a[4];
  const int32_t *const lengths = (const int32_t *)a[2];
  Job job = {
      .team = team,
      .values = (const int64_t *)a[0],
      .offsets = (const int64_t *)a[3],
      .weights = (const float *)a[5],
      .bags = bags / team->rows.features,
      .checks = !a[3],
      .pooled = (float *)a[7],
  };
  if (team->process != getpid()) Py_RETURN_NONE;
  const int missing = (ids && (!job.values || (a[6] && !job.weights))) || (bags && (!job.pooled || (!job.offsets && !lengths)));
  if (missing) return PyLong_FromLong(WRONG);
  const int64_t pooled_size = job.bags * team->rows.width * (int64_t)sizeof *job.pooled;
  if (overlap(job.pooled, pooled_size, job.values, ids * 8) || overlap(job.pooled, pooled_size, lengths, lengths ? bags * 4 : 0) ||
      overlap(job.pooled, pooled_size, job.weights, job.weights ? ids * 4 : 0)) {
    return PyLong_FromLong(OVERLAP); /* a piece must not write what another still reads */
  }
  Verdict verdict;
  fegetenv(&job.arithmetic);
  Py_BEGIN_ALLOW_THREADS
  int64_t *const own = job.offsets ? NULL : malloc((size_t)(bags + 1) * sizeof *own);
  if (!job.offsets) {
    job.offsets = own;
    verdict = !own ? NO_MEMORY : sum_lengths(lengths, bags, own) == ids && bags % team->rows.features == 0 ? FINE : OUTSIDE;
  } else verdict = job.offsets[bags] == ids ? FINE : OUTSIDE;
  if (verdict == FINE) verdict = share_out(team, &job, a[8], a[9]);
  free(own);
  Py_END_ALLOW_THREADS
  if (verdict == NO_MEMORY) return PyErr_NoMemory();
  if (verdict == FAILED) return PyErr_Format(PyExc_RuntimeError, "%s failed%s", OPERATOR, job.problem);
  return PyLong_FromLongLong(verdict == OUTSIDE ? WRONG : (long long)atomic_load(&job.helped));
}

static PyMethodDef methods[] = {
    METHOD(start), METHOD(run), {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "_team", .m_doc = "See runtime_py/team.py.", .m_methods = methods,
};

PyMODINIT_FUNC PyInit__team(void) { return PyModuleDef_Init(&definition); }
