/* What the compiled modules share: reading addresses and sizes that Python hands over, adding
 * lengths up, and copying ids while they are checked. */

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>

/* Ids where they may lie at any address, as in a caller's memory. */
typedef uint64_t Id __attribute__((aligned(1), may_alias));
typedef uint64_t Ids __attribute__((vector_size(16), aligned(1), may_alias));

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

/* Adds the lengths of bags up: where each begins, [bags + 1]. Returns the last one, or -1 where a length is negative. */
static inline int64_t sum_lengths(const int32_t *lengths, int64_t bags, int64_t *offsets) {
  int64_t sum = 0;
  int32_t signs = 0;
  offsets[0] = 0;
  for (int64_t bag = 0; bag < bags; ++bag) {
    const int32_t length = lengths[bag];
    signs |= length;
    sum += length;
    offsets[bag + 1] = sum;
  }
  return signs < 0 ? -1 : sum;
}

/* Copies ids, and says whether all copies are in [0, last]. Each is read once (volatile), so that what is checked is what is
 * copied. `last - id` of an id that is too large, and a negative id itself, have the sign bit set. */
static inline int copy_inside(const int64_t *from, int64_t *to, int64_t count, int64_t last) {
  const uint64_t limit = (uint64_t)last;
  const Ids limits = {limit, limit};
  Ids signs = {0, 0};
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    const Ids first = *(const volatile Ids *)(from + i), second = *(const volatile Ids *)(from + i + 2);
    *(Ids *)(to + i) = first;
    *(Ids *)(to + i + 2) = second;
    signs |= (limits - first) | first | (limits - second) | second;
  }
  uint64_t sign = signs[0] | signs[1];
  for (; i < count; ++i) {
    const uint64_t id = *(const volatile Id *)(from + i);
    *(Id *)(to + i) = id;
    sign |= (limit - id) | id;
  }
  return !(sign >> 63);
}

#define METHOD(name) {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, NULL}
