/* Python objects that own what C made: a mapping, a bitmap, a table.
 *
 * cffi's own `ffi.gc` will not do here. The garbage collector calls its destructors as finalizers,
 * in any order, so a `__del__` method in the same cycle of garbage could still use memory that is
 * unmapped already. These objects release what they own when their last reference is gone, which
 * is after every finalizer, and they are the exporters of their memory, so a view that was released
 * by the collector knows it.
 *
 * cffi cannot return Python objects, so a new one is appended to a list whose id() is given. */

#include <Python.h>

#include "vm_memory.h"

#include <string.h>
#include <unistd.h>

/* From here on, 0.1 ms, other Python threads run while a copy is made. */
#define LONG (2 << 20)

struct owner {
    PyObject_HEAD
    void *thing;
    Py_ssize_t length; /* of the memory that is shown; 0 for none */
    int kind;
};

static void owner_dealloc(PyObject *self)
{
    struct owner *owner = (struct owner *)self;
    PyTypeObject *type = Py_TYPE(self);
    switch (owner->kind) {
    case VMM_OWN_MAPPING:
        /* To unmap gigabytes takes long: let other threads run. */
        Py_BEGIN_ALLOW_THREADS
        vmm_mapping_release(owner->thing);
        Py_END_ALLOW_THREADS
        break;
    case VMM_OWN_BITMAP: vmm_bitmap_release(owner->thing); break;
    default:
        Py_BEGIN_ALLOW_THREADS
        vmm_table_release(owner->thing);
        Py_END_ALLOW_THREADS
        break;
    }
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static int owner_getbuffer(PyObject *self, Py_buffer *view, int flags)
{
    struct owner *owner = (struct owner *)self;
    if (owner->kind != VMM_OWN_MAPPING) {
        PyErr_SetString(PyExc_BufferError, "only a mapping has memory to show");
        view->obj = NULL;
        return -1;
    }
    struct vmm_mapping *mapping = owner->thing;
    return PyBuffer_FillInfo(view, self, mapping->base, owner->length, 0, flags);
}

/* The memory from an offset on if it has so many bytes, else NULL. */
static uint8_t *memory_at(struct owner *owner, PyObject *offset, size_t length)
{
    size_t start = PyLong_AsSize_t(offset), size = (size_t)owner->length;
    if (owner->kind != VMM_OWN_MAPPING || PyErr_Occurred() || start > size || length > size - start)
        return NULL;
    return ((struct vmm_mapping *)owner->thing)->base + start;
}

/* copy_out(offset, size, buffer): fill a buffer from memory, of which only `size` bytes count.
 *
 * What is short of time calls these methods: one call of the interpreter, where cffi makes an object
 * for the buffer and one for each number first. They tell only whether all was done. What is wrong
 * with the arguments, the caller finds out and tells. */
static PyObject *owner_copy_out(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    Py_buffer view;
    int done = 0;
    if (count == 3 && PyObject_GetBuffer(args[2], &view, PyBUF_WRITABLE) == 0) {
        size_t length = (size_t)view.len, size = PyLong_AsSize_t(args[1]);
        uint8_t *from = PyErr_Occurred() ? NULL : memory_at((struct owner *)self, args[0], length);
        struct vmm_mapping *mapping = ((struct owner *)self)->thing;
        if (from != NULL && (size_t)(from - mapping->base) + length <= size) {
            /* The buffer may be guest memory, too. */
            if (length < LONG) {
                memmove(view.buf, from, length);
            } else {
                Py_BEGIN_ALLOW_THREADS
                memmove(view.buf, from, length);
                Py_END_ALLOW_THREADS
            }
            done = 1;
        }
        PyBuffer_Release(&view);
    }
    PyErr_Clear();
    return PyBool_FromLong(done);
}

/* pread(offset, length, fd, position): returns what the system call does; -1 for bad arguments. */
static PyObject *move(PyObject *self, PyObject *const *args, Py_ssize_t count, int out)
{
    ssize_t result = -1;
    if (count == 4) {
        size_t length = PyLong_AsSize_t(args[1]);
        long fd = PyErr_Occurred() ? -1 : PyLong_AsLong(args[2]);
        long position = PyErr_Occurred() ? -1 : PyLong_AsLong(args[3]);
        uint8_t *host = PyErr_Occurred() ? NULL : memory_at((struct owner *)self, args[0], length);
        if (host != NULL && fd >= 0 && fd <= INT_MAX && position >= 0) {
            Py_BEGIN_ALLOW_THREADS
            result = out ? pwrite((int)fd, host, length, position)
                         : pread((int)fd, host, length, position);
            Py_END_ALLOW_THREADS
        }
    }
    PyErr_Clear();
    return PyLong_FromSsize_t(result);
}

static PyObject *owner_pread(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    return move(self, args, count, 0);
}

static PyObject *owner_pwrite(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    return move(self, args, count, 1);
}

#define METHOD(name) {#name, (PyCFunction)(void (*)(void))owner_##name, METH_FASTCALL, NULL}

static PyMethodDef methods[] = {
    METHOD(copy_out),
    METHOD(pread),
    METHOD(pwrite),
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_dealloc, owner_dealloc},
    {Py_bf_getbuffer, owner_getbuffer},
    {Py_tp_methods, methods},
    {Py_tp_doc, "Owns what C made; the memory of a mapping is its buffer."},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "vm_memory._native.Owner",
    .basicsize = sizeof(struct owner),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = slots,
};

int vmm_own(uint64_t list, void *thing, int kind, size_t length)
{
    static PyTypeObject *type;
    PyGILState_STATE state = PyGILState_Ensure();
    int result = -1;
    if (type == NULL)
        type = (PyTypeObject *)PyType_FromSpec(&spec);
    struct owner *owner = NULL;
    if (type != NULL)
        owner = (struct owner *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (owner != NULL) {
        owner->thing = thing;
        owner->kind = kind;
        owner->length = (Py_ssize_t)length;
        result = PyList_Append((PyObject *)(uintptr_t)list, (PyObject *)owner);
        Py_DECREF(owner); /* on failure this releases the thing, too */
    }
    PyErr_Clear();
    PyGILState_Release(state);
    return result;
}

void vmm_keep(uint64_t object)
{
    PyGILState_STATE state = PyGILState_Ensure();
    Py_INCREF((PyObject *)(uintptr_t)object);
    PyGILState_Release(state);
}

void vmm_let_go(void *object)
{
    /* C code may hold memory for longer than there is Python: then nobody is left to free it. */
    if (!Py_IsInitialized() && PyGILState_GetThisThreadState() == NULL)
        return;
    PyGILState_STATE state = PyGILState_Ensure();
    Py_DECREF((PyObject *)object);
    PyGILState_Release(state);
}
