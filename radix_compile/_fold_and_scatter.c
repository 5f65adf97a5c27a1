/* The hot path of radix_compile.fold_and_scatter, which describes what is computed and does it without this too.

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

/* Sequence: rows up to `end`, the first `prefix` of them equal to those from the earlier row `source` on. */
typedef struct {
    uint32_t end;
    uint32_t source;
    uint32_t prefix;
} Sequence;

/* Edge of the tree: rows `begin` to `begin + length`, below the edge with the index `parent`. */
typedef struct {
    uint32_t begin;
    uint32_t length;
    uint32_t parent;
} Edge;

/* Edge 0 is the root and has no rows.  `slots` is a hash table with open addressing, at most half full, of all other
   edges by parent and first row; 0 is a free slot.  The edges below one parent differ in their first row. */
typedef struct {
    Rows rows;
    Edge *edges;
    size_t count;
    uint32_t *slots;
    size_t mask;
} Tree;

static size_t
hash(const Tree *tree, uint32_t parent, uint32_t row)
{
    uint64_t h = ((uint64_t)tree->rows.positions[row] << 32 | tree->rows.ids[row]) * UINT64_C(0x9E3779B97F4A7C15);
    h = ((h ^ h >> 32) + parent) * UINT64_C(0xBF58476D1CE4E5B9);
    return (size_t)(h ^ h >> 32);
}

/* The slot of the edge below `parent` that starts with a row like `row`, or a free one. */
static uint32_t *
find(const Tree *tree, uint32_t parent, uint32_t row)
{
    const uint32_t *ids = tree->rows.ids, *positions = tree->rows.positions;
    for (size_t i = hash(tree, parent, row);; i++) {
        uint32_t *slot = &tree->slots[i & tree->mask];
        const Edge *edge = &tree->edges[*slot];
        if (*slot == 0
            || (edge->parent == parent && ids[edge->begin] == ids[row] && positions[edge->begin] == positions[row])) {
            return slot;
        }
    }
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

/* How many of the `most` rows from `a` and from `b` on are equal, up to the first that are not. */
static uint32_t
common(Rows rows, uint32_t a, uint32_t b, uint32_t most)
{
    const uint32_t *ids_a = rows.ids + a, *ids_b = rows.ids + b;
    const uint32_t *positions_a = rows.positions + a, *positions_b = rows.positions + b;
    uint32_t n = 0;
    while (most - n >= BLOCK && memcmp(ids_a + n, ids_b + n, BLOCK * sizeof(uint32_t)) == 0
           && memcmp(positions_a + n, positions_b + n, BLOCK * sizeof(uint32_t)) == 0) {
        n += BLOCK;
    }
    while (n < most && ids_a[n] == ids_b[n] && positions_a[n] == positions_b[n]) {
        n++;
    }
    return n;
}

/* Add the sequence that begins at row `start`, and note what it shares with the earlier ones.  At most two edges are
   new, whatever another thread writes to the rows in the meantime. */
static void
insert(Tree *tree, uint32_t start, Sequence *sequence)
{
    uint32_t at = start, end = sequence->end, parent = 0;
    sequence->source = 0;
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
        sequence->source = edge->begin - (at - start);
        at += n;
        if (n == edge->length) {
            parent = index;
        }
        else if (at < end) {
            /* They part inside the edge: its upper part becomes a new edge, above it and the rest of the sequence. */
            uint32_t upper = new_edge(tree, edge->begin, n, edge->parent);
            *slot = upper;
            *edge = (Edge){edge->begin + n, edge->length - n, upper};
            enter(tree, index);
            enter(tree, new_edge(tree, at, end - at, upper));
            break;
        }
    }
    sequence->prefix = at - start;
}

/* Insert all sequences; the number of nodes of the tree. */
static size_t
insert_all(Tree *tree, Sequence *sequences, size_t batch)
{
    size_t nodes = 0;
    uint32_t start = 0;
    for (size_t b = 0; b < batch; b++) {
        insert(tree, start, &sequences[b]);
        nodes += sequences[b].end - start - sequences[b].prefix;
        start = sequences[b].end;
    }
    return nodes;
}

/* Write the outputs; `compact` is ids, positions and fold of `width` entries each, zeros after the nodes. */
static void
fill(Rows rows, const Sequence *sequences, size_t batch, uint32_t *compact, size_t width, uint32_t *scatter)
{
    uint32_t *ids = compact, *positions = compact + width, *fold = compact + 2 * width;
    size_t node = 0;
    uint32_t row = 0;
    for (size_t b = 0; b < batch; b++) {
        const Sequence *sequence = &sequences[b];
        if (sequence->prefix > 0) {
            memcpy(scatter + row, scatter + sequence->source, sequence->prefix * sizeof(uint32_t));
            row += sequence->prefix;
        }
        size_t fresh = sequence->end - row;
        if (fresh > 0) {
            memcpy(ids + node, rows.ids + row, fresh * sizeof(uint32_t));
            memcpy(positions + node, rows.positions + row, fresh * sizeof(uint32_t));
            for (size_t i = 0; i < fresh; i++) {
                fold[node + i] = row + (uint32_t)i;
            }
            for (size_t i = 0; i < fresh; i++) {
                scatter[row + i] = (uint32_t)(node + i);
            }
        }
        node += fresh;
        row = sequence->end;
    }
    if (width > node) {
        size_t padding = (width - node) * sizeof(uint32_t);
        memset(ids + node, 0, padding);
        memset(positions + node, 0, padding);
        memset(fold + node, 0, padding);
    }
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

/* The sequences that `bounds` describes, copied; 0 unless it runs from 0 to `tokens` without decreasing. */
static int
read_bounds(const Py_buffer *bounds, size_t tokens, Sequence *sequences)
{
    const uint32_t *bound = bounds->buf;
    size_t entries = (size_t)bounds->shape[0];
    if (entries == 0) {
        return tokens == 0;
    }
    uint32_t last = bound[0];
    int rising = last == 0;
    for (size_t b = 0; b + 1 < entries; b++) {
        sequences[b].end = bound[b + 1];
        rising &= last <= sequences[b].end;
        last = sequences[b].end;
    }
    return rising && last == tokens;
}

static PyObject *
split(const State *state, const Py_buffer views[3], size_t multiple)
{
    Rows rows = {views[0].buf, views[1].buf};
    size_t tokens = (size_t)views[0].shape[0];
    size_t batch = views[2].shape[0] > 0 ? (size_t)views[2].shape[0] - 1 : 0;

    /* Every sequence brings two edges at most, and every edge a row, so that indices of edges fit in 32 bits. */
    if (batch > PY_SSIZE_T_MAX / 64) {
        return PyErr_NoMemory();
    }
    size_t edges = (2 * batch < tokens ? 2 * batch : tokens) + 1, slots = 4;
    while (slots < 2 * edges) {
        slots *= 2;
    }
    size_t fixed = batch * sizeof(Sequence) + edges * sizeof(Edge);
    char *memory = PyMem_Malloc(fixed + slots * sizeof(uint32_t));
    if (memory == NULL) {
        return PyErr_NoMemory();
    }
    Sequence *sequences = (Sequence *)memory;
    Tree tree = {rows, (Edge *)(sequences + batch), 1, (uint32_t *)(memory + fixed), slots - 1};
    PyObject *compact = NULL, *scatter = NULL, *outputs = NULL;
    uint32_t *compact_data = NULL, *scatter_data = NULL;
    PyThreadState *thread = NULL;

    if (!read_bounds(&views[2], tokens, sequences)) {
        outputs = Py_NewRef(Py_None);
        goto done;
    }
    tree.edges[0] = (Edge){0, 0, 0};
    memset(tree.slots, 0, slots * sizeof(uint32_t));
    if (tokens >= RELEASE_LOCK_FROM) {
        thread = PyEval_SaveThread();
    }
    size_t nodes = insert_all(&tree, sequences, batch);
    if (thread != NULL) {
        PyEval_RestoreThread(thread);
    }

    size_t padding = (multiple - nodes % multiple) % multiple, width = nodes == 0 ? 0 : nodes + padding;
    if (width > PY_SSIZE_T_MAX / (3 * sizeof(uint32_t))) {
        PyErr_NoMemory();
        goto done;
    }
    compact = new_matrix(state, 3, (Py_ssize_t)width, &compact_data);
    scatter = compact == NULL ? NULL : new_array(state, PyLong_FromSize_t(tokens), &scatter_data);
    if (scatter == NULL) {
        goto done;
    }
    if (thread != NULL) {
        thread = PyEval_SaveThread();
    }
    fill(rows, sequences, batch, compact_data, width, scatter_data);
    if (thread != NULL) {
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
        outputs = split(state, views, (size_t)multiple);
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
    .m_name = "_fold_and_scatter",
    .m_size = sizeof(State),
    .m_methods = methods,
    .m_slots = slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
};

PyMODINIT_FUNC
PyInit__fold_and_scatter(void)
{
    return PyModuleDef_Init(&definition);
}
