/* The hot path of radix_compile.compute_fold_and_scatter, which describes what is computed and does it without this
   too.

   The sequences of a batch go one by one into a path-compressed prefix tree.  An edge is a stretch of rows of the
   sequence that brought it, so the tree takes memory for the sequences and none for the tokens, and rows are compared
   in blocks.  What a sequence shares with the tree when it comes is the longest prefix that it shares with any
   earlier one; the rest of it are new nodes, which are thereby numbered in the order of their first row. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>
#include <string.h>

/* Batches of fewer tokens take less time than it may take to get the interpreter lock back. */
#define RELEASE_LOCK_FROM 16384

/* Rows compared at a time. */
#define BLOCK 64

typedef struct {
    const uint32_t *ids;
    const uint32_t *positions;
} Rows;

/* Successive rows that are the first ones of their nodes. */
typedef struct {
    uint32_t begin;
    uint32_t length;
} Run;

/* Edge of the tree: rows `begin` to `begin + length`, below the edge with the index `parent`. */
typedef struct {
    uint32_t begin;
    uint32_t length;
    uint32_t parent;
} Edge;

/* Edge 0 is the root and has no rows.  `slots` is a hash table with open addressing, never full, of all other edges
   by parent and first row; 0 is a free slot.  The edges below one parent differ in their first row. */
typedef struct {
    Rows rows;
    Edge *edges;
    size_t count;
    uint32_t *slots;
    size_t mask;
    int shift;
} Tree;

/* Where in the table to look first, from there on `& mask`. */
static inline size_t
hash(const Tree *tree, uint32_t parent, uint32_t row)
{
    uint64_t h = tree->rows.ids[row] * UINT64_C(0x9E3779B97F4A7C15) + parent * UINT64_C(0xBF58476D1CE4E5B9)
                 + tree->rows.positions[row] * UINT64_C(0x94D049BB133111EB);
    return (size_t)(h >> tree->shift);
}

/* Whether the edge `index` is below `parent` and starts with a row like `row`. */
static inline int
matches(const Tree *tree, uint32_t index, uint32_t parent, uint32_t row)
{
    const uint32_t *ids = tree->rows.ids, *positions = tree->rows.positions;
    const Edge *edge = &tree->edges[index];
    return edge->parent == parent && ids[edge->begin] == ids[row] && positions[edge->begin] == positions[row];
}

/* The slot of the edge below `parent` that starts with a row like `row`, or a free one. */
static uint32_t *
find(const Tree *tree, uint32_t parent, uint32_t row)
{
    size_t i = hash(tree, parent, row);
    while (tree->slots[i & tree->mask] != 0 && !matches(tree, tree->slots[i & tree->mask], parent, row)) {
        i++;
    }
    return &tree->slots[i & tree->mask];
}

/* Put an edge that the table does not have into it. */
static void
enter(const Tree *tree, uint32_t index)
{
    size_t i = hash(tree, tree->edges[index].parent, tree->edges[index].begin);
    while (tree->slots[i & tree->mask] != 0) {
        i++;
    }
    tree->slots[i & tree->mask] = index;
}

static uint32_t
new_edge(Tree *tree, uint32_t begin, uint32_t length, uint32_t parent)
{
    uint32_t index = (uint32_t)tree->count++;
    tree->edges[index] = (Edge){begin, length, parent};
    return index;
}

static inline void
copy(uint32_t *to, const uint32_t *from, uint32_t length)
{
    if (length >= 8) {
        memcpy(to, from, length * sizeof(uint32_t));
        return;
    }
    for (uint32_t i = 0; i < length; i++) {
        to[i] = from[i];
    }
}

static inline void
count_up(uint32_t *to, uint32_t first, uint32_t length)
{
    for (uint32_t i = 0; i < length; i++) {
        to[i] = first + i;
    }
}

/* As `common`, for few rows. */
static inline uint32_t
common_of_few(Rows rows, uint32_t a, uint32_t b, uint32_t most)
{
    uint32_t n = 0;
    while (n < most && rows.ids[a + n] == rows.ids[b + n] && rows.positions[a + n] == rows.positions[b + n]) {
        n++;
    }
    return n;
}

/* How many of the `most` rows from `a` and from `b` on are equal, up to the first that are not. */
static uint32_t
common(Rows rows, uint32_t a, uint32_t b, uint32_t most)
{
    uint32_t n = 0;
    while (most - n >= BLOCK && memcmp(rows.ids + a + n, rows.ids + b + n, BLOCK * sizeof(uint32_t)) == 0
           && memcmp(rows.positions + a + n, rows.positions + b + n, BLOCK * sizeof(uint32_t)) == 0) {
        n += BLOCK;
    }
    return n + common_of_few(rows, a + n, b + n, most - n);
}

/* Find the longest prefix of the rows `start` to `end` that an earlier sequence has, and add the rest to the tree.
   Returns the first row that is not shared; the shared ones equal those from `*source` on.  At most two edges and
   two slots are taken, whatever another thread writes to the rows in the meantime. */
static uint32_t
insert(Tree *tree, uint32_t start, uint32_t end, uint32_t *source)
{
    uint32_t at = start, parent = 0;
    while (at < end) {
        uint32_t *slot = find(tree, parent, at), index = *slot;
        if (index == 0) {
            *slot = new_edge(tree, at, end - at, parent);
            break;
        }
        Edge *edge = &tree->edges[index];
        uint32_t most = edge->length < end - at ? edge->length : end - at;
        uint32_t n = 1 + common(tree->rows, edge->begin + 1, at + 1, most - 1);
        /* The sequence that brought this edge came through all edges above it. */
        *source = edge->begin - (at - start);
        at += n;
        if (n == edge->length) {
            parent = index;
        }
        else if (at < end) {
            /* They part inside the edge: its upper part becomes a new edge, above it and the rest of the sequence. */
            uint32_t upper = new_edge(tree, edge->begin, n, parent);
            *slot = upper;
            *edge = (Edge){edge->begin + n, edge->length - n, upper};
            enter(tree, index);
            enter(tree, new_edge(tree, at, end - at, upper));
            break;
        }
    }
    return at;
}

/* Insert all sequences: write the scatter index and the runs.  Returns the number of runs and sets `*nodes`; -1 if
   `bounds` does not run from 0 to `tokens` without decreasing. */
static Py_ssize_t
insert_all(Tree *tree, const uint32_t *bounds, size_t entries, size_t tokens, uint32_t *scatter, Run *runs,
           size_t *nodes)
{
    Py_ssize_t count = 0;
    uint32_t start = 0, node = 0;
    Rows rows = tree->rows;
    if (entries > 0 && bounds[0] != 0) {
        return -1;
    }
    for (size_t i = 1; i < entries; i++) {
        uint32_t end = bounds[i], source = 0;
        if (end < start || end > tokens) {
            return -1;
        }
        uint32_t row = insert(tree, start, end, &source), length = end - start;
        copy(scatter + start, scatter + source, row - start);
        if (row < end) {
            runs[count++] = (Run){row, end - row};
            count_up(scatter + row, node, end - row);
            node += end - row;
        }
        /* Short sequences like this one that follow at once are not worth a walk. */
        while (length < BLOCK && i + 1 < entries && (size_t)end + length <= tokens && bounds[i + 1] == end + length
               && common_of_few(rows, start, end, length) == length) {
            copy(scatter + end, scatter + start, length);
            end += length;
            i++;
        }
        start = end;
    }
    *nodes = node;
    return start == tokens ? count : -1;
}

/* Write ids, positions and fold, `width` entries each: the rows of the runs, then zeros. */
static void
gather(Rows rows, const Run *runs, Py_ssize_t count, uint32_t *compact, size_t width)
{
    uint32_t *ids = compact, *positions = compact + width, *fold = compact + 2 * width;
    for (const Run *run = runs; run < runs + count; run++) {
        copy(ids, rows.ids + run->begin, run->length);
        copy(positions, rows.positions + run->begin, run->length);
        count_up(fold, run->begin, run->length);
        ids += run->length;
        positions += run->length;
        fold += run->length;
    }
    size_t padding = (size_t)(compact + width - ids);
    memset(ids, 0, padding * sizeof(uint32_t));
    memset(positions, 0, padding * sizeof(uint32_t));
    memset(fold, 0, padding * sizeof(uint32_t));
}

/* ------------------------------------------------------------------------------------------ the Python side */

typedef struct {
    PyObject *ndarray; /* numpy.ndarray */
    PyObject *empty;   /* numpy.empty */
    PyObject *uint32;  /* numpy.dtype("uint32") */
} State;

/* The buffer of a contiguous, aligned uint32 vector; -1 without an exception for anything else. */
static int
get_vector(const State *state, PyObject *object, Py_buffer *view)
{
    if (!PyObject_TypeCheck(object, (PyTypeObject *)state->ndarray)) {
        return -1;
    }
    if (PyObject_GetBuffer(object, view, PyBUF_ND | PyBUF_FORMAT) < 0) {
        PyErr_Clear();
        return -1;
    }
    const char *format = view->format;
    if (view->ndim == 1 && view->itemsize == 4 && (format[0] == 'I' || format[0] == 'L') && format[1] == '\0') {
        return 0;
    }
    PyBuffer_Release(view);
    return -1;
}

/* numpy.empty(shape, uint32), whose memory `*data` is.  The reference to `shape` is taken over; it may be NULL. */
static PyObject *
new_array(const State *state, PyObject *shape, uint32_t **data)
{
    if (shape == NULL) {
        return NULL;
    }
    PyObject *arguments[] = {shape, state->uint32};
    PyObject *array = PyObject_Vectorcall(state->empty, arguments, 2, NULL);
    Py_DECREF(shape);
    Py_buffer view;
    if (array == NULL || PyObject_GetBuffer(array, &view, PyBUF_WRITABLE) < 0) {
        Py_XDECREF(array);
        return NULL;
    }
    *data = view.buf;
    PyBuffer_Release(&view); /* the array keeps its memory */
    return array;
}

static PyObject *
new_matrix(const State *state, Py_ssize_t height, Py_ssize_t width, uint32_t **data)
{
    PyObject *rows = PyLong_FromSsize_t(height), *columns = PyLong_FromSsize_t(width);
    PyObject *shape = rows == NULL || columns == NULL ? NULL : PyTuple_Pack(2, rows, columns);
    Py_XDECREF(rows);
    Py_XDECREF(columns);
    return new_array(state, shape, data);
}

/* What fold_and_scatter returns for three vectors, the first two of equal length. */
static PyObject *
compute(const State *state, const Py_buffer views[3], size_t multiple)
{
    Rows rows = {views[0].buf, views[1].buf};
    const uint32_t *bounds = views[2].buf;
    size_t tokens = (size_t)views[0].shape[0], entries = (size_t)views[2].shape[0];
    if (tokens > UINT32_MAX) {
        Py_RETURN_NONE;
    }

    /* A sequence brings one run and two edges at most, each of them with a row or more. */
    size_t most_runs = entries < tokens ? entries : tokens;
    size_t most_edges = (2 * most_runs < tokens ? 2 * most_runs : tokens) + 1, slots = 4;
    if (most_edges > SIZE_MAX / 64) {
        return PyErr_NoMemory();
    }
    int shift = 62; /* 64 less the bits of an index of a slot */
    while (slots < most_edges + most_edges / 2) {
        slots *= 2;
        shift--;
    }
    char *memory = PyMem_Malloc(most_edges * sizeof(Edge) + most_runs * sizeof(Run) + slots * sizeof(uint32_t));
    if (memory == NULL) {
        return PyErr_NoMemory();
    }
    Tree tree = {.rows = rows, .edges = (Edge *)memory, .count = 1, .mask = slots - 1, .shift = shift};
    Run *runs = (Run *)(tree.edges + most_edges);
    tree.slots = (uint32_t *)(runs + most_runs);
    tree.edges[0] = (Edge){0, 0, 0};

    int release = tokens >= RELEASE_LOCK_FROM;
    PyObject *outputs = NULL, *compact = NULL;
    uint32_t *scatter_data, *compact_data;
    PyObject *scatter = new_array(state, PyLong_FromSize_t(tokens), &scatter_data);
    if (scatter == NULL) {
        goto done;
    }
    PyThreadState *thread = release ? PyEval_SaveThread() : NULL;
    memset(tree.slots, 0, slots * sizeof(uint32_t));
    size_t nodes = 0;
    Py_ssize_t count = insert_all(&tree, bounds, entries, tokens, scatter_data, runs, &nodes);
    if (release) {
        PyEval_RestoreThread(thread);
    }
    if (count < 0) {
        outputs = Py_NewRef(Py_None);
        goto done;
    }

    size_t padding = nodes % multiple == 0 ? 0 : multiple - nodes % multiple;
    if (padding > PY_SSIZE_T_MAX / 16 - nodes) {
        PyErr_NoMemory();
        goto done;
    }
    compact = new_matrix(state, 3, (Py_ssize_t)(nodes + padding), &compact_data);
    if (compact == NULL) {
        goto done;
    }
    if (release) {
        thread = PyEval_SaveThread();
    }
    gather(rows, runs, count, compact_data, nodes + padding);
    if (release) {
        PyEval_RestoreThread(thread);
    }

    PyObject *ids = PySequence_GetItem(compact, 0);
    PyObject *positions = PySequence_GetItem(compact, 1);
    PyObject *fold = PySequence_GetItem(compact, 2);
    if (ids != NULL && positions != NULL && fold != NULL) {
        outputs = PyTuple_Pack(4, ids, positions, scatter, fold);
    }
    Py_XDECREF(ids);
    Py_XDECREF(positions);
    Py_XDECREF(fold);
done:
    Py_XDECREF(compact);
    Py_XDECREF(scatter);
    PyMem_Free(memory);
    return outputs;
}

PyDoc_STRVAR(fold_and_scatter_doc,
"fold_and_scatter(input_ids, position_ids, cu_seq_lengths, pad_multiple_of, /)\n--\n\n"
"The outputs of compute_fold_and_scatter, or None unless the arguments are contiguous uint32 vectors that\n"
"describe a batch, and None or an integer from 1 up.");

static PyObject *
fold_and_scatter(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    const State *state = PyModule_GetState(module);
    if (count != 4) {
        return PyErr_Format(PyExc_TypeError, "fold_and_scatter takes 4 arguments, got %zd", count);
    }
    Py_ssize_t multiple = 1;
    if (arguments[3] != Py_None) {
        multiple = PyNumber_AsSsize_t(arguments[3], PyExc_OverflowError);
        if (multiple < 1) {
            PyErr_Clear();
            Py_RETURN_NONE;
        }
    }
    Py_buffer views[3];
    int held = 0;
    while (held < 3 && get_vector(state, arguments[held], &views[held]) == 0) {
        held++;
    }
    PyObject *outputs;
    if (held == 3 && views[0].shape[0] == views[1].shape[0]) {
        outputs = compute(state, views, (size_t)multiple);
    }
    else {
        outputs = Py_NewRef(Py_None);
    }
    while (held > 0) {
        PyBuffer_Release(&views[--held]);
    }
    return outputs;
}

static int
module_exec(PyObject *module)
{
    State *state = PyModule_GetState(module);
    PyObject *numpy = PyImport_ImportModule("numpy");
    if (numpy == NULL) {
        return -1;
    }
    state->ndarray = PyObject_GetAttrString(numpy, "ndarray");
    state->empty = PyObject_GetAttrString(numpy, "empty");
    state->uint32 = PyObject_CallMethod(numpy, "dtype", "s", "uint32");
    Py_DECREF(numpy);
    return state->ndarray == NULL || state->empty == NULL || state->uint32 == NULL ? -1 : 0;
}

static int
module_traverse(PyObject *module, visitproc visit, void *arg)
{
    State *state = PyModule_GetState(module);
    Py_VISIT(state->ndarray);
    Py_VISIT(state->empty);
    Py_VISIT(state->uint32);
    return 0;
}

static int
module_clear(PyObject *module)
{
    State *state = PyModule_GetState(module);
    Py_CLEAR(state->ndarray);
    Py_CLEAR(state->empty);
    Py_CLEAR(state->uint32);
    return 0;
}

static PyMethodDef methods[] = {
    {"fold_and_scatter", (PyCFunction)(void (*)(void))fold_and_scatter, METH_FASTCALL, fold_and_scatter_doc},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, (void *)module_exec},
    {0, NULL},
};

static struct PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "radix_compile_native",
    .m_size = sizeof(State),
    .m_methods = methods,
    .m_slots = slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
};

PyMODINIT_FUNC
PyInit_radix_compile_native(void)
{
    return PyModuleDef_Init(&definition);
}
