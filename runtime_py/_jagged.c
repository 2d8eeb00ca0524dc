/* Passes over a jagged request, each once over its memory: adding lengths up, copying ids while they are checked, and
 * cutting out a range of bags. `jagged.py` is the only caller; it says what each address stands for and that it is there.
 *
 * Code this small stays in a core's cache beside a lookup that empties it. The same steps in numpy took 20 us of a request
 * that a lookup answers in 200, most of them spent on fetching numpy's own code from memory again.
 */

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

enum {
  MOST_ARGUMENTS = 11,
  BLOCK_IDS = 512,        /* 4 KiB, which stay in the first cache between copy and check */
  UNLOCKED_IDS = 1 << 16, /* from here on other threads may run; taking the interpreter's lock back can cost 50 us */
};

typedef int64_t Arguments[MOST_ARGUMENTS];

static int read_arguments(PyObject *const *given, Py_ssize_t count, Py_ssize_t expected, Arguments to) {
  if (count != expected) {
    PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", expected, count);
    return 0;
  }
  for (Py_ssize_t i = 0; i < count; ++i) {
    to[i] = PyLong_AsLongLong(given[i]);
    if (to[i] == -1 && PyErr_Occurred()) return 0;
  }
  return 1;
}

/* A tensor may have no memory, such as one of torch's transforms: its address is 0. */
static int has_memory(const void *address, int64_t count) {
  if (address || !count) return 1;
  PyErr_SetString(PyExc_ValueError, "a request's tensor has no memory; give plain tensors, outside of torch.func's transforms");
  return 0;
}

/* Copies ids, and says whether all copies are in [0, last]. The check reads the copy: nobody can change it any more.
 * `last - id` of an id that is too large, and a negative id itself, have the sign bit set. */
static int copy_inside(const int64_t *from, int64_t *to, int64_t count, int64_t last) {
  uint64_t signs = 0;
  for (int64_t start = 0; start < count; start += BLOCK_IDS) {
    const int64_t size = count - start < BLOCK_IDS ? count - start : BLOCK_IDS;
    if (from != to) memcpy(to + start, from + start, (size_t)size * sizeof *to);
    for (int64_t i = start; i < start + size; ++i) {
      const uint64_t id = (uint64_t)to[i];
      signs |= ((uint64_t)last - id) | id;
    }
  }
  return !(signs >> 63);
}

static PyObject *add_lengths(PyObject *module, PyObject *const *given, Py_ssize_t count) {
  (void)module;
  Arguments a;
  if (!read_arguments(given, count, 3, a)) return NULL;
  const int32_t *const lengths = (const int32_t *)a[0];
  int64_t *const offsets = (int64_t *)a[2];
  if (!has_memory(lengths, a[1]) || !has_memory(offsets, 1)) return NULL;
  int64_t sum = 0;
  int32_t signs = 0;
  offsets[0] = 0;
  for (int64_t i = 0; i < a[1]; ++i) {
    const int32_t length = lengths[i];
    signs |= length;
    sum += length;
    offsets[i + 1] = sum;
  }
  return PyLong_FromLongLong(signs < 0 ? -1 : sum);
}

static PyObject *copy_ids(PyObject *module, PyObject *const *given, Py_ssize_t count) {
  (void)module;
  Arguments a;
  if (!read_arguments(given, count, 7, a)) return NULL;
  const int64_t *const values = (const int64_t *)a[0], *const offsets = (const int64_t *)a[1], *const last = (const int64_t *)a[2];
  const int64_t features = a[3], bags = a[4];
  int64_t *const ids = (int64_t *)a[5];
  if (offsets[features * bags] != a[6]) {
    PyErr_SetString(PyExc_ValueError, "values changed their number while they were checked; leave a request alone until it is answered");
    return NULL;
  }
  if (!has_memory(values, a[6])) return NULL;
  int inside = 1;
  PyThreadState *const unlocked = offsets[features * bags] >= UNLOCKED_IDS ? PyEval_SaveThread() : NULL;
  for (int64_t feature = 0; feature < features; ++feature) {
    const int64_t start = offsets[feature * bags], end = offsets[(feature + 1) * bags];
    inside &= copy_inside(values + start, ids + start, end - start, last[feature]);
  }
  if (unlocked) PyEval_RestoreThread(unlocked);
  return PyBool_FromLong(inside);
}

/* The ids of bags before `bag` of every feature, and one more for each of these bags, whose result is written, too. */
static int64_t work_before(const int64_t *offsets, int64_t features, int64_t bags, int64_t bag) {
  int64_t work = bag * features;
  for (int64_t feature = 0; feature < features; ++feature) {
    work += offsets[feature * bags + bag] - offsets[feature * bags];
  }
  return work;
}

static PyObject *plan_pieces(PyObject *module, PyObject *const *given, Py_ssize_t count) {
  (void)module;
  Arguments a;
  if (!read_arguments(given, count, 5, a)) return NULL;
  const int64_t *const offsets = (const int64_t *)a[0];
  const int64_t features = a[1], bags = a[2], pieces = a[3], total = work_before(offsets, features, bags, bags);
  const int64_t ahead = a[4] < total ? a[4] : total;
  const double share = (double)(total - ahead) / pieces;
  PyObject *const planned = PyList_New(0);
  if (!planned) return NULL;
  int64_t first = 0, ids_before = 0;
  for (int64_t piece = 1; piece <= pieces; ++piece) {
    int64_t end = piece < pieces ? first : bags, high = bags;
    const int64_t target = ahead + (int64_t)(share * piece);
    while (end < high) { /* the first bag that has the shares up to this one before it */
      const int64_t middle = end + (high - end) / 2;
      if (work_before(offsets, features, bags, middle) < target) end = middle + 1;
      else high = middle;
    }
    if (end == first) continue;
    const int64_t ids = work_before(offsets, features, bags, end) - end * features;
    PyObject *const range = Py_BuildValue("LLL", (long long)first, (long long)end, (long long)(ids - ids_before));
    if (!range || PyList_Append(planned, range)) {
      Py_XDECREF(range);
      Py_DECREF(planned);
      return NULL;
    }
    Py_DECREF(range);
    first = end;
    ids_before = ids;
  }
  return planned;
}

static PyObject *cut_piece(PyObject *module, PyObject *const *given, Py_ssize_t count) {
  (void)module;
  Arguments a;
  if (!read_arguments(given, count, 11, a)) return NULL;
  const int64_t *const values = (const int64_t *)a[0], *const offsets = (const int64_t *)a[2], *const last = (const int64_t *)a[3];
  const float *const weights = (const float *)a[1];
  const int64_t features = a[4], bags = a[5], first = a[6], size = a[7] - first;
  int64_t *const ids = (int64_t *)a[8], *const piece_offsets = (int64_t *)a[10];
  float *const piece_weights = (float *)a[9];
  const int64_t total = offsets[features * bags];
  if (!has_memory(values, total) || !has_memory(weights, piece_weights ? total : 0)) return NULL;
  int inside = 1;
  int64_t done = 0;
  Py_BEGIN_ALLOW_THREADS
  for (int64_t feature = 0; feature < features; ++feature) {
    const int64_t *const bounds = offsets + feature * bags + first;
    const int64_t start = bounds[0], taken = bounds[size] - start;
    for (int64_t bag = 0; bag < size; ++bag) piece_offsets[feature * size + bag] = bounds[bag] - start + done;
    inside &= copy_inside(values + start, ids + done, taken, last[feature]);
    if (weights && taken) memcpy(piece_weights + done, weights + start, (size_t)taken * sizeof *weights);
    done += taken;
  }
  piece_offsets[features * size] = done;
  Py_END_ALLOW_THREADS
  return PyBool_FromLong(inside);
}

#define METHOD(name) {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, NULL}

static PyMethodDef methods[] = {
    METHOD(add_lengths), METHOD(copy_ids), METHOD(plan_pieces), METHOD(cut_piece), {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "_jagged", .m_doc = "See runtime_py/jagged.py.", .m_methods = methods,
};

PyMODINIT_FUNC PyInit__jagged(void) { return PyModuleDef_Init(&definition); }
