/* What the compiled modules share: reading addresses and sizes that Python hands over, and copying ids while they are checked. */

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

enum { BLOCK_IDS = 512 }; /* 4 KiB, which stay in the first cache between copy and check */

static inline int read_arguments(PyObject *const *given, Py_ssize_t count, Py_ssize_t expected, int64_t *to) {
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
static inline int has_memory(const void *address, int64_t count) {
  if (address || !count) return 1;
  PyErr_SetString(PyExc_ValueError, "a request's tensor has no memory; give plain tensors, outside of torch.func's transforms");
  return 0;
}

/* Copies ids, and says whether all copies are in [0, last]. The check reads the copy: nobody can change it any more.
 * `last - id` of an id that is too large, and a negative id itself, have the sign bit set. */
static inline int copy_inside(const int64_t *from, int64_t *to, int64_t count, int64_t last) {
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

#define METHOD(name) {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, NULL}
