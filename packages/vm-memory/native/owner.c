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

static PyType_Slot slots[] = {
    {Py_tp_dealloc, owner_dealloc},
    {Py_bf_getbuffer, owner_getbuffer},
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
