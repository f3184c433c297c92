// A whole step along the gradients of parameters, called from Python. The dispatcher takes longer to hand over some
// hundred small tensors than the step takes; here each is looked at once, through DLPack.
#include <pyconfig.h>

#ifndef Py_GIL_DISABLED  // which has no limited API: there the dispatcher is the way
#include <Python.h>

#include <optional>

#include "dlpack.h"
#include "sweeps.h"

namespace torchflat {
namespace {

// What the module needs of torch, for as long as the process lives.
struct Torch {
  const dlpack::Exchange* exchange;
  PyObject* tensor;     // the types that are looked at: others may be more than they show
  PyObject* parameter;
  PyObject* grad;       // names
  PyObject* is_neg;
} torch_;

std::optional<Kind> kind_of(const dlpack::Tensor& tensor) {
  const auto is = [&](uint8_t code, uint8_t bits) {
    return tensor.dtype.code == code && tensor.dtype.bits == bits && tensor.dtype.lanes == 1;
  };
  if (is(dlpack::kFloat, 32)) return Kind::float32;
  if (is(dlpack::kFloat, 64)) return Kind::float64;
  if (is(dlpack::kBfloat, 16)) return Kind::bfloat16;
  if (is(dlpack::kFloat, 16)) return Kind::float16;
  return std::nullopt;
}

// Whether memory shows what the tensor is: torch may leave the sign of an imaginary part to whoever reads it. Such
// parts lie apart, and where there is but one element that does not show. (Nor after as_strided on such a part, which
// is no gradient that autograd leaves: to ask every tensor would take a quarter of the step.)
bool is_negated(PyObject* tensor) {
  PyObject* answer = PyObject_CallMethodObjArgs(tensor, torch_.is_neg, nullptr);
  const bool negated = answer != Py_False;
  Py_XDECREF(answer);
  return negated;
}

bool add_pair(Chunks& chunks, PyObject* parameter, PyObject* gradient) {
  const auto type = reinterpret_cast<PyObject*>(Py_TYPE(parameter));
  if (type != torch_.parameter && type != torch_.tensor) return false;
  if (reinterpret_cast<PyObject*>(Py_TYPE(gradient)) != torch_.tensor) return false;
  dlpack::Tensor y, x;
  if (torch_.exchange->look(parameter, &y) != 0 || torch_.exchange->look(gradient, &x) != 0) return false;
  const auto y_kind = kind_of(y), x_kind = kind_of(x);
  if (!y_kind || !x_kind || y.device.type != dlpack::kCpu || x.device.type != dlpack::kCpu) return false;
  if (y.axes != x.axes || !std::equal(y.sizes, y.sizes + y.axes, x.sizes)) return false;
  int64_t count = 1;
  for (int32_t axis = 0; axis < y.axes; ++axis) count *= y.sizes[axis];
  if (count > 1 && !same_order(y.sizes, y.strides, x.strides, y.axes)) return false;
  if (count > 0 && (y.data == nullptr || x.data == nullptr)) return false;  // zeros that nobody has written
  if (count == 1 && (is_negated(parameter) || is_negated(gradient))) return false;
  chunks.add(
      static_cast<char*>(y.data) + y.offset, *y_kind, static_cast<const char*>(x.data) + x.offset, *x_kind, count,
      kChunk);
  return true;
}

// normalized_step(parameters: list, alpha: float, beta: float) -> float | None
PyObject* step(PyObject*, PyObject* arguments) {
  PyObject* parameters;
  double alpha, beta;
  if (!PyArg_ParseTuple(arguments, "Odd", &parameters, &alpha, &beta)) return nullptr;
  if (!PyList_Check(parameters)) Py_RETURN_NONE;
  const Py_ssize_t count = PyList_Size(parameters);
  Chunks chunks;
  std::vector<PyObject*> gradients;  // held while others may run
  chunks.list.reserve(count);
  chunks.starts.reserve(count);
  gradients.reserve(count);
  bool plain = count > 0;
  for (Py_ssize_t index = 0; plain && index < count; ++index) {
    PyObject* parameter = PyList_GetItem(parameters, index);
    PyObject* gradient = PyObject_GetAttr(parameter, torch_.grad);
    plain = gradient != nullptr && add_pair(chunks, parameter, gradient);
    if (gradient != nullptr) gradients.push_back(gradient);
  }
  double norm = 0;
  if (plain) {
    Py_BEGIN_ALLOW_THREADS
    norm = normalized_step(chunks, alpha, beta);
    Py_END_ALLOW_THREADS
  }
  for (PyObject* gradient : gradients) Py_DECREF(gradient);
  if (plain) return PyFloat_FromDouble(norm);
  PyErr_Clear();  // the caller looks at each, and says what is wrong
  Py_RETURN_NONE;
}

bool find_torch() {
  PyObject* module = PyImport_ImportModule("torch");
  PyObject* nn = PyImport_ImportModule("torch.nn");
  if (module == nullptr || nn == nullptr) return false;
  torch_.tensor = PyObject_GetAttrString(module, "Tensor");
  torch_.parameter = PyObject_GetAttrString(nn, "Parameter");
  torch_.grad = PyUnicode_InternFromString("grad");
  torch_.is_neg = PyUnicode_InternFromString("is_neg");
  if (torch_.tensor == nullptr || torch_.parameter == nullptr) return false;
  PyObject* capsule = PyObject_GetAttrString(torch_.tensor, "__dlpack_c_exchange_api__");
  if (capsule == nullptr) return false;
  torch_.exchange = static_cast<const dlpack::Exchange*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  Py_DECREF(module);
  Py_DECREF(nn);
  Py_DECREF(capsule);
  return torch_.exchange != nullptr && torch_.exchange->version.major == dlpack::kMajor;
}

PyMethodDef methods[] = {{"normalized_step", step, METH_VARARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "torchflat.ops._cpu", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace torchflat

PyMODINIT_FUNC PyInit__cpu() {
  if (!torchflat::find_torch()) {
    PyErr_Clear();
    PyErr_SetString(PyExc_ImportError, "this torch does not show its tensors by DLPack 1.3");
    return nullptr;
  }
  return PyModule_Create(&torchflat::module);
}
#endif
