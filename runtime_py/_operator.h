/* FBGEMM's operator, called through torch's C interface (aoti_torch_* and torch_call_dispatcher, which torch keeps stable for
 * programs built without its headers): no Python, and no lock of it.
 *
 * F features, B bags a feature, N ids, D the dimension of a feature's table.
 */

#include <dlfcn.h>

typedef void *Tensor; /* AtenTensorHandle: a reference of ours */

enum { PRECISIONS = 5, TENSORS = 8, OPERATOR_ARGUMENTS = 23 };
static const char OPERATOR[] = "fbgemm::int_nbit_split_embedding_codegen_lookup_function";
static const uint64_t TORCH_2_11 = (uint64_t)2 << 56 | (uint64_t)11 << 48; /* whose ways of passing arguments we know */

static struct {
  int32_t (*call)(const char *, const char *, uint64_t *, uint64_t);
  int32_t (*from_blob)(void *, int64_t, const int64_t *, const int64_t *, int64_t, int32_t, int32_t, int32_t, Tensor *);
  int32_t (*drop)(Tensor);
  int32_t (*find_data)(Tensor, void **);
  int32_t (*count)(Tensor, int64_t *);
  void *(*new)(size_t);                /* C++'s: torch deletes what it is given there */
  const char *(*tell_problem)(void); /* of the calling thread; NULL before torch 2.13 */
  int32_t uint8, int32, int64, float32, cpu;
} torch;

/* What the operator must know of an artifact's rows, by feature. */
typedef struct {
  int64_t features, width, weights_bytes, most_dims[PRECISIONS]; /* the largest D of int2, int4, int8, fp16, fp32 */
  const int64_t *last;                                           /* row of each feature's table */
  const uint8_t *is_mean, *is_weighted;
  const uint8_t *weights;
  const int32_t *placements; /* of each feature's rows, as FBGEMM wants to know them */
  const int64_t *starts;
  const uint8_t *types;
  const int32_t *columns; /* where each feature's begin, and the width */
} Rows;

static void *find(void *library, const char *name) {
  void *const found = dlsym(library, name);
  if (!found && !PyErr_Occurred()) PyErr_Format(PyExc_RuntimeError, "torch has no %s", name);
  return found;
}

static int find_torch(void) {
  if (torch.call) return 1;
  void *const library = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY);
  if (!library) {
    PyErr_Format(PyExc_RuntimeError, "torch's library is not loaded: %s", dlerror());
    return 0;
  }
  void *const call = find(library, "torch_call_dispatcher");
  *(void **)&torch.from_blob = find(library, "aoti_torch_create_tensor_from_blob");
  *(void **)&torch.drop = find(library, "aoti_torch_delete_tensor_object");
  *(void **)&torch.find_data = find(library, "aoti_torch_get_data_ptr");
  *(void **)&torch.count = find(library, "aoti_torch_get_numel");
  *(void **)&torch.new = find(library, "_Znwm");
  *(void **)&torch.tell_problem = dlsym(library, "torch_exception_get_what_without_backtrace");
  const struct {
    const char *name;
    int32_t *value;
  } constants[] = {
      {"aoti_torch_dtype_uint8", &torch.uint8},     {"aoti_torch_dtype_int32", &torch.int32},
      {"aoti_torch_dtype_int64", &torch.int64},     {"aoti_torch_dtype_float32", &torch.float32},
      {"aoti_torch_device_type_cpu", &torch.cpu},
  };
  for (size_t i = 0; i < sizeof constants / sizeof *constants; ++i) {
    int32_t (*constant)(void);
    *(void **)&constant = find(library, constants[i].name);
    if (constant) *constants[i].value = constant();
  }
  if (PyErr_Occurred()) return 0;
  *(void **)&torch.call = call;
  return 1;
}

/* A flat tensor over memory of ours, or NULL. */
static Tensor view(const void *memory, int64_t count, int32_t type) {
  const int64_t one = 1;
  Tensor tensor = NULL;
  return torch.from_blob((void *)memory, 1, &count, &one, 0, type, torch.cpu, 0, &tensor) ? NULL : tensor;
}

/* What is given for an optional argument, and is freed by torch. */
static uint64_t some(uint64_t value) {
  uint64_t *const box = torch.new(sizeof value);
  *box = value;
  return (uint64_t)(uintptr_t)box;
}

/* Some bags of each of some features, and where they begin in the memory of a piece: int64 [(F * B) + 1]. */
typedef struct {
  int64_t feature, features, bag, bags;
  const int64_t *offsets;
} Block;

/* float32 [B, sum(D)] of a block of a piece, whose ids are int64 [N], and weights [N] or NULL. NULL where something failed.
 * `columns` has room for int32 [F + 1]. */
static Tensor look_up(const Rows *rows, const Block *block, const int64_t *ids, int64_t count, const float *weights, int32_t *columns) {
  const int64_t first = block->feature, features = block->features;
  for (int64_t i = 0; i <= features; ++i) columns[i] = rows->columns[first + i] - rows->columns[first];
  const Tensor tensors[TENSORS] = {
      view(rows->weights, rows->weights_bytes, torch.uint8),
      view(rows->weights, rows->weights_bytes, torch.uint8), /* which is not read for a CPU */
      view(rows->placements + first, features, torch.int32),
      view(rows->starts + first, features, torch.int64),
      view(rows->types + first, features, torch.uint8),
      view(columns, features + 1, torch.int32),
      view(ids, count, torch.int64),
      view(block->offsets, features * block->bags + 1, torch.int64),
  };
  const Tensor weighing = weights ? view(weights, count, torch.float32) : NULL;
  int complete = weighing || !weights;
  for (int i = 0; i < TENSORS; ++i) complete &= tensors[i] != NULL;
  if (!complete) {
    for (int i = 0; i < TENSORS; ++i) {
      if (tensors[i]) torch.drop(tensors[i]);
    }
    if (weighing) torch.drop(weighing);
    return NULL;
  }
  uint64_t stack[OPERATOR_ARGUMENTS] = {0};
  for (int i = 0; i < 6; ++i) stack[i] = (uint64_t)(uintptr_t)tensors[i];
  stack[6] = (uint64_t)columns[features];
  for (int i = 0; i < PRECISIONS; ++i) stack[7 + i] = (uint64_t)rows->most_dims[i];
  stack[12] = (uint64_t)(uintptr_t)tensors[6];
  stack[13] = (uint64_t)(uintptr_t)tensors[7];
  stack[14] = 0; /* pooling: sum */
  stack[15] = weighing ? some((uint64_t)(uintptr_t)weighing) : 0;
  stack[16] = 0; /* output: fp32 */
  stack[17] = stack[18] = 0; /* no cache */
  stack[19] = some(1); /* canonical rows are not padded */
  stack[20] = some(0); /* no fp8 */
  stack[21] = some((uint64_t)-1);
  stack[22] = some((uint64_t)-1);
  return torch.call(OPERATOR, "", stack, TORCH_2_11) ? NULL : (Tensor)(uintptr_t)stack[0];
}
